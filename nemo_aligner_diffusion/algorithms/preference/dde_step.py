"""DDE's stepwise terms alone: Shi et al., arXiv 2411.14871; an ablation there, which falls below the base model."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_aligner_diffusion.algorithms.base import setting
from nemo_aligner_diffusion.algorithms.preference.base import Levels, PreferenceMethod, refuse_flow
from nemo_aligner_diffusion.algorithms.preference.dde import RATE, RATE_KIND, stepwise
from nemo_aligner_diffusion.algorithms.preference.dde_single import MAX_WEIGHT, capped
from nemo_aligner_diffusion.settings import number


@dataclass(frozen=True)
class DDEStep(PreferenceMethod):
    """The level's own step in place of the single-shot estimate, ``v_t`` for ``w_t``, and DDE's correction above it.

    The equations are derived from the paper's prose (design notes, section 4).
    """

    name = "dde_step"
    title = "DDE, stepwise"
    source = "arXiv 2411.14871"

    beta: float = setting(
        1000.0,
        number(above=0),
        "β, scale of the argument; > 0; 1000·(v_t + Σ_{s>t} v_s) is Diffusion-DPO's 2500 at SD's median t",
    )
    correction_scale: float = setting(1.0, number(above=0), "factor on v_t; > 0")
    correction_rate: float = setting(0.1, RATE_KIND, RATE)
    max_weight: float | None = setting(None, number(above=0, nullable=True), MAX_WEIGHT)

    def weights(self, levels: Levels) -> list[float]:
        refuse_flow(self, levels)
        return capped(stepwise(levels), self.correction_scale, self.max_weight)

    def corrections(self, levels: Levels) -> list[float] | None:
        return self.weights(levels)
