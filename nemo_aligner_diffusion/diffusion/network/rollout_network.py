"""A second network for the calls of a rollout that need no gradient, most of a training step's work.

Adapters are in its weights (``W + s·B A``, exact but for rounding) and its products may be of a lower precision. What
it shares with the trained network is one tensor, what it has for itself is made anew after each optimizer step; the
trained network is never written to. Active steps are the trained network's own, from the latents that were reached: the
gradient is exact for those latents.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from nemo_aligner_diffusion.diffusion.lora import has_lora
from nemo_aligner_diffusion.errors import ConfigurationError

log = logging.getLogger(__name__)

_REGISTERED = ("_parameters", "_buffers", "_modules")
_PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class RolloutNetwork:
    """A copy of a denoiser for calls without gradient.

    Args:
        denoiser: whole, with its adapters, before it is cut or sharded; :attr:`network` is then laid out like it.
        precision: ``same``, or ``bf16``: products are computed in bfloat16 (accumulated in float32), of weights that
            are kept so; norms, sums and the prediction stay in their own.
        share: one tensor for what both have alike; not if the two are sharded apart.

    Attributes:
        network: laid out by whoever lays out ``denoiser``; current after :meth:`refresh`.

    Raises:
        ConfigurationError: an adapter is no plain LoRA (DoRA …), and cannot be folded so.
    """

    def __init__(self, denoiser: Any, precision: str = "same", share: bool = True) -> None:
        self.denoiser, self.bf16 = denoiser, precision == "bf16"
        alike = [*denoiser.parameters(), *denoiser.buffers()] if share else []
        held = [x for part in denoiser.modules() for name, x in vars(part).items() if name not in _REGISTERED]
        alike += [x for x in tree_leaves(held) if isinstance(x, Tensor)]  # constants: tables of rotary frequencies
        self.network: Any = copy.deepcopy(denoiser, {id(tensor): tensor for tensor in alike}).eval()
        for name, layer in list(self.network.named_modules()):
            if hasattr(layer, "base_layer"):
                _check_plain(name, layer)
                self.network.set_submodule(name, layer.base_layer)
                layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach().clone(), requires_grad=False)
        vars(self.network).pop("peft_config", None)
        if not share:
            self.network.requires_grad_(False)
        if self.bf16:
            for layer in self.network.modules():
                if isinstance(layer, _PRODUCTS):
                    for name, own in list(layer.named_parameters(recurse=False)):
                        converted = nn.Parameter(own.detach().to(torch.bfloat16), requires_grad=False)
                        setattr(layer, name, converted)

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
                value = _local(source)
                for change in changes:
                    value = value + change.view_as(value)
                _local(parameter).copy_(value)

    def begin(self, network: Any) -> None:
        """A pipeline has prepared ``network`` for its loop, maybe with attention processors of other kinds (PAG)."""
        wanted = getattr(network, "attn_processors", None)
        if wanted and [*map(type, wanted.values())] != [*map(type, self.network.attn_processors.values())]:
            self.network.set_attn_processor(dict(wanted))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The prediction, in the dtype of the first floating tensor given (the latents)."""
        if not self.bf16:
            return self.network(*args, **kwargs)
        first = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point())
        with torch.autocast(first.device.type, torch.bfloat16):
            out = self.network(*args, **kwargs)
        return tree_map(lambda x: x.to(first.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, out)


def rollout_network_of(denoiser: Any, asked: str | None, fast: bool, share: bool) -> RolloutNetwork | None:
    """What ``model.rollout_precision`` asks for; ``None``: the trained network itself does.

    Args:
        fast: whether the device is :func:`fast_in_bf16`, by which ``auto`` goes.
        share: see :class:`RolloutNetwork`.
    """
    precision = ("bf16" if fast else "same") if asked == "auto" else asked
    if precision is None or (precision == "same" and not has_lora(denoiser)):
        return None
    try:
        return RolloutNetwork(denoiser, precision, share)
    except ConfigurationError as error:
        if asked != "auto":
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
