"""LeapAlign (arXiv 2604.15311): two leaps reach the end of the trajectory, with its true values."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_aligner_diffusion.algorithms.base import Method, setting
from nemo_aligner_diffusion.diffusion.plan import Plan, SamplingPath, Trace
from nemo_aligner_diffusion.settings import PART, number

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Leaps(Plan):
    """``z_k → z_j → z_T``: each target has its true value and the gradient of the leap to it.

    Attributes:
        k, j: where the leaps begin.
        tau: least distance in a sample's weight ``1 / (max(τ, |ẑ_j − z_j|) + max(τ, |ẑ_T − z_T|))``.
    """

    k: int = 0
    j: int = 1
    tau: float = 0.1

    def leap(self, trace: Trace, start: int, end: int) -> Tensor:
        """``ẑ_end = α_end Ẑ + σ_end n`` of step ``start``: DDIM's step, and Euler's ``z + (σ_end − σ) e`` of a flow."""
        (alpha, sigma), at = trace.path.levels[end], (start, trace.latents[start], trace.predictions[start])
        return alpha * trace.path.clean(*at) + sigma * trace.path.noise(*at)

    def carry(self, step: int, latents: Tensor, trace: Trace) -> Tensor:
        start = {self.j: self.k, trace.path.steps: self.j}.get(step)
        return latents if start is None else trace.connect(self.leap(trace, start, step), latents)

    def sample_weights(self, trace: Trace) -> Tensor:
        def distance(start: int, end: int) -> Tensor:  # mean of the absolute difference, of each sample
            difference = self.leap(trace, start, end).detach() - trace.latents[end].detach()
            return difference.abs().flatten(1).mean(1).clamp(min=self.tau)

        return 1 / (distance(self.k, self.j) + distance(self.j, trace.path.steps))


@dataclass(frozen=True)
class LeapAlign(Method):
    """Two drawn steps k < j, the input at j with a share α of its gradient; the reward reads the picture, by two leaps.

    The leap is one DDIM step from ``k`` to ``j``, and from ``j`` to the end; each sample's loss is divided by how far
    the leaps miss.
    """

    name, title, source = "leapalign", "LeapAlign", "arXiv 2604.15311"

    share: float = setting(0.3, PART, "α: part of its gradient that the network's input keeps at step j; in [0, 1]")
    tau: float = setting(0.1, number(above=0), "τ: least distance of a leap from its target in a sample's weight; > 0")

    def check(self, steps: int) -> None:
        self.check_at_least_two(steps)

    def plan(self, path: SamplingPath, rng: random.Random) -> Plan:
        k, j = sorted(rng.sample(range(path.steps), 2))
        return Leaps(active=(k, j), cut=True, input_share={j: self.share}, k=k, j=j, tau=self.tau)
