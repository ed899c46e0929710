"""DRaFT and DRaFT-K: Clark et al., "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", ICLR 2024."""

from __future__ import annotations

import random
from dataclasses import dataclass

from nemo_aligner_diffusion.algorithms.reward_tuning import RewardTuning
from nemo_aligner_diffusion.diffusion.plan import Plan


@dataclass(frozen=True)
class LastSteps:
    """Supervise the last ``K`` steps (section 4, DRaFT-K); ``None``: all of them (DRaFT)."""

    truncation_steps: int | None = None

    def __call__(self, path, rng: random.Random) -> Plan:
        steps = path.steps
        k = steps if self.truncation_steps is None else self.truncation_steps
        return Plan(active=tuple(range(steps - k, steps)))


class DRaFT(RewardTuning):
    """Backpropagate the reward of the finished picture through sampling; ``truncation_steps`` makes it DRaFT-K."""
