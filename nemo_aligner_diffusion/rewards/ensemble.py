"""Several judges of the same thing, trusted only as far as they agree: a guard against over-optimisation.

What fools one network seldom fools others. The conservative aggregates follow Coste et al. 2023 (arXiv 2310.02743,
"Reward model ensembles help mitigate overoptimization"): the worst judge's score, or the mean less a penalty on the
judges' disagreement (there the variance, here the standard deviation, which has the scores' own unit).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nemo_aligner_diffusion.errors import RewardError
from nemo_aligner_diffusion.rewards.base import Reward
from nemo_aligner_diffusion.rewards.parts import Part, PartedReward

AGGREGATES = ("mean", "min", "mean_minus_std")


class EnsembleReward(PartedReward):
    """One score of several judges'.

    The judges' scores must be comparable: of models of one kind, or normalised (:class:`~.parts.Shaping`).

    Args:
        parts: the judges, by name.
        aggregate: ``mean``; ``min``, which has the gradient of the worst judge alone; or ``mean_minus_std``, the mean
            less ``std_weight`` times the standard deviation over the judges (population).
        std_weight: λ of ``mean_minus_std``; at least 0.
        label: this reward's place in the configuration.
    """

    name = "ensemble"

    def __init__(
        self,
        parts: Mapping[str, Reward | Part],
        aggregate: str = "mean_minus_std",
        std_weight: float = 1.0,
        label: str = "rm",
    ) -> None:
        if aggregate not in AGGREGATES:
            raise RewardError(f"An ensemble's aggregate is {aggregate!r}; known are {', '.join(AGGREGATES)}.")
        if not 0 <= std_weight < math.inf:
            raise RewardError(f"An ensemble's std_weight is {std_weight}; expected a number >= 0.")
        super().__init__({name: part if isinstance(part, Part) else Part(part) for name, part in parts.items()}, label)
        self.aggregate = aggregate
        self.std_weight = std_weight

    def combine(self, scores: Sequence[Tensor]) -> Tensor:
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
