"""A user's own reward, named by its import path in the user's configuration.

The path is Python code that will run: it is taken from the user's YAML or command line only, never from an archive, and
not from the ``config.yaml`` of a run directory, which may be somebody else's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from nemo_aligner_diffusion.errors import RewardError
from nemo_aligner_diffusion.import_path import load_callable
from nemo_aligner_diffusion.rewards.settings import RewardSettings
from nemo_aligner_diffusion.settings import Kind, setting

if TYPE_CHECKING:
    import torch

    from nemo_aligner_diffusion.rewards.base import Reward


@dataclass(frozen=True, kw_only=True)
class Custom(RewardSettings):
    """The reward at ``package.module:name``.

    A class is called with ``kwargs`` and gives the reward, or settings that make it. A function *is* the reward,
    ``kwargs`` are handed to it as keyword arguments with each call. Anything else callable is the reward as it stands,
    without ``kwargs``. The current directory is searched after everything that is installed.
    """

    name = "custom"
    needs: ClassVar = {"import_path": "my_package.my_module:my_reward"}
    free: ClassVar = {"kwargs": "kwargs"}

    import_path: str | None = setting(
        None,
        Kind("text", nullable=True),
        "package.module:name of a class or a function (images, prompts) -> scores; needed",
    )
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> str:
        return f"the reward {self.import_path}"

    def make(self, where: str, device: str | torch.device, dtype: torch.dtype) -> Reward:
        from nemo_aligner_diffusion.rewards.support.custom import CustomReward

        origin, arguments = f"{where}.import_path = {self.import_path!r}", ("images", "prompts")
        kwargs = dict(self.kwargs)
        judge = load_callable(self.import_path or "", kwargs, origin, f"{where}.kwargs", arguments, RewardError)
        return CustomReward(judge.build(where=where) if isinstance(judge, RewardSettings) else judge, origin)
