"""float64 all the way through a pipeline, for finite differences."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _Float64ForFloat32(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()

        def wide(x: Any) -> Any:
            return torch.float64 if x is torch.float32 or x is torch.bfloat16 else x

        return func(*map(wide, args), **{name: wide(x) for name, x in (kwargs or {}).items()})


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """Inside, what code casts to float32 or bfloat16 becomes float64.

    Norms, rotary embeddings and the schedulers' steps cast to float32 even in a float64 pipeline, Kandinsky 5 its
    queries to bfloat16. float32's rounding, 1e-7, divided by a finite difference's step, hides errors of a gradient
    below 1e-4 or so (Sana: 1e-2). Not for Z-Image (asserts float32) and UniPC (solves a float32 system). A forward
    pass recomputed by ``backward`` is not inside: torch runs backward passes without function modes.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64ForFloat32():
            yield
    finally:
        torch.set_default_dtype(default)
