"""How a pipeline is tapped without a change to it: proxies, recomputation, prompts that are encoded once, and gradients
that values do not show."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import logging
import operator
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.checkpoint import checkpoint

from nemo_aligner_diffusion.diffusion.plan import SamplingPath
from nemo_aligner_diffusion.errors import ConfigurationError

PLAIN = (type(None), Tensor, bool, int, float, str, torch.dtype, torch.device)  # values that carry no state
log = logging.getLogger(__name__)


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


@dataclass
class RecordedTrace:
    """See :class:`.plan.Trace`."""

    path: SamplingPath
    latents: list[Tensor] = field(default_factory=list)
    predictions: dict[int, Tensor] = field(default_factory=dict)

    connect = staticmethod(connect)
    share = staticmethod(share)


class PromptCache:
    """Outputs of frozen text encoders, kept prompt by prompt on the CPU: of each output what the pipeline reads of it.

    Each prompt is encoded alone: in a batch it rounds by what else is there. So its outputs are the same to the bit
    whatever it shares a batch with, and whether they are kept still; they differ from those of a batch by rounding.

    Args:
        most: prompts that are kept of each encoder; those that were not asked for longest are encoded again.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._kept: dict[str, OrderedDict[bytes, dict[tuple[Any, ...], Tensor]]] = {}
        self._forms: dict[tuple[str, str], Any] = {}  # of an encoder's output, by how it is called
        self._whole: set[str] = set()  # encoders whose calls cannot be taken apart
        self._said: set[str] = set()

    def __call__(self, name: str, encoder: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``encoder(*args, **kwargs)``, in which every tensor has a row for each prompt."""
        given, spec = tree_flatten((args, kwargs))
        batch = next((len(x) for x in given if isinstance(x, Tensor)), 0)
        by_rows = batch and all(x.shape[:1] == (batch,) and x.ndim == 2 for x in given if isinstance(x, Tensor))
        if name in self._whole or not by_rows or not all(isinstance(x, PLAIN) for x in given):
            return self._pass(name, encoder(*args, **kwargs), "is called with more than rows of tokens")
        device = next(x.device for x in given if isinstance(x, Tensor))
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        call = repr((spec, autocast, [x.dtype if isinstance(x, Tensor) else x for x in given]))
        rows = [[x[j : j + 1] if isinstance(x, Tensor) else x for x in given] for j in range(batch)]
        lists = [[x.tolist() for x in row if isinstance(x, Tensor)] for row in rows]
        keys = [hashlib.sha256(repr((call, values)).encode()).digest() for values in lists]
        fresh: dict[bytes, Any] = {}  # whole outputs, as long as the pipeline holds what it is given here

        def encode(j: int) -> Any:
            if keys[j] not in fresh:
                a, k = tree_unflatten(rows[j], spec)
                fresh[keys[j]] = encoder(*a, **k)
            return fresh[keys[j]]

        self._report(name)
        kept = self._kept.setdefault(name, OrderedDict())
        prompts = [kept.setdefault(key, {}) for key in keys]
        for j, key in enumerate(keys):
            kept.move_to_end(key)
            if not prompts[j]:
                encode(j)
        while len(kept) > self.most:
            kept.popitem(last=False)
            self._say(f"{name} {self.most}", "%s: more prompts than model.cond_stage_config.cache_prompts = %d: those "
                      "that were not asked for longest are encoded again", name, self.most)  # fmt: skip
        form = self._forms.get((name, call))
        if form is None:
            form = self._forms[name, call] = _form(encode(0))

        def read(path: tuple[Any, ...]) -> Tensor:
            for j, prompt in enumerate(prompts):
                if path in prompt:
                    continue
                with torch.no_grad():
                    value = functools.reduce(operator.getitem, path, encode(j))
                if not isinstance(value, Tensor) or value.shape[:1] != (1,):
                    whole = functools.reduce(operator.getitem, path, encoder(*args, **kwargs))
                    return self._pass(name, whole, f"gives {path or 'output'} not by rows")
                prompt[path] = value.detach().cpu()
            return torch.cat([prompt[path].to(device) for prompt in prompts])

        return read(form) if isinstance(form, tuple) else CachedOutput(form, read)

    def _pass(self, name: str, output: Any, why: str) -> Any:
        self._whole.add(name)
        self._kept.pop(name, None)
        self._say(name, "model.cond_stage_config.cache_prompts: %s %s, and is called in every step", name, why)
        return output

    def _report(self, name: str) -> None:
        first = next(iter(self._kept.get(name, {}).values()), None)
        if first:
            size = sum(x.nbytes for x in first.values()) / 1e6
            self._say(f"{name} MB", "%s: outputs of up to %d prompts are kept: %.3g MB a prompt, %.3g MB at most", name,
                      self.most, size, size * self.most, level=logging.INFO)  # fmt: skip

    def _say(self, key: str, *message: Any, level: int = logging.WARNING) -> None:
        if key not in self._said:
            self._said.add(key)
            log.log(level, *message)


class CachedOutput:
    """A network's output of which each tensor is fetched when it is read: by attribute, key or index."""

    def __init__(self, form: Any, read: Callable[[tuple[Any, ...]], Any]) -> None:
        self._form, self._read = form, read

    def _of(self, form: Any) -> Any:
        return self._read(form) if isinstance(form, tuple) else form and CachedOutput(form, self._read)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not isinstance(self._form, Mapping):
            raise AttributeError(name)
        return self._of(self._form.get(name))  # as of an output's fields that are not there: None

    def __getitem__(self, key: Any) -> Any:
        entries = self._form if isinstance(key, str) or isinstance(self._form, list) else [*self._form.values()]
        return self._of(entries[key])

    def __iter__(self) -> Iterator[Any]:
        return (self._of(entry) for entry in (self._form.values() if isinstance(self._form, Mapping) else self._form))

    def __len__(self) -> int:
        return len(self._form)


def _form(output: Any, path: tuple[Any, ...] = ()) -> Any:
    """An output's containers, with the way to it in the place of each value; ``None`` stays."""
    if isinstance(output, Mapping):
        return {name: _form(value, (*path, name)) for name, value in output.items()}
    if isinstance(output, Sequence) and not isinstance(output, str):
        return [_form(value, (*path, j)) for j, value in enumerate(output)]
    return None if output is None else path


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


def refuse_state(given: Any, stateless: Collection[str], who: str) -> None:
    """Raises :class:`ConfigurationError` where a network is handed (``given``) an object that may remember something.

    ``who``: hands it: ``FluxPipeline hands its transformer``.
    """
    opaque = ({type(x).__name__ for x in tree_leaves(given) if not isinstance(x, PLAIN)}).difference(stateless)
    if opaque:
        raise ConfigurationError(
            f"{who} a {', '.join(sorted(opaque))}: what it remembers between "
            f"calls would be lost where a call is recomputed. If it carries nothing from step to step, declare it: "
            f"model.pipeline.stateless=[{','.join(sorted(opaque))}]; else switch it off by model.pipeline.arguments"
        )


def in_form_of(output: Any, sample: Tensor, everywhere: bool) -> tuple[Any, Any]:
    """``sample`` in the form of a scheduler's ``output``, and the form that the next one is to have.

    ``everywhere``: from now on in place of the clean estimate too, which is what LCM decodes at the end.
    """
    if isinstance(output, tuple):
        if everywhere:
            output = tuple(sample if isinstance(x, Tensor) else x for x in output)
        return (sample, *output[1:]), output
    out = copy.copy(output)
    for name in [*out] if everywhere else ["prev_sample"]:
        if isinstance(out.get(name), Tensor):
            out[name] = sample
    return out, out


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
