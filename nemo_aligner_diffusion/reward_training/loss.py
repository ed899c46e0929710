"""The loss of preference training, and what is counted beside it."""

from __future__ import annotations

import torch
from torch import Tensor


def preference_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """``KL(label ‖ softmax(scores))`` of each pair: soft-label cross-entropy minus the label's entropy.

    Kirstain et al., 2023 (PickScore, arXiv 2305.01569), section 3, where a tie is the label ``(0.5, 0.5)``. The entropy
    does not depend on the model; subtracting it makes 0 the minimum for every label, a tie's too, so that curves of
    sets with different shares of ties compare.

    Args:
        scores: ``(B, 2)``, ``exp(logit_scale)·cos`` of each picture with the prompt.
        labels: ``(B, 2)``, not negative, rows summing to 1.

    Returns:
        ``(B,)``, at least 0 (to rounding), in the scores' dtype.
    """
    return torch.nn.functional.kl_div(scores.log_softmax(dim=1), labels.to(scores.dtype), reduction="none").sum(dim=1)


def decided(labels: Tensor) -> Tensor:
    """``(B,)`` bool: pairs with a preference, all that are no ties."""
    return (labels[:, 0] - labels[:, 1]).abs() > 1e-6


def correct(scores: Tensor, labels: Tensor) -> Tensor:
    """``(B,)``: 1 where the preferred picture scores higher, 0 where the other does, 0.5 for equal scores.

    Of use where :func:`decided`; a tie has no preferred picture.
    """
    ahead = (scores[:, 0] - scores[:, 1]).sign() * (labels[:, 0] - labels[:, 1]).sign()
    return (ahead + 1) / 2
