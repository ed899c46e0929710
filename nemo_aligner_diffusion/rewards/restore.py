"""A reward out of a ``.nemo`` file, whichever kind the file's ``target`` names; ``rm.name=clip`` is its name.

``target`` is looked up in a table of names that this package knows; nothing is imported because an archive names it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_aligner_diffusion.embedded_assets import embedded_reward_path
from nemo_aligner_diffusion.errors import AlignerError, ArchiveError
from nemo_aligner_diffusion.keys import closest
from nemo_aligner_diffusion.rewards.settings import NetworkSettings
from nemo_aligner_diffusion.settings import PATH, choice, setting

if TYPE_CHECKING:
    import torch

    from nemo_aligner_diffusion.formats.nemo import Limits, NemoArchive
    from nemo_aligner_diffusion.rewards.base import ModelReward, Reward

logger = logging.getLogger(__name__)

# target -> "module:function"; function(archive, tokenizer, score) gives the reward, on the CPU.
RESTORERS = {
    "nemo_aligner_diffusion.rewards.clip.CLIPReward": "clip.archive:restore_clip",
    "nemo_aligner_diffusion.rewards.aesthetic.AestheticReward": "clip.aesthetic:restore_aesthetic",
    "nemo_aligner_diffusion.rewards.image_reward.ImageReward": "image_reward.archive:restore_image_reward",
}
SCORES = ("pickscore", "hps", "clipscore")  # of a CLIP
# What NeMo and NeMo-Aligner call their CLIP models, under whichever package path.
MEGATRON_CLASSES = ("MegatronCLIPModel", "MegatronCLIPRewardModel")


@dataclass(frozen=True, kw_only=True)
class RestoredSettings(NetworkSettings):
    """Settings of a reward whose network comes out of a ``.nemo`` file."""

    restore_from_path: str | None = setting(
        None, PATH, ".nemo file; path, null: the embedded reward", "rm.model.restore_from_path"
    )
    tokenizer: str | None = setting(
        None,
        PATH,
        "folder with vocab.json and merges.txt, for a file that only names its tokenizer; path, null: the file's own",
        "rm.model.tokenizer",
    )

    def restore(self, device: str | torch.device, dtype: torch.dtype, score: str | None = None) -> Reward:
        return restore_reward(
            self.restore_from_path or embedded_reward_path(),
            device=device,
            dtype=dtype,
            tokenizer=self.tokenizer,
            score=score,
            micro_batch_size=self.micro_batch_size,
            activation_checkpointing=self.activation_checkpointing,
        )


@dataclass(frozen=True, kw_only=True)
class Restored(RestoredSettings):
    """The reward in a ``.nemo`` file, as the file says."""

    name = "clip"

    formula: str | None = setting(
        None,
        choice(*SCORES, nullable=True),
        "pickscore, hps (cosine) or clipscore (2.5·max(cosine, 0)); null: the file's own",
        "rm.model.score",
    )

    def describe(self) -> str:
        path = self.restore_from_path
        return f"the reward model {Path(path).name}" if path else "the embedded CLIP reward"

    def make(self, where: str, device: str | torch.device, dtype: torch.dtype) -> Reward:
        return self.restore(device, dtype, self.formula)


def restore_reward(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    score: str | None = None,
    micro_batch_size: int | None = None,
    activation_checkpointing: bool = False,
    limits: Limits | None = None,
) -> Reward:
    """The reward in a ``.nemo`` file.

    Args:
        path: the archive.
        device, dtype: where and in which precision its model computes, whatever dtype it was saved in; float32 when
            left out.
        tokenizer: folder with the tokenizer's files, for archives that only name a tokenizer.
        score: for CLIP rewards, overrides the archive's own (``pickscore``, ``hps``, ``clipscore``).
        micro_batch_size, activation_checkpointing: see :class:`.ModelReward`.
        limits: of what is read, for an archive that you trust and that exceeds the default ones.

    Raises:
        ArchiveError: the archive is unusable, its ``target`` is no known reward, or its weights or tokenizer don't fit
            its configuration.
    """
    import torch

    from nemo_aligner_diffusion.formats.nemo import load_nemo

    archive = load_nemo(path, limits)
    restorer = _restorer(archive)
    try:
        reward = restorer(archive, tokenizer, score)
    except AlignerError:
        raise
    except Exception as error:  # a configuration may hold anything, and other libraries raise what they like
        raise ArchiveError(
            f"{archive.path}: its configuration describes no reward that can be built "
            f"({type(error).__name__}: {str(error)[:300]}). Save the archive again from a working model."
        ) from error
    idle = [("score", score is not None and not hasattr(reward, "score_type"))]
    idle += [("tokenizer", tokenizer is not None and reward.tokenizer is None)]
    for key, is_idle in idle:
        if is_idle:
            logger.warning("rm.model.%s has no effect here: %s has no choice of it", key, type(reward).__name__)
    reward.micro_batch_size, reward.activation_checkpointing = micro_batch_size, activation_checkpointing
    name = archive.config.get("name")
    if archive.target in RESTORERS and isinstance(name, str):  # in NeMo's archives it is the experiment's name
        reward.name = name
    return reward.to(device, dtype or torch.float32)


def _restorer(archive: NemoArchive) -> Callable[..., ModelReward]:
    target = archive.target
    home = RESTORERS.get(target)
    if target.split(".")[0] in ("nemo", "nemo_aligner") and target.split(".")[-1] in MEGATRON_CLASSES:
        home = "clip.archive:restore_clip"
    if home is None:
        known = (*RESTORERS, *(f"nemo….{name}" for name in MEGATRON_CLASSES))
        found = f"its target {target[:200]!r} is no reward that can be restored" if target else "it names no target"
        hint = closest(target[:200], known) or "."
        raise ArchiveError(f"{archive.path}: {found}{hint} Known are: {', '.join(known)}.")
    module, _, name = home.partition(":")
    restorer: Callable[..., ModelReward] = getattr(import_module(f"nemo_aligner_diffusion.rewards.{module}"), name)
    return restorer
