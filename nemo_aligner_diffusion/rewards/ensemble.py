"""Several judges of the same thing, trusted only as far as they agree: a guard against over-optimisation.

What fools one network seldom fools others. The conservative aggregates follow Coste et al. 2023 (arXiv 2310.02743,
"Reward model ensembles help mitigate overoptimization"): the worst judge's score, or the mean less a penalty on the
judges' disagreement (there the variance, here the standard deviation, which has the scores' own unit).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_aligner_diffusion.rewards.parts import PartedSettings
from nemo_aligner_diffusion.settings import choice, number, setting

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Ensemble(PartedSettings):
    """One score of several judges', which must be comparable: of models of one kind, or normalised.

    ``min`` has the gradient of the worst judge alone; the standard deviation of ``mean_minus_std`` is that over the
    judges (population).
    """

    name = "ensemble"
    least = 2
    part_keys = ("normalize", "clip", "clip_mode")

    aggregate: str = setting(
        "mean_minus_std",
        choice("mean", "min", "mean_minus_std"),
        "mean, min, or mean_minus_std: the mean less std_weight times the judges' deviation",
    )
    std_weight: float = setting(1.0, number(0), "λ of mean_minus_std; >= 0")

    def combine(self, scores: Sequence[Tensor]) -> Tensor:
        import torch

        stacked = torch.stack(list(scores))
        if self.aggregate == "min":
            # NaN wins in amin, as it should; ties share the gradient.
            return stacked.amin(dim=0)
        mean = stacked.mean(dim=0)
        if self.aggregate == "mean":
            return mean
        # The root of a variance of 0 has no slope: judges that agree exactly would give NaN gradients.
        spread = (stacked.var(dim=0, correction=0) + 1e-12).sqrt()
        return mean - self.std_weight * spread
