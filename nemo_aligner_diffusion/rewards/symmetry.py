"""Mirror symmetry: a low-level reward that asks for the whole composition, with no weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nemo_aligner_diffusion.rewards.base import Reward


class MirrorSymmetry(Reward):
    """Negative mean absolute difference between a picture and its left-right mirror; 0 is the best.

    (The reward on which DRTune, Wu et al. 2024, arXiv 2405.00760, shows that shallow supervision fails.) A blank
    picture is perfectly symmetric: watch recognisability, too.
    """

    name = "symmetry"

    def __init__(self) -> None:
        super().__init__()
        self.freeze()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return -(images - images.flip(-1)).abs().mean(dim=(1, 2, 3))
