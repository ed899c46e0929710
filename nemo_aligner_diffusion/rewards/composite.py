"""Several rewards as one: a weighted sum, with each part reported on its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nemo_aligner_diffusion.errors import RewardError
from nemo_aligner_diffusion.rewards.base import Reward, check_images


class CompositeReward(Reward):
    """``Σ_k weight_k · part_k(images, prompts)``.

    :meth:`components` gives the parts' own scores, unweighted, under the names given here (a part that has several
    components itself adds ``name/component``). A NaN in a part of weight 0 stays visible there and in the sum.

    Args:
        parts: name to ``(weight, reward)``; weights may be negative.
    """

    name = "composite"

    def __init__(self, parts: Mapping[str, tuple[float, Reward]]) -> None:
        super().__init__()
        if not parts:
            raise RewardError("A composite reward needs at least one part under rm.parts.")
        for part, (weight, _) in parts.items():
            if not math.isfinite(weight):
                raise RewardError(f"The weight of the reward part {part!r} is {weight}; expected a finite number.")
        self.weights = {part: float(weight) for part, (weight, _) in parts.items()}
        # A list, not a ModuleDict: part names are the user's and may hold dots.
        self.rewards = nn.ModuleList(reward for _, reward in parts.values())
        self.freeze()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scores(images, prompts)[0]

    def scores(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        check_images(images, prompts)
        components: dict[str, Tensor] = {}
        weighted: list[Tensor] = []
        for (part, weight), reward in zip(self.weights.items(), self.rewards, strict=True):
            assert isinstance(reward, Reward)
            score, inner = reward.scores(images, prompts)
            components[part] = score
            if len(inner) > 1:
                components.update({f"{part}/{key}": value for key, value in inner.items()})
            weighted.append(weight * score)
        return torch.stack(weighted).sum(dim=0), components
