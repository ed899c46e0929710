"""Diffusion-DPO: Wallace et al., "Diffusion Model Alignment Using Direct Preference Optimization", CVPR 2024."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_aligner_diffusion.algorithms.base import setting
from nemo_aligner_diffusion.algorithms.preference.base import Levels, PreferenceMethod
from nemo_aligner_diffusion.settings import number


@dataclass(frozen=True)
class DPO(PreferenceMethod):
    """Every noise level counts alike: ``w_t = 1/2``, so that the loss is ``−log σ(−β/2·(Δ^w − Δ^l))``.

    As the authors' code has it: ``−0.5·β·(model_diff − ref_diff)``, errors averaged over the elements of a latent.
    Their settings: β 5000, 2,000 steps of 2,048 pairs, the rate 1e-8 for each pair of a batch.
    """

    name = "dpo"
    title = "Diffusion-DPO"
    source = "arXiv 2311.12908"

    beta: float = setting(5000.0, number(above=0), "β, scale of the argument −β/2·(Δ^w − Δ^l); > 0; published: 5000")

    def weights(self, levels: Levels) -> list[float]:
        return [0.5] * levels.size
