"""The loss of a pair and what is said of it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


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
