"""FlowBP-Lagrange (arXiv 2606.11075): LeapAlign's two leaps, each integrated through several predictions."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nemo_aligner_diffusion.algorithms.base import setting
from nemo_aligner_diffusion.algorithms.leapalign import LeapAlign, Leaps
from nemo_aligner_diffusion.diffusion.plan import Plan, SamplingPath, Trace
from nemo_aligner_diffusion.training.schema_kinds import PART, Kind, integer, number


def integrals(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """``∫ ℓ_i`` from ``start`` to ``end`` of the Lagrange basis polynomials of ``nodes``, in float64."""
    import numpy as np  # here: --help needs none

    places = (np.asarray(nodes, np.float64) - start) / (end - start)  # on [0, 1], where powers do not cancel
    others = [np.delete(places, i) for i in range(len(places))]
    areas = [np.poly1d(rest, r=True).integ()(1.0) / np.prod(x - rest) for x, rest in zip(places, others, strict=True)]
    return [float((end - start) * area) for area in areas]


def supports(start: int, end: int, order: int) -> list[int]:
    """Up to ``order`` evenly spaced steps of ``start … end − 1``, the first and the last among them."""
    count = min(order, end - start)
    return [start + round(i * (end - start - 1) / max(count - 1, 1)) for i in range(count)]


@dataclass(frozen=True)
class QuadratureLeaps(Leaps):
    """On flows ``ẑ_end = z + Σ_s e_s ∫ ℓ_s dσ``; else the same of ``n`` and ``z/α`` over ``σ/α``: ``d(z/α) = n d(σ/α)``."""

    order: int = 3
    support_gain: float = 0.25

    def leap(self, trace: Trace, start: int, end: int) -> Any:
        path, steps, result = trace.path, supports(start, end, self.order), 0
        scale = [1.0 if path.flow else alpha for alpha, _ in path.levels]
        if not scale[start]:  # zero terminal signal: σ/α is infinite there
            return super().leap(trace, start, end)
        at = {i: path.levels[i][1] / scale[i] for i in (*steps, end)}
        for i, weight in zip(steps, integrals([at[i] for i in steps], at[start], at[end]), strict=True):
            latents = trace.latents[i] if i == start else trace.latents[i].detach()
            slope = trace.predictions[i] if path.flow else path.noise(i, latents, trace.predictions[i])
            result = result + weight * (slope if i == start else trace.share(slope, self.support_gain))
        return scale[end] * (trace.latents[start] / scale[start] + result)


@dataclass(frozen=True)
class FlowBPLagrange(LeapAlign):
    """As LeapAlign, but a leap integrates through several predictions, of which the first two are supervised.

    ``k`` and ``j`` part the steps by a Dirichlet draw. Defaults are those of the authors' configuration for SD3.5-M.
    """

    name, title, source = "flowbp_lagrange", "FlowBP-Lagrange", "arXiv 2606.11075"

    share: float = setting(0.1, PART, "α: part of its gradient that the network's input keeps at step j; in [0, 1]")
    tau: float = setting(0.2, number(above=0), "τ: least distance of a leap from its target in a sample's weight; > 0")
    order: int = setting(3, integer(1), "support steps of a leap, evenly spaced from its first; integer >= 1")
    support_gain: float = setting(
        0.25, PART, "factor on the gradient of a leap's second support; in [0, 1], 0: cut off"
    )
    spread: tuple[float, ...] = setting(
        (2.5, 6.0, 2.0),
        Kind("floats", low=0, open_low=True, length=3),
        "Dirichlet parameters: after j, k to j, before k",
    )
    most_after: float = setting(0.36, PART, "greatest share of the steps after j; in [0, 1]; published: 9 of 25")

    def plan(self, path: SamplingPath, rng: random.Random) -> Plan:
        steps, parts = path.steps, [rng.gammavariate(parameter, 1.0) for parameter in self.spread]
        after, between = (round(steps * part / sum(parts)) for part in parts[:2])
        j = steps - 1 - min(after, int(self.most_after * steps), steps - 2)
        k = j - min(max(between, 1), j)
        active = [
            i for leap in ((k, j), (j, steps)) for i in supports(*leap, self.order)[: 2 if self.support_gain else 1]
        ]
        settings = {"k": k, "j": j, "tau": self.tau, "order": self.order, "support_gain": self.support_gain}
        return QuadratureLeaps(tuple(active), cut=True, input_share={j: self.share}, **settings)
