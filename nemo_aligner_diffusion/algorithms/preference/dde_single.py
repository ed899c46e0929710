"""DDE's single-shot estimate alone: Shi et al., arXiv 2411.14871; an ablation there."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_aligner_diffusion.algorithms.base import setting
from nemo_aligner_diffusion.algorithms.preference.base import Levels, PreferenceMethod, signal_shares
from nemo_aligner_diffusion.settings import number

MAX_WEIGHT = "w_t (and v_t) count up to here; > 0, null: no cap; needed where the last level has no signal"


def single_shot(levels: Levels) -> list[float]:
    """``w_t = (1−ᾱ_t)/ᾱ_t``; of a flow ``σ²``.

    The DDIM estimate from ``z_t`` has the mean ``ẑ_θ = (z_t − √(1−ᾱ_t) ε_θ)/√ᾱ_t``, so ``‖z − ẑ_θ‖² = w_t·‖ε − ε_θ‖²``;
    of a flow ``x̂ = z_σ − σ v_θ``.
    """
    if levels.flow:
        return [sigma**2 for sigma in levels.sigmas.tolist()]
    return [(1 - share) / share if share > 0 else float("inf") for share in signal_shares(levels)]


def capped(values: list[float], scale: float, most: float | None) -> list[float]:
    return [scale * value if most is None else min(scale * value, most) for value in values]


@dataclass(frozen=True)
class DDESingle(PreferenceMethod):
    """The final picture's density is estimated from any noise level in one DDIM step: ``w_t = (1−ᾱ_t)/ᾱ_t``.

    The equations are derived from the paper's prose (design notes, section 4). Its argument about the noisy end is
    about models that predict noise: on a flow ``w = σ²`` is bounded, an experiment.
    """

    name = "dde_single"
    title = "DDE, single-shot"
    source = "arXiv 2411.14871"

    beta: float = setting(
        1000.0,
        number(above=0),
        "β, scale of the argument; > 0; 1000·w_t is Diffusion-DPO's 2500 at Stable Diffusion's median t",
    )
    weight_scale: float = setting(1.0, number(above=0), "factor on w_t; > 0")
    max_weight: float | None = setting(None, number(above=0, nullable=True), MAX_WEIGHT)

    def weights(self, levels: Levels) -> list[float]:
        return capped(single_shot(levels), self.weight_scale, self.max_weight)
