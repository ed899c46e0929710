"""FlowBP-Bridge (arXiv 2606.11075): drawn steps on both sides of a split, joined by one nested path through it."""

from __future__ import annotations

import random
from dataclasses import dataclass

from nemo_aligner_diffusion.algorithms.base import Method, setting
from nemo_aligner_diffusion.algorithms.flowbp_sparse import draw_late, gain_of
from nemo_aligner_diffusion.diffusion.plan import Plan, SamplingPath
from nemo_aligner_diffusion.settings import PART, integer, number


@dataclass(frozen=True)
class FlowBPBridge(Method):
    """K drawn steps on both sides of a drawn split j, inputs cut but for a share α at j; the reward reads the picture.

    ``z_j^c = connect(ẑ_j, z_j)`` from the supervised steps before ``j``; step ``j`` is supervised and its network sees
    ``α z_j^c + (1 − α) sg[z_j^c]``; ``ẑ_T`` follows from ``z_j^c`` and the supervised steps from ``j`` on. With inputs
    cut that is the solver's own graph. As in the authors' code ``j`` is the later of two steps drawn evenly, the K
    steps are shared out by length with one on each side at least, and ``b`` counts anew in each part. Defaults are
    those of their configuration for SD3.5-M.
    """

    name = "flowbp_bridge"
    title = "FlowBP-Bridge"
    source = "arXiv 2606.11075"

    train_steps: int = setting(5, integer(2), "K, steps that get a gradient, the split among them; integer >= 2")
    late_bias: float = setting(
        4.0, number(0), "b: step i of its side is drawn with probability ∝ (i + 1)^b; >= 0, 0: evenly"
    )
    compensation: float = setting(
        0.0, number(0), "q: how much of the missing steps' weight the supervised ones take over; >= 0, 1: all"
    )
    share: float = setting(0.5, PART, "α: part of its gradient that the network's input keeps at the split; in [0, 1]")

    def check(self, steps: int) -> None:
        self.check_at_least_two(steps)

    def plan(self, path: SamplingPath, rng: random.Random) -> Plan:
        steps = path.steps
        split = max(rng.sample(range(steps), 2))
        count = min(self.train_steps, steps)
        before = min(max(round(count * split / steps), 1, count - (steps - split)), split, count - 1)
        active = draw_late(range(split), before, self.late_bias, rng)
        active += [split, *draw_late(range(split + 1, steps), count - before - 1, self.late_bias, rng)]
        gain = gain_of(path.weights, active, self.compensation)
        return Plan(active=tuple(active), cut=True, input_share={split: self.share}, gain=gain)
