"""What a reward's file says: its name, its settings, and how it scores. Imports no torch.

A Hugging Face reward is one file of this package and ``conf/rm/<name>.yaml``::

    @dataclass(frozen=True, kw_only=True)
    class Brightness(HuggingFaceSettings):
        name = "brightness"
        auto_class = "AutoModelForImageClassification"
        needs: ClassVar = {"from_pretrained": "google/vit-base-patch16-224"}

        sharpness: float = setting(1.0, number(above=0), "exponent; > 0")

        def score(self, network, images):
            return network.model(pixel_values=network.pixels(images)).logits[:, 0] ** self.sharpness
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.rewards.augmentation import Augmentation
from nemo_aligner_diffusion.runtime.settings import PRECISIONS as PRECISION_NAMES
from nemo_aligner_diffusion.settings import BOOL, PATH, Kind, Settings, choice, integer, part, setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from nemo_aligner_diffusion.rewards.base import NetworkReward, Reward

_DTYPES = {"32": "float32", "16": "float16", "bf16": "bfloat16", "64": "float64"}
# rm.trainer.precision -> the dtype in which a reward computes
PRECISIONS = {name: _DTYPES[name.partition("-")[0]] for name in PRECISION_NAMES}


@dataclass(frozen=True, kw_only=True)
class RewardSettings(Settings):
    """A reward before it is made. A subclass in a file of this package is found by :func:`.registry.rewards`.

    Attributes:
        name: value of ``rm.name``, and the reward's name in metrics.
        needs: fields that have no default, with an example of each.
        free: sections whose keys are free, such as a composite's ``parts``, and the field of each.
        differentiable: in the pictures; a policy gradient needs it not.
        measures: whether its scores say anything; ``rm=none`` has none.
        augment: random changes of the pictures that the reward sees in training.
    """

    section: ClassVar[str] = "rm"
    name: ClassVar[str] = ""
    needs: ClassVar[Mapping[str, str]] = {}
    free: ClassVar[Mapping[str, str]] = {}
    differentiable: ClassVar[bool] = True
    measures: ClassVar[bool] = True

    augment: Augmentation = part(Augmentation)

    @classmethod
    def below(cls) -> dict[str, tuple[str, Kind]]:
        """Key below ``rm`` -> field and kind, of every setting but ``augment`` and the free sections."""
        kinds = cls.kinds()
        return {key.removeprefix("rm."): (field, kinds[field]) for field, key in cls.keys().items()}

    @classmethod
    def read_section(cls, value: Any, where: str) -> Any:
        """The value of one of ``free``, which stands at ``where``; empty where there is none."""
        if value is not None and not isinstance(value, Mapping):
            raise ConfigurationError(f"{where} = {value!r}: expected a section with keys")
        return dict(value or {})

    def check(self, where: str = "rm") -> None:
        """What takes more than one key to see; ``where`` is the reward's place in the configuration.

        Raises:
            ConfigurationError: the settings cannot make a reward.
        """
        for needed, example in self.needs.items():
            if getattr(self, needed) is None:
                key = self.keys()[needed].replace("rm", where, 1)
                raise ConfigurationError(f"{where}.name = {self.name} needs {key}, such as {key}={example}")

    def without_gradient(self, where: str = "rm") -> Iterator[str]:
        """Why nothing can be learnt by this reward's gradient, and what to do: one message for each such part."""
        if not self.differentiable:
            yield f"{where}.name = {self.name} has no gradient: expected algorithm=ddpo, or another reward"

    def describe(self) -> str:
        """What is rewarded, in words: a report says that a model was tuned towards it."""
        return f"{self.name} (an analytic reward)"

    def build(self, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, where: str = "rm") -> Reward:
        """The reward.

        Args:
            device, dtype: where and in what its networks compute; by default ``precision``, or float32.
            where: its place in the configuration: for messages, and what keys its random numbers.

        Raises:
            ConfigurationError: the settings cannot make a reward.
            RewardError, ArchiveError: a model cannot be used.
        """
        import torch

        from nemo_aligner_diffusion.rewards.support.augmented import augmented

        self.check(where)
        dtype = dtype or getattr(torch, PRECISIONS[getattr(self, "precision", "32")])
        return augmented(self.make(where, device, dtype).to(device), self.augment, where)

    def make(self, where: str, device: str | torch.device, dtype: torch.dtype) -> Reward:
        """The reward without its augmentation; by default :meth:`score` alone, without a network."""
        from nemo_aligner_diffusion.rewards.base import FunctionReward

        return FunctionReward(self)


@dataclass(frozen=True, kw_only=True)
class NetworkSettings(RewardSettings):
    """Settings of a reward that has a network; its :meth:`score` takes it, see :class:`.base.NetworkReward`."""

    micro_batch_size: int | None = setting(
        None,
        integer(1, nullable=True),
        "pictures a reward forward pass; integer >= 1, null: all at once",
        "rm.model.micro_batch_size",
    )
    activation_checkpointing: bool = setting(
        False,
        BOOL,
        "recompute the reward's inner activations in the backward pass: less memory, more time",
        "rm.model.activation_checkpointing",
    )
    precision: str = setting(
        "32",
        choice(*PRECISIONS),
        "what the reward computes in: 32, 16 or bf16, 64, or Lightning's long names",
        "rm.trainer.precision",
    )

    def describe(self) -> str:
        return self.name

    def setup(self, network: Any) -> None:  # most have nothing to prepare
        """Called once with the loaded network: checks it, and keeps on it what :meth:`score` needs.

        Raises:
            RewardError: the settings do not fit this network.
        """

    def embed(self, network: Any, prompt: str) -> Tensor:
        """A prompt as a row ``(D,)`` for :meth:`score`; computed once for each prompt, without gradient."""
        raise NotImplementedError

    def texts(self, prompts: Sequence[str]) -> Sequence[str]:
        """What is embedded for each picture."""
        return prompts

    def score(self, network: NetworkReward, images: Tensor, *rows: Tensor) -> Tensor:
        """Scores ``(B,)`` of pictures ``(B, 3, H, W)`` in ``[0, 1]``, with the texts' ``rows`` where it reads any."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class HuggingFaceSettings(NetworkSettings):
    """A network of transformers with its own preparation of pictures.

    Attributes:
        auto_class: of transformers, which loads the network.
        what: what the network is, in words, for messages.
        model_types: of ``config.json`` that :meth:`score` knows; empty: any that ``auto_class`` loads.
        reads_prompts: whether there is a tokenizer to load, and texts to :meth:`embed`.
    """

    auto_class: ClassVar[str] = ""
    what: ClassVar[str] = ""
    model_types: ClassVar[tuple[str, ...]] = ()
    reads_prompts: ClassVar[bool] = False

    from_pretrained: str | None = setting(
        None,
        PATH,
        "the network's folder, or its id on the Hugging Face hub; path, needed",
        "rm.model.from_pretrained",
    )

    def make(self, where: str, device: str | torch.device, dtype: torch.dtype) -> Reward:
        from nemo_aligner_diffusion.rewards.support.pretrained import load_network

        return load_network(self, f"{where}.model.from_pretrained").to(device, dtype)
