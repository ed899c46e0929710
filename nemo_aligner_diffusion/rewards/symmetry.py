"""Mirror symmetry: a low-level reward that asks for the whole composition, with no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
