"""DRaFT-LV: Clark et al., ICLR 2024, section 4 ("low variance"): ``n`` reward gradients from one trajectory."""

from __future__ import annotations

import random
from dataclasses import dataclass

from nemo_aligner_diffusion.algorithms.reward_tuning import RewardTuning
from nemo_aligner_diffusion.diffusion.plan import Plan


@dataclass(frozen=True)
class RenoisedLastStep:
    """Noise the finished latent ``samples`` times to the last step's level; supervise that step from each."""

    samples: int = 2

    def __call__(self, path, rng: random.Random) -> Plan:
        steps = path.steps
        return Plan(active=(steps - 1,), renoise=self.samples)


class DRaFTLV(RewardTuning):
    """DRaFT-1 with the variance of its gradient lowered by re-noising (the paper uses two samples)."""
