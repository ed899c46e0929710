"""Where the pieces of a parameter are: cut over the tensor group, sharded over the data group, or whole everywhere.

Tensor parallelism leaves plain tensors that are smaller than the parameter, and notes on the module how they were cut;
FSDP2 makes a ``DTensor`` of what is left. Both are undone here, so that whoever needs whole tensors (checkpoints,
export, averages, tests) needs to know of neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

CUTS = "tensor_cuts"  # attribute of a module with cut parameters: parameter name -> TensorCut
GROUP = "tensor_group"  # and the group over which they are cut
PARTIAL = "tensor_partial"  # of a module that each rank calls for its own part of the heads


@dataclass(frozen=True)
class TensorCut:
    """How a parameter is cut over a tensor-parallel group of N ranks.

    Attributes:
        dim: the dimension that is cut into N equal parts.
        blocks: the dimension is this many equal blocks, each of which is cut into N parts, and a rank holds its part of
            every block one after the other (2: a gated feed-forward, whose value and gate are one weight); or the
            proportions of unequal blocks, in lowest terms.
    """

    dim: int
    blocks: int | tuple[int, ...] = 1

    @property
    def _shares(self) -> tuple[int, ...]:
        return (1,) * self.blocks if isinstance(self.blocks, int) else self.blocks

    def take(self, full: Tensor, rank: int, size: int) -> Tensor:
        """The part of ``full`` that ``rank`` of ``size`` holds, contiguous.

        Raises:
            ValueError: the dimension does not divide by ``blocks * size``.
        """
        if full.shape[self.dim] % (sum(self._shares) * size):
            raise ValueError(
                f"dimension {self.dim} of a tensor of shape {tuple(full.shape)} cannot be cut into "
                f"{sum(self._shares)} × {size} equal parts"
            )
        parts = [block.chunk(size, self.dim)[rank] for block in self._split(full)]
        return torch.cat(parts, self.dim)

    def join(self, parts: list[Tensor]) -> Tensor:
        """The whole tensor from the parts of all ranks, in rank order."""
        blocks = [self._split(part) for part in parts]
        return torch.cat([rank[number] for number in range(len(self._shares)) for rank in blocks], self.dim)

    def _split(self, value: Tensor) -> tuple[Tensor, ...]:
        unit = value.shape[self.dim] // sum(self._shares)
        return value.split([share * unit for share in self._shares], self.dim)


@dataclass(frozen=True)
class Placement:
    """How one parameter, and whatever has its shape (gradient, moments, average), is laid out.

    Attributes:
        cut: over the tensor group; ``None``: whole on each of its ranks.
        tensor_group: the process group; ``None`` where nothing is cut.
        partial: whole on each rank, but its gradient is the sum of theirs (``Parallelism.average_gradients``).
    """

    cut: TensorCut | None = None
    tensor_group: Any = None
    partial: bool = False

    def full(self, value: Tensor) -> Tensor:
        """The whole tensor, plain and detached, on every rank; a collective call where it is cut or sharded."""
        value = value.detach()
        if is_sharded(value):
            value = value.full_tensor()  # type: ignore[attr-defined]
        if self.cut is None:
            return value
        value = value.contiguous()
        parts = [torch.empty_like(value) for _ in range(dist.get_world_size(self.tensor_group))]
        dist.all_gather(parts, value, group=self.tensor_group)
        return self.cut.join(parts)

    def local(self, full: Tensor, like: Tensor) -> Tensor:
        """The piece of ``full`` that belongs on this rank, laid out and typed as ``like``; no communication.

        Args:
            full: the whole tensor, plain, on any device.
            like: the parameter (or what is laid out as it): a plain tensor or a ``DTensor``.
        """
        if self.cut is not None:
            rank, size = dist.get_rank(self.tensor_group), dist.get_world_size(self.tensor_group)
            full = self.cut.take(full, rank, size)
        if tuple(full.shape) != tuple(like.shape):
            raise ValueError(f"a tensor of shape {tuple(full.shape)} does not fit one of {tuple(like.shape)}")
        piece = full.detach().to(dtype=like.dtype)
        if not is_sharded(like):
            return piece.to(like.device).clone()
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            _shard(piece, like).to(like.device),
            like.device_mesh,  # type: ignore[attr-defined]
            like.placements,  # type: ignore[attr-defined]
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )


def placements(root: nn.Module) -> dict[str, Placement]:
    """The placement of every parameter below ``root``, by name."""
    found: dict[str, Placement] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        cuts, group = getattr(module, CUTS, {}), getattr(module, GROUP, None)
        for name, _ in module.named_parameters(recurse=False):
            place = Placement(cuts[name], group) if name in cuts else Placement(partial=hasattr(module, PARTIAL))
            found[f"{path}.{name}" if path else name] = place
    return found


def local_part(value: Tensor) -> Tensor:
    """What this rank holds of it, sharing its memory; a plain tensor as it is."""
    return value.to_local() if is_sharded(value) else value  # type: ignore[attr-defined]


def is_sharded(value: Tensor) -> bool:
    """Whether FSDP2 holds a part of it here (a ``DTensor``)."""
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def _shard(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's piece of what is already cut for its tensor rank, along the data mesh of ``like``."""
    mesh, (placement,) = like.device_mesh, like.placements  # type: ignore[attr-defined]
    # FSDP2 deals out rows as torch.chunk does; the last ranks may hold fewer, or none
    chunks = whole.chunk(mesh.size(), placement.dim)
    rank = mesh.get_local_rank()
    piece = chunks[rank] if rank < len(chunks) else whole.narrow(placement.dim, 0, 0)
    return piece.contiguous().clone()
