"""FlowBP-Sparse (arXiv 2606.11075): a few drawn steps of a trajectory whose end point is the true one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_aligner_diffusion.algorithms.base import Method, setting
from nemo_aligner_diffusion.diffusion.plan import Plan, SamplingPath
from nemo_aligner_diffusion.settings import integer, number


def draw_late(steps: range, count: int, bias: float, rng: random.Random) -> list[int]:
    """``count`` steps without replacement, each draw with ``P(i) ∝ (i − first + 1)^bias``; ascending."""
    left, drawn = list(steps), []
    for _ in range(min(count, len(steps))):
        drawn += rng.choices(left, [(i - steps.start + 1.0) ** bias for i in left])
        left.remove(drawn[-1])
    return sorted(drawn)


def gain_of(weights: Sequence[float], active: Sequence[int], compensation: float) -> dict[int, float]:
    """``ρ = 1 + q·(Σ_all|a| / Σ_A|a| − 1)``, for each active step; nothing where it is 1."""
    covered = sum(abs(weights[i]) for i in active)
    if not compensation or not covered:
        return {}
    return dict.fromkeys(active, 1 + compensation * (sum(map(abs, weights)) / covered - 1))


@dataclass(frozen=True)
class FlowBPSparse(Method):
    """K drawn steps, late ones more often, the network's input cut; the reward reads the finished picture.

    ``ẑ_T = sg[z_T] + ρ·Σ_{i∈A} a_i (e_i − sg e_i)`` with the solver's own coefficients ``a_i``: what its graph gives by
    itself when every network input is cut. ``ρ`` makes up for the steps that are not supervised. Defaults are those of
    the authors' configuration for SD3.5-M.
    """

    name = "flowbp_sparse"
    title = "FlowBP-Sparse"
    source = "arXiv 2606.11075"

    train_steps: int = setting(4, integer(1), "K, steps that get a gradient (all, where there are fewer); integer >= 1")
    late_bias: float = setting(1.0, number(0), "b: step i is drawn with probability ∝ (i + 1)^b; >= 0, 0: evenly")
    compensation: float = setting(
        0.5, number(0), "q: how much of the missing steps' weight the supervised ones take over; >= 0, 1: all"
    )

    def plan(self, path: SamplingPath, rng: random.Random) -> Plan:
        active = draw_late(range(path.steps), self.train_steps, self.late_bias, rng)
        return Plan(active=tuple(active), cut=True, gain=gain_of(path.weights, active, self.compensation))
