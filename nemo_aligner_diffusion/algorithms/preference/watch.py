"""What a run that learns from pairs is watched for. Imports no torch: the report reads the same rule."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, variance

WINDOW = 20  # optimizer steps of each of the two windows that are compared


def both_rise(winner: Sequence[float], loser: Sequence[float]) -> bool:
    """The known disease of DPO: the tuned model denoises losers *and* winners worse and worse.

    Args:
        winner, loser: ``d_θ − d_ref`` of each optimizer step, finite.

    Returns:
        whether the mean of both over the last 20 steps is above 0, and above that of the 20 steps before by more than
        two standard errors.
    """

    def rises(values: Sequence[float]) -> bool:
        if len(values) < 2 * WINDOW:
            return False
        before, after = values[-2 * WINDOW : -WINDOW], values[-WINDOW:]
        error = ((variance(before) + variance(after)) / WINDOW) ** 0.5
        return fmean(after) > 0 and fmean(after) - fmean(before) > 2 * error

    return rises(winner) and rises(loser)
