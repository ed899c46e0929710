"""FlowBP-Lagrange (arXiv 2606.11075), with the authors' settings for SD3.5-M: LeapAlign's leaps, of higher order."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nemo_aligner_diffusion.algorithms.base import setting
from nemo_aligner_diffusion.algorithms.leapalign import LeapAlign, Leaps
from nemo_aligner_diffusion.diffusion.plan import Plan, SamplingPath, Trace
from nemo_aligner_diffusion.settings import PART, Kind, integer, number

DIRICHLET = Kind("floats", low=0, open_low=True, length=3)


def integrals(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """``∫ ℓ_i`` from ``start`` to ``end`` of the Lagrange basis polynomials of ``nodes``, in float64."""
    import numpy as np  # here: --help needs none

    at = (np.asarray(nodes, np.float64) - start) / (end - start)  # on [0, 1], where powers do not cancel
    bases = [np.poly1d(np.delete(at, i), r=True) for i in range(len(at))]
    return [float((end - start) * basis.integ()(1.0) / basis(node)) for basis, node in zip(bases, at, strict=True)]


def supports(start: int, end: int, order: int) -> list[int]:
    """Up to ``order`` evenly spaced steps of ``start … end − 1``, the first among them."""
    return sorted({start + round(i * (end - start - 1) / max(order - 1, 1)) for i in range(order)})


@dataclass(frozen=True)
class QuadratureLeaps(Leaps):
    """Flows: ``ẑ_end = z + Σ_s e_s ∫ ℓ_s dσ``. Other models: ``z/α`` and ``n`` over ``σ/α`` in place of ``z, e, σ``."""

    order: int = 3
    second: float = 0.25

    def leap(self, trace: Trace, start: int, end: int) -> Any:
        path, steps, z = trace.path, supports(start, end, self.order), trace.latents
        scale = [1.0 if path.flow else alpha for alpha, _ in path.levels]
        if not scale[start]:  # zero terminal signal: σ/α is infinite there
            return super().leap(trace, start, end)
        at = {i: path.levels[i][1] / scale[i] for i in (*steps, end)}
        if at[start] == at[end]:
            return super().leap(trace, start, end)
        steps = [i for i in steps if i == min(n for n in steps if at[n] == at[i])]  # PNDM is at one of its levels twice
        result = z[start] / scale[start]
        for i, weight in zip(steps, integrals([at[i] for i in steps], at[start], at[end]), strict=True):
            e, before = trace.predictions[i], z[i] if i == start else z[i].detach()
            slope = e if path.flow else path.noise(i, before, e)
            result = result + weight * (slope if i == start else trace.share(slope, self.second))
        return scale[end] * result


@dataclass(frozen=True)
class FlowBPLagrange(LeapAlign):
    """As LeapAlign, but a leap integrates through several predictions, of which the first two are supervised."""

    name, title, source = "flowbp_lagrange", "FlowBP-Lagrange", "arXiv 2606.11075"

    share: float = setting(0.1, PART, "α: part of its gradient that the network's input keeps at step j; in [0, 1]")
    tau: float = setting(0.2, number(above=0), "τ: least distance of a leap from its target in a sample's weight; > 0")
    order: int = setting(3, integer(1), "support steps of a leap, evenly spaced from its first; integer >= 1")
    support_gain: float = setting(0.25, PART, "factor on the gradient of a leap's second support; in [0, 1]")
    spread: tuple[float, ...] = setting((2.5, 6.0, 2.0), DIRICHLET, "Dirichlet parameters: after j, k to j, before k")
    most_after: float = setting(0.36, PART, "greatest share of the steps after j; in [0, 1]; published: 9 of 25")

    def plan(self, path: SamplingPath, rng: random.Random) -> Plan:
        steps, parts = path.steps, [rng.gammavariate(parameter, 1.0) for parameter in self.spread]
        after, between = (round(steps * part / sum(parts)) for part in parts[:2])
        j = steps - 1 - min(after, round(self.most_after * steps), steps - 2)
        k, share = j - min(max(between, 1), j), {j: self.share}
        on = (*supports(k, j, self.order)[:2], *supports(j, steps, self.order)[:2])
        return QuadratureLeaps(on, True, share, k=k, j=j, tau=self.tau, order=self.order, second=self.support_gain)
