"""Diffusion-DPO under a discount over sampling steps: the dense-reward view (Yang et al., 2024, arXiv 2402.08265)."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_aligner_diffusion.algorithms.base import setting
from nemo_aligner_diffusion.algorithms.preference.base import Levels, PreferenceMethod
from nemo_aligner_diffusion.settings import Kind, integer, number


@dataclass(frozen=True)
class Discounted(PreferenceMethod):
    """As Diffusion-DPO, weighted towards the noisy end: ``w_t = 1/2·γ^{(T_train−1−t)/T_train·T}``."""

    name = "discounted"
    title = "Discounted DPO"
    source = "arXiv 2402.08265"

    beta: float = setting(
        70000.0,
        number(above=0),
        "β, scale of the argument; > 0; 70000·w_t is Diffusion-DPO's 2500 at the middle noise level",
    )
    gamma: float = setting(
        0.9, Kind("float", low=0, high=1, open_low=True, open_high=True), "γ, discount of a sampling step; in (0, 1)"
    )
    horizon: int = setting(50, integer(1), "T, sampling steps that the noise levels stand for; integer >= 1")

    def weights(self, levels: Levels) -> list[float]:
        size = levels.size
        return [0.5 * self.gamma ** ((size - 1 - t) / size * self.horizon) for t in range(size)]
