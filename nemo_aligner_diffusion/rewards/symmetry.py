"""Rewards without weights: mirror symmetry, which asks for the whole composition, and none at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.rewards.settings import RewardSettings

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Symmetry(RewardSettings):
    """Negative mean absolute difference between a picture and its left-right mirror; 0 is the best.

    (The reward on which DRTune, Wu et al. 2024, arXiv 2405.00760, shows that shallow supervision fails.) A blank
    picture is perfectly symmetric: watch recognisability, too.
    """

    name = "symmetry"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return -(images - images.flip(-1)).abs().mean(dim=(1, 2, 3))


@dataclass(frozen=True, kw_only=True)
class Nothing(RewardSettings):
    """No reward, for learning from given pairs: every picture's score is NaN, and no figure is made of it."""

    name = "none"
    measures = False

    def check(self, where: str = "rm") -> None:
        if where != "rm":  # a part of another reward, a labeller of pairs
            raise ConfigurationError(f"{where} = none, which measures nothing: expected a reward")

    def describe(self) -> str:
        return "no reward"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.new_full((len(images),), float("nan"))
