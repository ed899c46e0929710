"""Cutting a layer together with the LoRA adapters that PEFT has wrapped around it.

The layer's output is ``W x + s·B(A x)``. Where W is cut over outputs, B is cut alike and A stays whole; the all-reduce
of B's own column layer, between A and B, gives A its full gradient. Where W is cut over inputs, A is cut alike and B
stays whole. PEFT's switches (adapters on and off, scales, several adapters) work on its wrapper, which stays.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from torch.distributed import ProcessGroup

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.parallel.tensor.blocks import Shares
from nemo_aligner_diffusion.parallel.tensor.layers import cut_dropout, cut_inputs, cut_outputs, share_of_gradient


def check_layer(module: Any, path: str) -> None:
    """Refuse what cannot be cut: not a linear or 2-D convolutional layer of torch, or not plain LoRA around one.

    Raises:
        ConfigurationError: names the layer by ``path``.
    """
    if not hasattr(module, "base_layer"):
        if type(module) not in (nn.Linear, nn.Conv2d, nn.Embedding):
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            raise ConfigurationError(f"{path} is a {kind}; tensor parallelism cuts torch's own Linear and Conv2d only")
        if isinstance(module, nn.Conv2d) and module.groups != 1:
            raise ConfigurationError(f"{path}: a convolution in {module.groups} groups cannot be cut; expected 1 group")
        return
    from peft.tuners.lora import Conv2d, Linear

    if type(module) not in (Linear, Conv2d):
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        raise ConfigurationError(f"{path}: only LoRA adapters can be cut for tensor parallelism, not {kind}")
    if any(module.use_dora.values()) or module.lora_variant:
        raise ConfigurationError(
            f"{path}: tensor parallelism does not cut a variant of LoRA such as DoRA (use_dora), whose norm of a "
            "whole weight no rank holds; use plain LoRA, or a tensor-parallel size of 1"
        )
    for layer in (module.base_layer, *module.lora_A.values(), *module.lora_B.values()):
        check_layer(layer, path)


def cut_layer_outputs(module: Any, group: ProcessGroup, blocks: Shares = 1, shared_input: bool = False) -> nn.Module:
    """``module`` (a linear or convolutional layer, with or without adapters) cut over its outputs.

    Args:
        blocks: the outputs are these blocks, each of which is cut; see :class:`.TensorCut`.
        shared_input: the module reads what ``share_input`` has copied to the group.
    """
    if not hasattr(module, "base_layer"):
        return cut_outputs(module, group, blocks, shared_input)
    module.base_layer = cut_layer_outputs(module.base_layer, group, blocks, shared_input)
    for name in list(module.lora_B):
        module.lora_B[name] = cut_outputs(module.lora_B[name], group, blocks)
        if shared_input:
            share_of_gradient(module.lora_A[name], group)
    return cast(nn.Module, module)


def cut_layer_inputs(module: Any, group: ProcessGroup, blocks: Shares = 1) -> nn.Module:
    """The same, cut over its inputs."""
    if not hasattr(module, "base_layer"):
        return cut_inputs(module, group, blocks)
    module.base_layer = cut_layer_inputs(module.base_layer, group, blocks)
    for name in list(module.lora_A):
        dim = 1 if isinstance(module.lora_A[name], nn.Conv2d) else -1
        module.lora_A[name] = cut_inputs(module.lora_A[name], group, blocks)
        if isinstance(module.lora_dropout[name], nn.Dropout):
            module.lora_dropout[name] = cut_dropout(module.lora_dropout[name], group, dim)
    return cast(nn.Module, module)
