"""Running a reward's network over a batch in pieces, so that its activations don't set the memory peak."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemo_aligner_diffusion.errors import RewardError


def in_micro_batches(
    function: Callable[..., Tensor],
    *batched: Tensor,
    micro_batch_size: int | None = None,
    activation_checkpointing: bool = False,
) -> Tensor:
    """``function(*batched)``, evaluated on ``micro_batch_size`` rows at a time and put together again.

    Args:
        function: of tensors ``(B, …)``, giving ``(B, …)``, row by row independent, without randomness.
        batched: its arguments; all of the same length ``B``.
        micro_batch_size: rows at a time; ``None`` for all at once.
        activation_checkpointing: keep only the arguments for the backward pass and recompute ``function`` there, one
            piece at a time: peak memory then doesn't grow with ``B``.

    Raises:
        RewardError: less than one row at a time.
    """
    if micro_batch_size is not None and micro_batch_size < 1:
        raise RewardError(f"A reward's micro_batch_size is {micro_batch_size}; expected at least 1, or null for all.")
    rows = len(batched[0])
    run: Callable[..., Tensor] = function
    if activation_checkpointing and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in batched):

        def run(*parts: Tensor) -> Tensor:
            # Rewards hold no randomness of their own in evaluation mode, so the generator's state need not be kept.
            result: Tensor = checkpoint(function, *parts, use_reentrant=False, preserve_rng_state=False)
            return result

    size = micro_batch_size or max(rows, 1)
    pieces = zip(*(tensor.split(size) for tensor in batched), strict=True)
    return torch.cat([run(*parts) for parts in pieces])


@contextlib.contextmanager
def own_precision(device_type: str) -> Iterator[None]:
    """Autocast off: a reward computes in its own dtype, whatever precision the trainer wraps around it."""
    with torch.autocast(device_type, enabled=False):
        yield
