"""Rewards without weights: mirror symmetry, which asks for the whole composition, colourfulness, and none at all."""

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
class Colourfulness(RewardSettings):
    """0 for grey, above 100 for gaudy: ``√(σ²_rg + σ²_yb) + 0.3·√(μ²_rg + μ²_yb)`` in the opponent colours
    ``rg = R − G``, ``yb = (R + G)/2 − B`` on a scale of 255.

    Hasler & Süsstrunk, 2003, "Measuring colourfulness in natural images", the efficient metric of section 7. Gaudy
    noise scores high: watch recognisability, too.
    """

    name = "colourfulness"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        import torch

        red, green, blue = (images.double() * 255).flatten(2).unbind(1)
        opponent = torch.stack([red - green, (red + green) / 2 - blue])
        spread, shift = opponent.var(dim=-1, unbiased=False).sum(0), opponent.mean(dim=-1).square().sum(0)
        # the root's slope is infinite at 0: grey pictures get no gradient
        length, bias = spread.clamp_min(1e-12).sqrt(), shift.clamp_min(1e-12).sqrt()
        return (length + 0.3 * bias).float()


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
