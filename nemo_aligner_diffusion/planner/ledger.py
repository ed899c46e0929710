"""Counts what torch does: floating-point operations, bytes moved, bytes alive, bytes communicated.

A :class:`Ledger` is a dispatch mode, so it sees every operator of forward and backward passes, on real tensors and on
fake ones (shapes without memory) alike. It follows each storage from the operator that made it until it is freed: the
greatest sum is the memory a step needs beyond what was there before, activations and temporaries together. What a
kernel allocates inside itself (workspaces) is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from nemo_aligner_diffusion.parallel.simulated import group_of

aten = torch.ops.aten

# PyTorch has no formulas for its attention kernel on the CPU; these are those of its CUDA kernels
if aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry:

    @register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu)
    def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    @register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu_backward)
    def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(gradient, query, key, value))


_COLLECTIVE_SPACES = ("c10d", "_c10d_functional", "c10d_functional")
# operator names start with -> what it is called here; waits and barriers move nothing to speak of
_COLLECTIVES = {
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "broadcast": "broadcast",
}
# operators that neither compute nor move anything
_FREE = ("aten::empty", "aten::new_empty", "aten::lift_fresh", "aten::_unsafe_view", "prim::")


@dataclass(frozen=True)
class Op:
    """One kind of operator call: what it computes and what it reads and writes."""

    kind: str  # matmul, conv, attention, cast or other
    arithmetic: str  # dtype name of its floating-point inputs
    flops: int
    moved: int  # bytes of inputs and outputs


@dataclass(frozen=True)
class Collective:
    """One kind of message: ``all_reduce``, ``all_gather``, … among the processes of a group."""

    kind: str
    group: str  # as the ledger was told to call it
    size: int  # bytes of the whole tensor that is reduced, gathered or scattered


@dataclass
class Record:
    """What a phase did.

    Attributes:
        ops: operator calls by kind, views left out.
        peak: the most bytes alive at one time, everything made since the ledger began and still held included.
        start: bytes alive when it began.
        collectives: calls by kind.
    """

    ops: Counter[Op] = field(default_factory=Counter)
    peak: int = 0
    start: int = 0
    collectives: Counter[Collective] = field(default_factory=Counter)

    @property
    def flops(self) -> int:
        return sum(op.flops * count for op, count in self.ops.items())

    @property
    def communicated(self) -> int:
        return sum(message.size * count for message, count in self.collectives.items())


class Ledger(TorchDispatchMode):
    """See the module.

    Args:
        known: tensors (weights) that were there before and do not count as made.
        groups: names of process groups -> what to call them.
    """

    def __init__(self, known: Iterable[Tensor] = (), groups: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.groups = groups or {}
        self.live = 0
        self.current = Record()
        self._known = {id(storage): storage for storage in map(Tensor.untyped_storage, known)}
        self._sizes: dict[int, int] = {}  # id of a storage -> its bytes
        self._watched: dict[int, Any] = {}  # id of a storage -> weak reference to it
        self._resizes = resizes_seen_by(self._resized)

    @contextmanager
    def phase(self) -> Iterator[Record]:
        """What happens inside, counted on its own."""
        self.current = Record(peak=self.live, start=self.live)
        try:
            yield self.current
        finally:
            self.current = Record()

    def __enter__(self) -> Any:
        self._resizes.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._resizes.__exit__(None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace in _COLLECTIVE_SPACES:
            self._collective(func, args, kwargs)
            return out
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for result in results:
            self._follow(result.untyped_storage())
        if not func.is_view and results:
            self._count(func, args, kwargs, out, results)
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)  # one object as long as the storage lives, whatever holds it
        if key in self._sizes or key in self._known:
            return

        def freed(_: Any) -> None:
            self.live -= self._sizes.pop(key)
            del self._watched[key]

        self._watched[key] = weakref.ref(storage, freed)
        self._sizes[key] = 0
        self._resized(storage)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._sizes:
            size = storage.nbytes()
            self.live += size - self._sizes[key]
            self._sizes[key] = size
            self.current.peak = max(self.current.peak, self.live)

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, results: list[Tensor]) -> None:
        name = func.name()
        if name.startswith(_FREE):
            return
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        formula = flop_registry.get(func.overloadpacket)
        flops = int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0
        moved = sum(map(_bytes, given)) + sum(map(_bytes, results))
        floating = next((tensor.dtype for tensor in given if tensor.is_floating_point()), torch.float32)
        self.current.ops[Op(_kind(name, flops), str(floating).removeprefix("torch."), flops, moved)] += 1

    def _collective(self, func: Any, args: Any, kwargs: Any) -> None:
        name = func.name().partition("::")[2].strip("_")
        kind = next((kind for start, kind in _COLLECTIVES.items() if name.startswith(start)), None)
        if kind is not None:
            sizes = [_bytes(leaf) for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            # the whole of what is gathered or scattered stands beside the part of one rank
            size = sum(sizes) if kind == "all_reduce" else max(sizes)
            group = group_of(func, args, kwargs)
            self.current.collectives[Collective(kind, self.groups.get(group, group), size)] += 1


@contextmanager
def resizes_seen_by(see: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Within, ``see`` is called with each storage whose size was changed, which is no operator.

    That is how FSDP2 frees what it gathered, and takes it back (torch 2.13); PyTorch tells nobody.
    """
    resize = torch.UntypedStorage.resize_

    def resize_(storage: Any, size: int) -> Any:
        result = resize(storage, size)
        see(storage)
        return result

    torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]


def _bytes(tensor: Tensor) -> int:
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def _kind(name: str, flops: int) -> str:
    if not flops:
        return "cast" if name.startswith("aten::_to_copy") else "other"
    if "attention" in name:
        return "attention"
    return "conv" if "conv" in name else "matmul"
