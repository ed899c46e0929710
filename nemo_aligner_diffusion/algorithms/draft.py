"""DRaFT: Clark et al., "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", ICLR 2024, section 4."""

from __future__ import annotations

import random
from dataclasses import dataclass

from nemo_aligner_diffusion.algorithms.base import Method
from nemo_aligner_diffusion.diffusion.plan import Plan, SamplingPath


@dataclass(frozen=True)
class DRaFT(Method):
    """Every step is supervised; the reward reads the finished picture."""

    name = "draft"
    title = "DRaFT"
    source = "arXiv 2309.17400"

    def plan(self, path: SamplingPath, rng: random.Random) -> Plan:
        return Plan(active=tuple(range(path.steps)))
