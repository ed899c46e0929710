"""Linear and convolutional layers whose weight is cut over a tensor-parallel group, on megatron-core's engine.

A *column* layer holds a part of the outputs: every rank gives the whole input and has its own part of the output. A
*row* layer holds a part of the inputs: every rank gives its part and all have the whole output, added up once. One
all-reduce in the forward pass of a row layer, one in the backward pass of a column layer (Shoeybi et al., 2019,
arXiv 1909.08053, section 3; the convolutions follow by reading "channel" for "feature").

What stays replicated behind them (norms, biases of row layers, LoRA's A before a column and B after a row layer) gets
its full gradient on every rank. Import this module only where tensor parallelism is asked for: megatron-core takes
three seconds.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.parallel.placements import CUTS, GROUP, TensorCut
from nemo_aligner_diffusion.parallel.tensor.blocks import Shares

try:
    with warnings.catch_warnings():
        # it tells of Transformer Engine and Apex, whose optimizers and kernels nothing here would use
        warnings.simplefilter("ignore")
        from megatron.core import ModelParallelConfig
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
        from megatron.core.tensor_parallel.mappings import (
            copy_to_tensor_model_parallel_region,
            reduce_from_tensor_model_parallel_region,
        )
except ImportError as error:
    raise ConfigurationError(
        f"tensor parallelism needs megatron-core, which cannot be imported ({error}); "
        "install it: pip install 'nemo-aligner-diffusion[megatron]', or set model.tensor_model_parallel_size=1"
    ) from error

logger = logging.getLogger(__name__)


class _ContiguousGradient(torch.autograd.Function):
    """Identity with a contiguous gradient: megatron-core all-reduces *a copy* of one that is not, and drops the sum."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].contiguous()


def copy_to_group(value: Tensor, group: ProcessGroup) -> Tensor:
    """``value``, the same on all ranks, as input of what is cut; the gradients of the ranks are added up.

    Only linear and convolutional layers may read the result: the sum is made in place, in the gradient that they hand
    back.
    """
    if _is_channels_last(value):  # contiguous in its own order: a view instead of a copy to the usual order
        return copy_to_group(value.permute(0, 2, 3, 1), group).permute(0, 3, 1, 2)
    copied: Tensor = copy_to_tensor_model_parallel_region(value, group=group)
    return _ContiguousGradient.apply(copied)


class _ShareOfGradient(torch.autograd.Function):
    """Identity; each of N ranks hands back an N-th of its gradient, which is the same on all and will be added up."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, size: int) -> Tensor:
        ctx.size = size
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] / ctx.size, None


def share_input(module: nn.Module, names: tuple[str, ...], group: ProcessGroup) -> None:
    """Let the column layers of ``module`` read inputs that are copied to the group once, at the module's own call.

    Args:
        names: the arguments that they read, in the order in which the module takes them.
    """

    def copy_inputs(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        copied = [copy_to_group(a, group) if isinstance(a, Tensor) else a for a in args[: len(names)]]
        named = {n: copy_to_group(v, group) for n, v in kwargs.items() if n in names and isinstance(v, Tensor)}
        return (*copied, *args[len(names) :]), {**kwargs, **named}

    module.register_forward_pre_hook(copy_inputs, with_kwargs=True)


def share_of_gradient(module: nn.Module, group: ProcessGroup) -> None:
    """Let ``module``, whole on every rank, read an input that is copied to the group: its gradient is counted once."""
    size = group.size()
    module.register_forward_pre_hook(lambda _, args: (_ShareOfGradient.apply(args[0], size), *args[1:]))


def reduce_from_group(value: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of ``value`` over the ranks; each rank's gradient is that of the sum. ``value`` is overwritten."""
    if _is_channels_last(value):
        return reduce_from_group(value.permute(0, 2, 3, 1), group).permute(0, 3, 1, 2)
    reduced: Tensor = reduce_from_tensor_model_parallel_region(value.contiguous(), group=group)
    return reduced


def _is_channels_last(value: Tensor) -> bool:
    return value.ndim == 4 and not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last)


class _Product:
    """megatron-core's product as ``nn.Linear`` has it: any number of leading dimensions, and under autocast.

    Its own functions take two or three dimensions; they adapt to CUDA's autocast only, so that the backward pass fails
    on the CPU, and would there give results of float32.
    """

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shape, device = input.shape, input.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if autocast:
            dtype = torch.get_autocast_dtype(device)
            input, weight = (t if t.dtype == torch.float64 else t.to(dtype) for t in (input, weight))
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            rows = input.reshape(-1, shape[-1])
            output: Tensor = super()._forward_impl(rows, weight, *args, **kwargs)  # type: ignore[misc]
        return output.reshape(*shape[:-1], output.shape[-1])


class ColumnLinear(_Product, ColumnParallelLinear):
    """A linear layer with ``out_features / N`` outputs here: input ``(…, in)`` whole, output ``(…, out / N)``.

    The bias is added here and not by megatron-core, which gives it no gradient where the weight is frozen.

    Attributes:
        shared_input: the input is copied to the group before (``share_input``).
    """

    shared_input = False

    # it writes an entry `_extra_state` into every state dict; names must be those of the layer without parallelism
    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def forward(self, input_: Tensor) -> Tensor:
        output, _ = super().forward(input_ if self.shared_input else copy_to_group(input_, self.tp_group))
        return output if self.bias is None else output + self.bias.to(output.dtype)


class RowLinear(_Product, RowParallelLinear):
    """A linear layer with ``in_features / N`` inputs here: input ``(…, in / N)``, output ``(…, out)`` whole."""

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def forward(self, input_: Tensor) -> Tensor:
        output, _ = super().forward(input_)
        return output if self.bias is None else output + self.bias.to(output.dtype)


class ColumnConv2d(nn.Conv2d):
    """A convolution with ``out_channels / N`` here: input ``(B, in, H, W)`` whole, output ``(B, out / N, H, W)``."""

    tensor_group: ProcessGroup

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(copy_to_group(input, self.tensor_group))


class RowConv2d(nn.Conv2d):
    """A convolution with ``in_channels / N`` here: input ``(B, in / N, H, W)``, output ``(B, out, H, W)`` whole."""

    tensor_group: ProcessGroup

    def forward(self, input: Tensor) -> Tensor:
        output = reduce_from_group(self._conv_forward(input, self.weight, None), self.tensor_group)
        return output if self.bias is None else output + self.bias.to(output.dtype)[:, None, None]


class CutDropout(nn.Module):
    """Dropout of an activation that is cut along ``dim``: this rank's part of the mask of the whole activation.

    As long as the ranks' generators are in step (they must be, for replicated activations), the masks are those of the
    layer without parallelism.
    """

    def __init__(self, probability: float, dim: int, group: ProcessGroup) -> None:
        super().__init__()
        self.p, self.dim, self.group = probability, dim, group

    def forward(self, value: Tensor) -> Tensor:
        if not self.training:
            return value
        shape = list(value.shape)
        part = shape[self.dim]
        shape[self.dim] *= self.group.size()
        mask = F.dropout(torch.ones(shape, dtype=value.dtype, device=value.device), self.p)
        return value * mask.narrow(self.dim, self.group.rank() * part, part)


def cut_outputs(module: nn.Module, group: ProcessGroup, blocks: Shares = 1, shared_input: bool = False) -> nn.Module:
    """The column layer that holds this rank's outputs of ``module``: a linear, 2-D convolutional or embedding layer.

    Args:
        blocks: the outputs are these blocks, each of which is cut (2: a gated feed-forward); see :class:`.TensorCut`.
        shared_input: the layer, linear, reads what ``share_input`` has copied.
    """
    cut = TensorCut(0, blocks)
    if isinstance(module, nn.Embedding):
        with torch.device("meta"):
            table = nn.Embedding(module.num_embeddings, module.embedding_dim // group.size(), module.padding_idx)
        return _adopt(table, module, {"weight": TensorCut(1, blocks)}, group)
    if isinstance(module, nn.Conv2d):
        layer: nn.Module = _convolution(ColumnConv2d, module, outputs=module.out_channels // group.size())
    else:
        layer = _linear(ColumnLinear, module, group, gather_output=False, disable_grad_reduce=True)
        layer.shared_input = shared_input  # type: ignore[assignment]
    return _adopt(layer, module, {"weight": cut, "bias": cut}, group)


def cut_inputs(module: nn.Module, group: ProcessGroup, blocks: Shares = 1) -> nn.Module:
    """The row layer that holds this rank's inputs (of each of ``blocks``) of a linear or 2-D convolutional layer."""
    if isinstance(module, nn.Conv2d):
        layer: nn.Module = _convolution(RowConv2d, module, inputs=module.in_channels // group.size())
    else:
        layer = _linear(RowLinear, module, group, input_is_parallel=True)
    return _adopt(layer, module, {"weight": TensorCut(1, blocks)}, group)


def cut_group_norm(module: nn.GroupNorm, group: ProcessGroup) -> nn.Module:
    """The group norm of this rank's groups."""
    size = group.size()
    with torch.device("meta"):
        layer = nn.GroupNorm(module.num_groups // size, module.num_channels // size, module.eps, module.affine)
    return _adopt(layer, module, {"weight": TensorCut(0), "bias": TensorCut(0)}, group)


def cut_dropout(module: nn.Dropout, group: ProcessGroup, dim: int) -> nn.Module:
    """The dropout of an activation that is cut along ``dim``."""
    return CutDropout(module.p, dim, group).train(module.training)


def _linear(kind: Any, module: nn.Module, group: ProcessGroup, **arguments: Any) -> nn.Module:
    assert isinstance(module, nn.Linear)
    config = ModelParallelConfig(
        tensor_model_parallel_size=group.size(),
        params_dtype=module.weight.dtype,
        use_cpu_initialization=True,  # no allocation on the present CUDA device
        perform_initialization=False,
    )
    with torch.device("meta"):
        layer: nn.Module = kind(
            module.in_features,
            module.out_features,
            config=config,
            init_method=nn.init.zeros_,
            bias=module.bias is not None,
            skip_bias_add=True,
            tp_group=group,
            **arguments,
        )
    layer._load_state_dict_pre_hooks.clear()  # they invent an entry `_extra_state`
    return layer


def _convolution(kind: type[nn.Conv2d], module: nn.Conv2d, inputs: int = 0, outputs: int = 0) -> nn.Module:
    with torch.device("meta"):
        return kind(
            inputs or module.in_channels,
            outputs or module.out_channels,
            module.kernel_size,  # type: ignore[arg-type]
            module.stride,  # type: ignore[arg-type]
            module.padding,  # type: ignore[arg-type]
            module.dilation,  # type: ignore[arg-type]
            bias=module.bias is not None,
            padding_mode=module.padding_mode,
        )


def _adopt(layer: nn.Module, whole: nn.Module, cuts: Mapping[str, TensorCut], group: ProcessGroup) -> nn.Module:
    """Give ``layer`` its parts of the parameters of ``whole``, and the notes on how they were cut."""
    kept = {}
    for name, parameter in whole.named_parameters(recurse=False):
        if name in cuts:
            kept[name] = cuts[name]
            part = cuts[name].take(parameter.detach(), group.rank(), group.size())
            setattr(layer, name, nn.Parameter(part, requires_grad=parameter.requires_grad))
        else:
            setattr(layer, name, parameter)
    setattr(layer, CUTS, kept)
    setattr(layer, GROUP, group)
    return layer.train(whole.training)
