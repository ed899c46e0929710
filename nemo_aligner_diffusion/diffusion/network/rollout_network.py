"""A second network for the calls of a rollout that need no gradient, most of a training step's work.

Adapters are in its weights (``W + s·B A``, exact but for rounding) and its products may be of a lower precision. What
it shares with the trained network is one tensor, what it has for itself is made anew after each optimizer step; the
trained network is never written to. Active steps are the trained network's own, from the latents that were reached: the
gradient is exact for those latents.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from nemo_aligner_diffusion.diffusion.lora import has_lora
from nemo_aligner_diffusion.diffusion.network.compiled import Compiled
from nemo_aligner_diffusion.diffusion.network.eight_bits import dense, multiply_in_fp8
from nemo_aligner_diffusion.diffusion.settings import Float8Settings
from nemo_aligner_diffusion.errors import ConfigurationError, first_line

log = logging.getLogger(__name__)

_REGISTERED = ("_parameters", "_buffers", "_modules")
_PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class RolloutNetwork:
    """A copy of a denoiser for calls without gradient.

    Args:
        denoiser: whole, with its adapters, before it is cut or sharded; :attr:`network` is then laid out like it.
        precision: ``same``, or ``bf16``: products are computed in bfloat16 (accumulated in float32), of weights that
            are kept so; norms, sums and the prediction stay in their own; ``fp8``: those of linear layers in float8.
        share: one tensor for what both have alike; not if the two are sharded apart.
        fp8: of ``fp8``, how.
        compile_mode: of ``torch.compile``; its graph is the rollout's own, for one shape of batch. ``None``: eager.
        cache: a configuration of ``diffusers``' cache hooks that keep their state by context (:func:`cache_config`).

    Attributes:
        network: laid out by whoever lays out ``denoiser``; current after :meth:`refresh`.
        cache_context: under which name the hooks keep what the next call leaves to those after it.

    Raises:
        ConfigurationError: an adapter is no plain LoRA (DoRA …), and cannot be folded so; no float8, or no compiler
            here; ``diffusers`` has no such hooks for this network's class.
    """

    def __init__(
        self,
        denoiser: Any,
        precision: str = "same",
        share: bool = True,
        fp8: Float8Settings | None = None,
        compile_mode: str | None = None,
        cache: Any = None,
    ) -> None:
        self.denoiser, self.precision, self.bf16 = denoiser, precision, precision != "same"
        self.cached, self.cache_context = cache is not None, ""
        alike = [*denoiser.parameters(), *denoiser.buffers()] if share else []
        held = [x for part in denoiser.modules() for name, x in vars(part).items() if name not in _REGISTERED]
        alike += [x for x in tree_leaves(held) if isinstance(x, Tensor)]  # constants: tables of rotary frequencies
        self.network: Any = copy.deepcopy(denoiser, {id(tensor): tensor for tensor in alike}).eval()
        for name, layer in list(self.network.named_modules()):
            if hasattr(layer, "base_layer"):
                _check_plain(name, layer)
                self.network.set_submodule(name, layer.base_layer)
                own = dense(layer.base_layer.weight.detach()).clone()
                layer.base_layer.weight = nn.Parameter(own, requires_grad=False)
        vars(self.network).pop("peft_config", None)
        if not share:
            self.network.requires_grad_(False)
        if self.bf16:
            for layer in self.network.modules():
                if isinstance(layer, _PRODUCTS):
                    for name, own in list(layer.named_parameters(recurse=False)):
                        converted = nn.Parameter(dense(own.detach()).to(torch.bfloat16), requires_grad=False)
                        setattr(layer, name, converted)
        if precision == "fp8":
            device = next(denoiser.parameters()).device
            multiply_in_fp8(self.network, fp8 or Float8Settings(), device, "model.rollout_precision=fp8")
        if cache is not None:
            with self._cached_call():
                self.network.enable_cache(cache)
                ends = [name for name, _ in self.network.named_children() if name.endswith("proj_out")]
                if getattr(cache, "use_lite_mode", False) and ends != ["proj_out"]:
                    raise ValueError(f"its output is not that of one layer proj_out: {', '.join(ends) or 'none'}")
        self.call: Any = self.network
        if compile_mode is not None:
            self.call = Compiled(self.network, compile_mode, "model.rollout_compile")

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the denoiser's present weights; where it is sharded, every process must."""
        for name, layer in self.network.named_modules():
            trained = self.denoiser.get_submodule(name)
            base = getattr(trained, "base_layer", trained)
            for own, parameter in layer.named_parameters(recurse=False):
                source = getattr(base, own)
                if parameter is source:
                    continue
                changes = _changes(trained) if own == "weight" and base is not trained else []
                if not (changes or source.requires_grad):
                    continue  # a copy of what never changes
                value = dense(_local(source))
                for change in changes:
                    value = value + change.view_as(value)
                _local(parameter).copy_(value)

    def begin(self, network: Any) -> None:
        """A pipeline has prepared ``network`` for its loop, maybe with attention processors of other kinds (PAG)."""
        wanted = getattr(network, "attn_processors", None)
        if wanted and [*map(type, wanted.values())] != [*map(type, self.network.attn_processors.values())]:
            self.network.set_attn_processor(dict(wanted))
        if self.cached:
            self.network._reset_stateful_cache()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The prediction; of fewer bits in the dtype of the first floating tensor given (the latents)."""
        first = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point())
        with contextlib.ExitStack() as contexts:
            if self.cached:
                contexts.enter_context(self._cached_call())
            if self.bf16:
                contexts.enter_context(torch.autocast(first.device.type, torch.bfloat16))
            out = self.call(*args, **kwargs)
        if not self.bf16:
            return out
        return tree_map(lambda x: x.to(first.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, out)

    @contextlib.contextmanager
    def _cached_call(self) -> Iterator[None]:
        """``diffusers`` knows the blocks of some classes only, and fails at others in enabling or in a call."""
        try:
            with self.network.cache_context(self.cache_context):
                yield
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ConfigurationError(
                f"model.rollout_cache: diffusers' hooks do not fit a {type(self.denoiser).__name__} "
                f"({type(error).__name__}: {first_line(error)}); expected another kind of cache, or null with it"
            ) from error


def cache_config(kind: str | None, threshold: float, interval: int) -> Any:
    """``model.rollout_cache`` as ``diffusers``' configuration.

    Args:
        kind: ``first_block``: the blocks after the first add what they added last, while what the first one adds is
            within ``threshold`` (relative, mean over elements) of what it added then; ``taylorseer``: from the fourth
            step on one of ``interval`` is computed, the others' output extrapolated (arXiv 2503.06923, first order).
    """
    from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig

    if kind == "taylorseer":  # lite, as all else computes feed-forward layers, and finds attention by names of few
        return TaylorSeerCacheConfig(interval, taylor_factors_dtype=torch.float32, use_lite_mode=True)
    return None if kind is None else FirstBlockCacheConfig(threshold)


def rollout_network_of(
    denoiser: Any, asked: str | None, fast: bool, share: bool, **options: Any
) -> RolloutNetwork | None:
    """What ``model.rollout_precision`` asks for; ``None``: the trained network itself does.

    Args:
        fast: whether the device is :func:`fast_in_bf16`, by which ``auto`` goes.
        share, options: see :class:`RolloutNetwork`.
    """
    precision = ("bf16" if fast else "same") if asked == "auto" else asked
    wanted = any(options.get(name) is not None for name in ("cache", "compile_mode"))
    if precision is None or (precision == "same" and not has_lora(denoiser) and not wanted):
        return None
    try:
        return RolloutNetwork(denoiser, precision, share, **options)
    except ConfigurationError as error:
        if asked != "auto" or wanted:
            raise
        log.info("%s; the trained network makes all steps", error)
        return None


def fast_in_bf16(device: torch.device) -> bool:
    """Whether bfloat16 products beat float32: GPUs since Ampere, processors with instructions for them."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _check_plain(name: str, layer: Any) -> None:
    variant = any(getattr(layer, "use_dora", {}).values()) or bool(getattr(layer, "lora_variant", None))
    if variant or not isinstance(layer.base_layer, _PRODUCTS) or not hasattr(layer, "lora_A"):
        raise ConfigurationError(
            f"model.rollout_precision: the adapter of {name} ({type(layer).__name__}) is not plain LoRA, and cannot be "
            f"put into the weights; expected model.rollout_precision=null with it"
        )


def _changes(layer: Any) -> list[Tensor]:
    """``s·B A`` of each active adapter, this process's part, flattened behind the outputs."""
    changes = []
    for name in layer.active_adapters:
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        a = a.full_tensor() if hasattr(a, "full_tensor") else a  # every row of W needs all of A
        changes.append(layer.scaling[name] * (_local(b).flatten(1) @ a.flatten(1)))
    return changes


def _local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
