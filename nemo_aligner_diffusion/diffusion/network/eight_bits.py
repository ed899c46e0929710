"""Eight bits: frozen weights that are kept so (``model.frozen_precision``), and products of linear layers in float8
(``trainer.precision=fp8``, ``model.rollout_precision=fp8``). By torchao; products by Transformer Engine as well."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nemo_aligner_diffusion.diffusion.settings import Float8Settings
from nemo_aligner_diffusion.errors import ConfigurationError

log = logging.getLogger(__name__)

# of `convert_to_float8_training` and `te.Linear`: kernels of 16 bytes a row
_MULTIPLE = 16
_WEIGHT_ONLY = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}


def keep_in_8_bits(networks: Iterable[nn.Module], kind: str) -> int:
    """Weights of linear layers that are in bfloat16 and not trained, in ``kind`` with a scale a row from now on.

    Products are in the precision of what comes in; gradients in what comes in, and of adapters, are those of the
    rounded weights.

    Args:
        kind: ``int8`` or ``fp8`` (e4m3).

    Returns:
        How many layers.

    Raises:
        ConfigurationError: torchao is missing.
    """
    _import_torchao(f"model.frozen_precision={kind}")
    from torchao import quantization

    changed = []

    def wanted(layer: nn.Module, name: str) -> bool:
        if type(layer) is not nn.Linear or layer.weight.requires_grad or layer.weight.dtype != torch.bfloat16:
            return False
        changed.append(name)
        return True

    for network in networks:
        quantization.quantize_(network, getattr(quantization, _WEIGHT_ONLY[kind])(), wanted)
    return len(changed)


def dense(weight: Any) -> Any:
    """A tensor of 8 bits with scales as an ordinary one; any other as it is."""
    return weight.dequantize() if hasattr(weight, "qdata") else weight


def multiply_in_fp8(network: nn.Module, settings: Float8Settings, device: torch.device, key: str) -> int:
    """Linear layers of ``network``, adapters' own excepted, multiply in float8: both factors scaled and rounded in each
    call, sums in float32. Weights stay as they are.

    Args:
        settings: which layers, by which package, with which scales.
        device: where the network will compute.
        key: what asked for it, for messages.

    Returns:
        How many layers; 0: it does so already.

    Raises:
        ConfigurationError: the package, the hardware or such layers are missing; by name.
    """
    if getattr(network, "multiplies_in_fp8", False):  # the rollout's copy of a network that is trained so
        return 0
    if not settings.emulate and not (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)):
        raise ConfigurationError(
            f"{key} needs a GPU that multiplies in float8 (Ada, Hopper or newer: compute capability 8.9), and this run "
            f"is on {device}; expected another precision, or model.fp8.emulate=true, which rounds alike and is slow"
        )
    found = {name for name, layer in network.named_modules() if _has_place(name, layer, settings.scope)}
    if not found:
        raise ConfigurationError(
            f"{key}: {type(network).__name__} has no linear layer for it; expected layers whose sides are multiples of "
            f"{_MULTIPLE}, inside of its blocks, or that model.fp8.scope names ({list(settings.scope or ())})"
        )
    if settings.backend == "torchao":
        _import_torchao(key)
        from dataclasses import replace

        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = replace(Float8LinearConfig.from_recipe_name(settings.recipe), emulate=settings.emulate)
        convert_to_float8_training(network, module_filter_fn=lambda _, name: name in found, config=config)
    else:
        for name in found:
            network.set_submodule(name, _transformer_engine_linear(network.get_submodule(name), key))
    vars(network)["multiplies_in_fp8"] = True
    return len(found)


def _has_place(name: str, layer: nn.Module, scope: tuple[str, ...] | None) -> bool:
    if type(layer) is not nn.Linear or ".lora_" in name:
        return False
    name = name.removesuffix(".base_layer")
    if scope is None:  # embedders and last layers, of which there is one, decide most about the picture
        wanted = any(part.isdigit() for part in name.split("."))
    else:
        wanted = any(name == end or name.endswith(f".{end}") for end in scope)
    return wanted and layer.in_features % _MULTIPLE == 0 and layer.out_features % _MULTIPLE == 0


def _import_torchao(key: str) -> None:
    loud = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loud]
    for logger in loud:
        logger.setLevel(logging.ERROR)  # of kernels for other hardware, and of its own enumerations
    try:
        import torchao.float8
        import torchao.quantization  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            f"{key} needs the package torchao ({error}): pip install 'nemo-aligner-diffusion[quantization]'"
        ) from error
    finally:
        for logger, level in zip(loud, levels, strict=True):
            logger.setLevel(level)


def _transformer_engine_linear(layer: Any, key: str) -> nn.Module:
    try:
        import transformer_engine.pytorch as te
        from transformer_engine.common.recipe import Float8CurrentScaling
    except ImportError as error:
        raise ConfigurationError(
            f"{key} with model.fp8.backend=transformer_engine needs that package, version 2 or newer ({error}): "
            "NVIDIA's containers have it; or model.fp8.backend=torchao"
        ) from error

    class Linear(te.Linear):
        """Its autocast is around each call: amax is the call's own, nothing is remembered between calls."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            with te.fp8_autocast(enabled=True, fp8_recipe=Float8CurrentScaling()):
                return super().forward(x, *args, **kwargs)

    weight = layer.weight
    made = Linear(layer.in_features, layer.out_features, layer.bias is not None, params_dtype=weight.dtype,
                  device=weight.device)  # fmt: skip
    made.weight = weight
    if layer.bias is not None:
        made.bias = layer.bias
    return made
