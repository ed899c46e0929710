"""AlignProp: Prabhudesai et al., "Aligning Text-to-Image Diffusion Models with Reward Backpropagation", 2023."""

from __future__ import annotations

import random
from dataclasses import dataclass

from nemo_aligner_diffusion.algorithms.reward_tuning import RewardTuning
from nemo_aligner_diffusion.diffusion.plan import Plan


@dataclass(frozen=True)
class RandomTruncation:
    """Supervise the last ``K`` steps, ``K`` drawn anew for each batch (section 4.2, randomized truncation).

    Attributes:
        min_truncation_steps, max_truncation_steps: bounds of the uniform draw, both included.
    """

    min_truncation_steps: int
    max_truncation_steps: int

    def __call__(self, path, rng: random.Random) -> Plan:
        steps = path.steps
        k = rng.randint(self.min_truncation_steps, self.max_truncation_steps)
        return Plan(active=tuple(range(steps - k, steps)))


class AlignProp(RewardTuning):
    """Backpropagation through a randomly truncated end of the trajectory."""
