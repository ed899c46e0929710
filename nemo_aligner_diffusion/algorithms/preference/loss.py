"""The loss of a pair and what is said of it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, variance

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

DISEASE = 20  # optimizer steps of each of the two windows that are compared


def preferred_share(labels: Tensor, smoothing: float) -> Tensor:
    """The label of the winner ``p``, ``(B,)``: the greater of a pair's shares, ``(1−s)·p + s·(1−p)`` when smoothed.

    Args:
        labels: ``(B, 2)``, not negative, rows summing to 1.
        smoothing: ``s``, the probability that a label is wrong (conservative DPO).
    """
    share = labels.amax(1)
    return (1 - smoothing) * share + smoothing * (1 - share)


def pair_loss(argument: Tensor, share: Tensor) -> Tensor:
    """``−p log σ(a) − (1−p) log σ(−a)``, ``(B,)``; of a hard label ``−log σ(a)``."""
    return -(share * logsigmoid(argument) + (1 - share) * logsigmoid(-argument))


def pull(argument: Tensor, share: Tensor) -> Tensor:
    """``−∂loss/∂a = p − σ(a)``; of a hard label ``σ(−a)``."""
    return share - torch.sigmoid(argument)


def both_rise(winner: Sequence[float], loser: Sequence[float]) -> bool:
    """The known disease of DPO: the tuned model denoises losers *and* winners worse and worse.

    Args:
        winner, loser: ``d_θ − d_ref`` of each optimizer step, finite.

    Returns:
        whether the mean of both over the last 20 steps is above 0, and above that of the 20 steps before by more than
        two standard errors.
    """

    def rises(values: Sequence[float]) -> bool:
        if len(values) < 2 * DISEASE:
            return False
        before, after = values[-2 * DISEASE : -DISEASE], values[-DISEASE:]
        error = ((variance(before) + variance(after)) / DISEASE) ** 0.5
        return fmean(after) > 0 and fmean(after) - fmean(before) > 2 * error

    return rises(winner) and rises(loser)
