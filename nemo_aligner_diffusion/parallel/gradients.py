"""Gradients under any layout, averaged over replicas."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_aligner_diffusion.parallel.placements import is_sharded
from nemo_aligner_diffusion.runtime.health.progress import waiting

BUCKET_BYTES = 64 * 2**20  # of one all-reduce: large enough for the link's full speed, small beside the model


def average(tensors: Iterable[Tensor], group: Any) -> None:
    """Replace each tensor by its mean over ``group``, in place; few large messages instead of many small ones.

    Every rank must give tensors of the same shapes in the same order. Sums are made in the tensors' own dtype.
    """
    size = dist.get_world_size(group)
    if size == 1:
        return
    for bucket in _buckets([local_part(tensor) for tensor in tensors]):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        with waiting():  # the others' slowness is not this rank's work
            dist.all_reduce(flat, group=group)
        flat /= size
        for tensor, mean in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of it, sharing its memory; a plain tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.nbytes > BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
