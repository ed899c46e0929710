"""DDE: Shi et al., "Preference Alignment for Diffusion Model via Explicit Denoised Distribution Estimation"."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_aligner_diffusion.algorithms.base import setting
from nemo_aligner_diffusion.algorithms.preference.base import Levels, PreferenceMethod, refuse_flow, signal_shares
from nemo_aligner_diffusion.algorithms.preference.dde_single import MAX_WEIGHT, capped, single_shot
from nemo_aligner_diffusion.settings import Kind, number

RATE = "what a new v_t·Δ counts in the moving average of its level; in (0, 1]"
RATE_KIND = Kind("float", low=0, high=1, open_low=True)


def stepwise(levels: Levels) -> list[float]:
    """``v_s = β_s²/(2σ_s² α_s (1−ᾱ_s))``, ``σ_s² = β_s(1−ᾱ_{s−1})/(1−ᾱ_s)``, the posterior's variance.

    ``ρ_s = p_θ(z_{s−1}|z_s)/q(z_{s−1}|z_s, z)`` of two Gaussians with the covariance ``σ_s²``, at the mode of ``q``,
    has ``log ρ_s = −v_s·‖ε − ε_θ(z_s, s)‖²``. At ``s = 0`` the posterior is a point: its variance is that of ``s = 1``
    there, as in the code of DDPM (Ho et al., 2020).
    """
    shares = signal_shares(levels)
    before = [1.0, *shares[:-1]]
    found = []
    for s, (share, last) in enumerate(zip(shares, before, strict=True)):
        if share <= 0:
            found.append(float("inf"))
            continue
        alpha = share / last
        beta = 1 - alpha
        first = max(s, 1)
        variance = (1 - shares[first] / before[first]) * (1 - before[first]) / (1 - shares[first])
        found.append(beta**2 / (2 * variance * alpha * (1 - share)))
    return found


@dataclass(frozen=True)
class DDE(PreferenceMethod):
    """Single-shot below ``t``, ``w_t = (1−ᾱ_t)/ᾱ_t``, and a stepwise correction above it from a running table.

    ``log p_θ(z) ≈ log p^DDIM_θ(z|z_t) + Σ_{s>t} log ρ_s``. The correction calls no network: a table of all noise levels
    holds a moving average of ``v_s·Δ`` of winners and of losers, from the level that each pair was trained at, used
    from the next iteration on; it starts at 0, which is what it is of a model that has not moved. The equations are
    derived from the paper's prose, as those of the text are lost (design notes, section 4): every scale is a setting.
    """

    name = "dde"
    title = "DDE"
    source = "arXiv 2411.14871"

    beta: float = setting(
        500.0,
        number(above=0),
        "β, scale of the argument; > 0; 500·(w_t + Σ_{s>t} v_s) is Diffusion-DPO's 2500 at Stable Diffusion's median t",
    )
    weight_scale: float = setting(1.0, number(above=0), "factor on w_t; > 0")
    correction_scale: float = setting(1.0, number(0), "factor on v_t; >= 0, 0: no correction")
    correction_rate: float = setting(0.1, RATE_KIND, RATE)
    max_weight: float | None = setting(None, number(above=0, nullable=True), MAX_WEIGHT)

    def weights(self, levels: Levels) -> list[float]:
        refuse_flow(self, levels)
        return capped(single_shot(levels), self.weight_scale, self.max_weight)

    def corrections(self, levels: Levels) -> list[float] | None:
        return capped(stepwise(levels), self.correction_scale, self.max_weight) if self.correction_scale else None
