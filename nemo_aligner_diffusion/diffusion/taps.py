"""How a pipeline is tapped without a change to it: proxies, recomputation, and gradients that values do not show."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.checkpoint import checkpoint


class Proxy:
    """Everything of ``target`` but the ``overrides``; ``isinstance`` sees the target's class."""

    def __init__(self, target: Any, overrides: dict[str, Any]) -> None:
        self.__dict__.update(_target=target, _overrides=overrides)

    @property  # type: ignore[misc]  # pipelines ask for the class of their parts
    def __class__(self) -> Any:
        return type(self._target)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._overrides["__call__"](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        overrides = self.__dict__["_overrides"]
        return overrides[name] if name in overrides else getattr(self.__dict__["_target"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._target, name, value)


def in_place_of(original: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with the signature of ``original``: pipelines look whether ``step`` takes ``eta``, ``generator``."""
    return functools.wraps(original)(lambda *args, **kwargs: function(*args, **kwargs))


def undecorated(cls: type) -> Callable[..., Any]:
    """A pipeline's ``__call__`` without torch's ``no_grad`` wrapper (others stay)."""
    call: Any = cls.__call__
    while getattr(getattr(call, "__code__", None), "co_name", "") == "decorate_context":
        call = call.__wrapped__
    return call


def detached(tree: Any) -> Any:
    return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, tree)


def shared(tree: Any, factor: float) -> Any:
    """Every tensor of ``tree`` with its value and ``factor`` times its gradient."""
    if factor == 1.0:
        return tree
    if factor == 0.0:
        return detached(tree)
    return tree_map(lambda x: share(x, factor) if isinstance(x, Tensor) and x.requires_grad else x, tree)


def share(tensor: Tensor, factor: float) -> Tensor:
    """``α x + (1 − α) sg[x]`` whose value is that of ``x`` to the bit."""
    return _Share.apply(tensor, factor)


def connect(estimate: Tensor, value: Tensor) -> Tensor:
    """``ẑ + sg[z − ẑ]`` whose value is that of ``z`` to the bit."""
    return _Connect.apply(estimate, value.detach())


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


class _Connect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, estimate: Tensor, value: Tensor) -> Tensor:
        ctx.dtype = estimate.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None


def recomputed(network: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any, handle: Tensor) -> Any:
    """``call(*args, **kwargs)`` that keeps its inputs and output only, and is made again in its own backward pass.

    Reentrant: each call has a backward pass of its own, which adds to the parameters' gradients. In one pass through
    all calls autograd would sum every parameter's gradient beside what ``grad`` holds already, and whole where FSDP2
    shards it, until the earliest call has added its share.

    Args:
        network: whose attention processors are put back if the pipeline has taken them out since (PAG does).
        handle: a tensor with gradient: a reentrant checkpoint needs one, and latents may have none.

    Raises:
        RuntimeError: in the backward pass, if the second call gives another output: state has changed in between.
    """
    leaves, spec = tree_flatten((args, kwargs))
    inputs = [j for j, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
    processors: Any = getattr(network, "attn_processors", None)
    first: list[Any] = []

    def again(_: Tensor, *tensors: Tensor) -> tuple[Any, ...]:
        given = dict(zip(inputs, tensors, strict=True))
        a, k = tree_unflatten([given.get(j, x) for j, x in enumerate(leaves)], spec)
        with processors_of(network, processors):
            flat, out_spec = tree_flatten(call(*a, **k))
        if not first:
            first[:] = detached(flat), out_spec
        elif not all(_close(x, y) for x, y in zip(flat, first[0], strict=True) if isinstance(x, Tensor)):
            raise RuntimeError(
                f"{type(network).__name__}, recomputed in the backward pass, gives another output than in the forward "
                f"pass: its state has changed since, and the gradient would be wrong"
            )
        return tuple(flat)

    flat = checkpoint(
        again, handle, *[leaves[j] for j in inputs], use_reentrant=True, preserve_rng_state=network.training
    )
    return tree_unflatten(list(flat), first[1])


def called_in_mode(network: nn.Module, classes: Collection[str], gradient: bool, *args: Any, **kwargs: Any) -> Any:
    """``network(*args, **kwargs)`` in evaluation mode, but for modules that have no gradient in it.

    Args:
        classes: names of these modules' classes; they are in training mode where ``gradient`` is wanted.
    """
    before = [(module, module.training) for module in network.modules()]
    dropping = network.training  # adapters' dropout goes on
    for module, _ in before:
        declared = gradient and any(kind.__name__ in classes for kind in type(module).__mro__)  # FSDP2 derives from it
        module.training = declared or (dropping and isinstance(module, nn.Dropout))
    try:
        return network(*args, **kwargs)
    finally:
        for module, training in before:
            module.training = training


def _close(again: Tensor, first: Tensor) -> bool:
    # generous: other kernels may be chosen the second time; a lost cache or another mode is far beyond
    return torch.allclose(
        again, first, rtol=0.05, atol=0.01 * float(first.nan_to_num(0, 0, 0).abs().max()), equal_nan=True
    )


@contextlib.contextmanager
def processors_of(network: Any, wanted: dict[str, Any] | None) -> Iterator[None]:
    """Inside, ``network`` has attention processors of the ``wanted`` kinds."""
    own = network.attn_processors if wanted else None
    changed = own is not None and [type(p) for p in own.values()] != [type(p) for p in (wanted or {}).values()]
    if changed:
        network.set_attn_processor(dict(wanted or {}))
    try:
        yield
    finally:
        if changed:
            network.set_attn_processor(dict(own or {}))


def any_gradient(tree: Iterable[Any]) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(tree))


@contextlib.contextmanager
def quiet_pipeline() -> Iterator[None]:
    """Pipelines warn of each truncated prompt in each call; they are counted, and said once at the end."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def no_autocast_cache() -> Iterator[None]:
    """Weights that autocast has converted without gradient, in an earlier call, would be taken again."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
