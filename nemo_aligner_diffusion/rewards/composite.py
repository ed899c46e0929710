"""Several rewards as one: a weighted sum, with each part reported on its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nemo_aligner_diffusion.errors import RewardError
from nemo_aligner_diffusion.rewards.base import Reward
from nemo_aligner_diffusion.rewards.parts import Part, PartedReward


class CompositeReward(PartedReward):
    """``Σ_k weight_k · shaped_k(part_k(images, prompts))``.

    :meth:`components` gives the parts' own scores, unweighted and unshaped. A NaN in a part of weight 0 stays visible
    there and in the sum.

    Args:
        parts: name to ``(weight, part)``; weights may be negative. A :class:`Reward` stands for a part that is used as
            it is.
        label: this reward's place in the configuration.
    """

    name = "composite"

    def __init__(self, parts: Mapping[str, tuple[float, Reward | Part]], label: str = "rm") -> None:
        for part, (weight, _) in parts.items():
            if not math.isfinite(weight):
                raise RewardError(f"The weight of the reward part {part!r} is {weight}; expected a finite number.")
        super().__init__(
            {name: part if isinstance(part, Part) else Part(part) for name, (_, part) in parts.items()}, label
        )
        self.weights = {name: float(weight) for name, (weight, _) in parts.items()}

    def combine(self, scores: Sequence[Tensor]) -> Tensor:
        weighted = [weight * score for weight, score in zip(self.weights.values(), scores, strict=True)]
        return torch.stack(weighted).sum(dim=0)
