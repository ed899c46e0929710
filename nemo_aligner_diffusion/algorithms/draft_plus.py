"""DRaFT+: DRaFT-K with a KL term against the frozen model (NVIDIA NeMo-Aligner user guide, "DRaFT+")."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_aligner_diffusion.algorithms.base import setting
from nemo_aligner_diffusion.algorithms.draft_k import TRUNCATION_MEANING, TRUNCATION_STEPS, DRaFTK
from nemo_aligner_diffusion.settings import integer


@dataclass(frozen=True)
class DRaFTPlus(DRaFTK):
    """The last K steps are supervised, with a KL term to the base model; the reward reads the finished picture.

    The term is every method's (``model.kl_coeff``, ``model.kl_space``). The KL of two Gaussians of equal covariance is
    the squared distance of their means, which for one sampler step from the same latent is proportional to that of the
    predictions: design notes 3.3. NeMo-Aligner's own defaults: ``kl_coeff`` 1.0 and one step, its documented commands
    0.2; its code reads ``x0``.
    """

    name = "draft+"
    title = "DRaFT+"
    source = "NVIDIA NeMo-Aligner"
    option = "draft_plus"

    truncation_steps: int = setting(5, integer(1), TRUNCATION_MEANING, key=TRUNCATION_STEPS)
