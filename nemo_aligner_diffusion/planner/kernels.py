"""What a GPU does differently from the CPU on which a plan is counted: attention, and autocast's float32 list."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

FLASH_HEAD_DIM = 256  # the largest head that FlashAttention-2 takes


@contextmanager
def gpu_kernels() -> Iterator[None]:
    """Within, networks call what PyTorch picks on a CUDA device, whatever the device of their tensors.

    Attention: FlashAttention for 16-bit inputs without a mask and heads of up to 256, else the memory-efficient kernel;
    neither holds the L × L scores. Under autocast, normalisations compute in float32, as on CUDA (the CPU's autocast
    leaves them in 16 bits).

    ``torch.nn.functional`` is changed for that while the context lasts: a ``TorchFunctionMode`` would not see what
    activation checkpointing recomputes inside a backward pass.
    """
    replaced: dict[str, Callable[..., Tensor]] = {
        "scaled_dot_product_attention": _attention,
        "group_norm": partial(_in_float32, functional.group_norm),
        "layer_norm": partial(_in_float32, functional.layer_norm),
    }
    kept = {name: getattr(functional, name) for name in replaced}
    for name, function in replaced.items():
        setattr(functional, name, function)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(functional, name, function)


def _in_float32(normalise: Callable[..., Tensor], input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return normalise(input.float() if torch.is_autocast_enabled("cpu") else input, *args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    aten = torch.ops.aten
    if torch.is_autocast_enabled("cpu"):  # these operators are below autocast
        low = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(low), key.to(low), value.to(low)
        attn_mask = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask.to(low)
    if enable_gqa:
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    given = (query, key, value)
    half = query.dtype in (torch.float16, torch.bfloat16)
    if half and attn_mask is None and query.shape[-1] <= FLASH_HEAD_DIM:
        return aten._scaled_dot_product_flash_attention(*given, dropout_p, is_causal, False, scale=scale)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(*given, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
