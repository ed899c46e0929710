"""DRaFT-LV: Clark et al., ICLR 2024, section 4.2 ("low variance"): ``n`` reward gradients from one trajectory."""

from __future__ import annotations

import random
from dataclasses import dataclass

from nemo_aligner_diffusion.algorithms.base import Method, setting
from nemo_aligner_diffusion.diffusion.plan import Plan, SamplingPath
from nemo_aligner_diffusion.settings import BOOL, integer


@dataclass(frozen=True)
class DRaFTLV(Method):
    """The last step is supervised, from n re-noised latents (multistep solvers: of first order); the reward reads each.

    DRaFT-1 with the variance of its gradient lowered. FlowBP's reproduction scores the trajectory's own last step
    besides the n: ``include_own_step``.
    """

    name = "draft_lv"
    title = "DRaFT-LV"
    source = "arXiv 2309.17400"

    samples: int = setting(
        2, integer(1), "n, times the finished latent is noised again and supervised; integer >= 1; published: 2"
    )
    include_own_step: bool = setting(False, BOOL, "supervise the trajectory's own last step too, as one picture more")

    def check(self, steps: int) -> None:
        self.check_at_least_two(steps)

    def plan(self, path: SamplingPath, rng: random.Random) -> Plan:
        return Plan(active=(path.steps - 1,), renoise=self.samples, own_step=self.include_own_step)
