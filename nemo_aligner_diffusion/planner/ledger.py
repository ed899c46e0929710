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
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

aten = torch.ops.aten


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


# PyTorch has no formula for its attention kernel on the CPU; these are the ones of its CUDA kernels. Of shapes, as
# FlopCounterMode(custom_mapping=…) takes them.
CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
_FLOPS = {**flop_registry, **{operator: shape_wrapper(formula) for operator, formula in CPU_ATTENTION.items()}}
_COLLECTIVE_SPACES = ("c10d", "_c10d_functional", "c10d_functional")
# operator names start with -> what it is called here; waits and barriers move nothing to speak of
COLLECTIVES = {
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "broadcast": "broadcast",
}


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
        held: bytes alive when the phase ended.
        collectives: calls by kind.
    """

    ops: Counter[Op] = field(default_factory=Counter)
    peak: int = 0
    held: int = 0
    collectives: Counter[Collective] = field(default_factory=Counter)

    @property
    def flops(self) -> int:
        return sum(op.flops * count for op, count in self.ops.items())

    @property
    def moved(self) -> int:
        return sum(op.moved * count for op, count in self.ops.items())

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
        self._sizes: dict[int, int] = {}  # storage's address -> its bytes
        self._watched: dict[int, Any] = {}  # storage's address -> weak reference to it
        self._known: set[int] = set()
        for tensor in known:
            self._known.add(tensor.untyped_storage()._cdata)

    @contextmanager
    def phase(self) -> Iterator[Record]:
        """What happens inside, counted on its own."""
        outer, record = self.current, Record(peak=self.live)
        self.current = record
        try:
            yield record
        finally:
            record.held = self.live
            self.current = outer
            outer.ops.update(record.ops)
            outer.collectives.update(record.collectives)
            outer.peak = max(outer.peak, record.peak)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace in _COLLECTIVE_SPACES:
            self._collective(func, args, kwargs)
            return out
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for result in results:
            self._follow(result)
        if not func.is_view and results:
            self._count(func, args, kwargs, out, results)
        return out

    def __enter__(self) -> Any:
        self._resize = torch.UntypedStorage.resize_
        ledger, resize = self, self._resize

        def resize_(storage: Any, size: int) -> Any:  # how FSDP2 frees and takes back what it gathered
            result = resize(storage, size)
            ledger._resized(storage)
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*exception)

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes or key in self._known:
            return

        def freed(_: Any) -> None:
            self.live -= self._sizes.pop(key)
            del self._watched[key]

        self._watched[key] = weakref.ref(storage, freed)
        self._sizes[key] = 0
        self._resized(storage)

    def _resized(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._sizes:
            size = storage.nbytes()
            self.live += size - self._sizes[key]
            self._sizes[key] = size
            self.current.peak = max(self.current.peak, self.live)

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, results: list[Tensor]) -> None:
        packet = func._overloadpacket
        name = packet._qualified_op_name
        if name.startswith(("aten::empty", "aten::new_empty", "aten::lift_fresh", "aten::_unsafe_view", "prim::")):
            return
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        formula = _FLOPS.get(packet)
        flops = int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0
        moved = sum(_bytes(tensor) for tensor in given) + sum(_bytes(tensor) for tensor in results)
        floating = next((tensor.dtype for tensor in given if tensor.is_floating_point()), torch.float32)
        self.current.ops[Op(_kind(name, flops), str(floating).removeprefix("torch."), flops, moved)] += 1

    def _collective(self, func: Any, args: Any, kwargs: Any) -> None:
        name = func._overloadpacket._qualified_op_name.partition("::")[2].strip("_")
        sizes = [_bytes(leaf) for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        for known, plain in COLLECTIVES.items():
            if name.startswith(known):
                # the whole of what is gathered or scattered stands beside the part of one rank
                size = max(sizes) if plain != "all_reduce" else sum(sizes)
                group = _group_name(func, args, kwargs)
                self.current.collectives[Collective(plain, self.groups.get(group, group), size)] += 1
                return


def _group_name(func: Any, args: Any, kwargs: Any) -> str:
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    if "process_group" in given:
        return str(dist.ProcessGroup.unbox(given["process_group"]).group_name)
    return str(given["group_name"])


def _bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _kind(name: str, flops: int) -> str:
    if not flops:
        return "cast" if name == "aten::_to_copy" else "other"
    if "attention" in name:
        return "attention"
    return "conv" if "conv" in name else "matmul"
