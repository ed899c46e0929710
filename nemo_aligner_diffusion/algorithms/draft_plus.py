"""DRaFT+: DRaFT-K with a KL term against the frozen model (NVIDIA NeMo-Aligner user guide, "DRaFT+")."""

from __future__ import annotations

from nemo_aligner_diffusion.algorithms.reward_tuning import RewardTuning


class DRaFTPlus(RewardTuning):
    """DRaFT-K whose ``kl_coeff`` is above 0: the plan is :class:`~.draft.LastSteps`, the term is every plan's.

    The KL of two Gaussians of equal covariance is the squared distance of their means, which for one sampler step
    from the same latent is proportional to that of the predictions: design notes 3.3.
    """
