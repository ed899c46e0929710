"""Several rewards as one: a weighted sum, with each part reported on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_aligner_diffusion.rewards.parts import PartedSettings

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Composite(PartedSettings):
    """``Σ_k weight_k · shaped_k(part_k(images, prompts))``; weights may be negative."""

    name = "composite"

    def combine(self, scores: Sequence[Tensor]) -> Tensor:
        import torch

        weighted = [part.weight * score for part, score in zip(self.members.values(), scores, strict=True)]
        return torch.stack(weighted).sum(dim=0)
