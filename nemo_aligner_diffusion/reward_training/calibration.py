"""How well scores predict preferences: accuracy, ties, calibration.

The predicted probability that the first picture is preferred is ``softmax(scores)[0]``. Its *confidence* is that of the
picture it prefers, in ``[0.5, 1]``. Scores are calibrated where of all pairs judged with confidence 0.8, 80 % are right
(Guo et al., 2017, arXiv 1706.04599, equation 3: expected calibration error over bins of equal width).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_aligner_diffusion.errors import DataError
from nemo_aligner_diffusion.reward_training.loss import correct, decided, preference_loss


@dataclass(frozen=True)
class Bin:
    """Pairs whose confidence lies in ``[low, high)`` (the last bin includes 1)."""

    low: float
    high: float
    pairs: int
    confidence: float  # mean; NaN where there is no pair
    accuracy: float


@dataclass(frozen=True)
class PreferenceFigures:
    """Figures of one set of pairs.

    Attributes:
        pairs, ties: counts; ``pairs`` includes the ties.
        accuracy: share of the other pairs whose preferred picture scores higher (equal scores count half); NaN where
            all are ties.
        loss: mean :func:`.preference_loss`, ties included.
        calibration_error: expected calibration error of the pairs that are no ties, 0…0.5; NaN without any.
        mean_confidence: of these pairs.
        tie_gap: mean ``|p − 0.5|`` on ties, 0 where every tie is predicted as one; NaN without ties.
        bins: the reliability plot.
    """

    pairs: int
    ties: int
    accuracy: float
    loss: float
    calibration_error: float
    mean_confidence: float
    tie_gap: float
    bins: tuple[Bin, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: NaN as None."""
        return _without_nan(asdict(self))


def preference_figures(scores: Tensor, labels: Tensor, bins: int = 10) -> PreferenceFigures:
    """Figures of scores and labels ``(N, 2)``, in float64.

    Raises:
        DataError: there is no pair, or a score is not finite.
    """
    scores, labels = scores.double(), labels.double()
    if not len(scores):
        raise DataError("there is no pair to judge; expected at least one")
    if not torch.isfinite(scores).all():
        bad = int((~torch.isfinite(scores)).any(1).sum())
        raise DataError(
            f"{bad} of {len(scores)} pairs have a score that is NaN or infinite: the model is damaged, or overflows in "
            "its precision (try 32)"
        )
    sure = decided(labels)
    probability = scores.softmax(dim=1)
    right = correct(scores, labels)[sure]
    confidence = probability.max(dim=1).values[sure]
    table, error = [], 0.0
    index = ((confidence - 0.5) * 2 * bins).long().clamp(0, bins - 1)
    for number in range(bins):
        mine = index == number
        count = int(mine.sum())
        mean = float(confidence[mine].mean()) if count else float("nan")
        share = float(right[mine].mean()) if count else float("nan")
        if count:
            error += count / len(right) * abs(share - mean)
        table.append(Bin(0.5 + number / (2 * bins), 0.5 + (number + 1) / (2 * bins), count, mean, share))
    none = not len(right)
    return PreferenceFigures(
        pairs=len(scores),
        ties=int((~sure).sum()),
        accuracy=float("nan") if none else float(right.mean()),
        loss=float(preference_loss(scores, labels).mean()),
        calibration_error=float("nan") if none else error,
        mean_confidence=float("nan") if none else float(confidence.mean()),
        tie_gap=float((probability[~sure, 0] - 0.5).abs().mean()),
        bins=tuple(table),
    )


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and value != value else value
