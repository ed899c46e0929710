"""Tensors that have shapes and no memory, beside real ones whose values pipelines look at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
_CONSTANTS = (aten.arange, aten.full, aten.linspace, aten.ones, aten.scalar_tensor, aten.zeros)
_FEW = 2**16  # elements


class ShapesMode(FakeTensorMode):
    """PyTorch's fake tensors, but small constants, and what is computed of such alone, are real.

    What pipelines look at the values for is numbers of tokens, by which they cut prompts, and noise levels. Both come
    from constants and from what the tokenizer gave, which is real too (:class:`.networks.FixedLengthTokenizer`).
    Weights and noise have no values, nor has what has met them.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if tensors and all(map(_is_real, tensors)):
            return func(*args, **kwargs)
        if any(map(_is_elsewhere, tensors)):
            args, kwargs = tree_map(self._on_cpu, (args, kwargs))
        if func is aten.index.Tensor:
            args = (args[0], [place for index in args[1] for place in _places(index)])
        out: Any = super().__torch_dispatch__(func, types, args, kwargs)
        if not tensors and func.overloadpacket in _CONSTANTS and out.numel() <= _FEW:
            return func(*args, **kwargs)
        return out

    def _on_cpu(self, leaf: Any) -> Any:
        """A tensor of the meta device that no module lists (positions of Lumina 2's rotations), as a fake one."""
        if not isinstance(leaf, Tensor) or not _is_elsewhere(leaf):
            return leaf
        options = {"dtype": leaf.dtype, "device": torch.device("cpu")}
        return super().__torch_dispatch__(aten.empty.memory_format, (), (list(leaf.shape),), options)


def _is_elsewhere(tensor: Tensor) -> bool:
    return not isinstance(tensor, FakeTensor) and tensor.is_meta


def _is_real(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta


def _places(index: Tensor | None) -> tuple[Tensor | None, ...]:
    """A real mask as the places where it is true: how many these are is a shape."""
    if index is None or index.dtype != torch.bool or not _is_real(index):
        return (index,)
    return index.nonzero().unbind(1)


def without_memory(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replace a module's tensors, real ones or the meta device's, by fake CPU tensors of ``mode``.

    (Built on the meta device first: peft and ``Module.to`` cannot convert fake tensors.)
    """
    made: dict[int, Tensor] = {}  # tied weights stay tied

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with mode:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in list(tensors.items()):
                if tensor is not None:
                    tensors[name] = fake(tensor)  # type: ignore[assignment]


@contextmanager
def convertible(module: nn.Module) -> Iterator[None]:
    """Within, ``module.to(dtype)`` works on fakes, which PyTorch's own refuses; afterwards all is as before."""
    kept = [(part, name, p) for part in module.modules() for name, p in part._parameters.items() if p is not None]

    def to(dtype: torch.dtype | None = None) -> None:
        for part, name, p in kept:
            part._parameters[name] = p if dtype in (None, p.dtype) else nn.Parameter(p.to(dtype), requires_grad=False)

    module.to = to  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del module.to
        to()
