"""The layers of tensor parallelism one by one: number formats, shapes, memory orders, recomputation, PEFT's own way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from process_pool import ProcessPool
from torch import Tensor, nn


def _layers() -> Any:
    from nemo_aligner_diffusion.parallel.tensor import layers as tensor_layers

    return tensor_layers


def _pair(inner: int = 8, convolution: bool = False, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """Two layers, in → inner → out, and the same two cut over the world."""
    torch.manual_seed(3)
    if convolution:
        whole = nn.Sequential(nn.Conv2d(4, inner, 3, padding=1), nn.SiLU(), nn.Conv2d(inner, 6, 3, padding=1))
    else:
        whole = nn.Sequential(nn.Linear(4, inner), nn.SiLU(), nn.Linear(inner, 6))
    whole.to(dtype)
    group = dist.group.WORLD
    cut = nn.Sequential(_layers().cut_outputs(whole[0], group), nn.SiLU(), _layers().cut_inputs(whole[2], group))
    return whole, cut


def _run(model: nn.Module, value: Tensor, frozen: tuple[str, ...] = (), weights: Tensor | None = None) -> list[Tensor]:
    """Output, d/d input, and the whole gradient of every parameter."""
    from nemo_aligner_diffusion.parallel.placements import placements

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
        parameter.grad = None
    value = value.detach().requires_grad_()
    output = model(value)
    (output.sum() if weights is None else (output * weights).sum()).backward()
    where = placements(model)
    assert value.grad is not None
    gradients = [where[n].full(p.grad) for n, p in model.named_parameters() if p.grad is not None]
    return [output.detach(), value.grad, *gradients]


def _close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        scale = float(b.abs().max())
        assert scale > 0
        assert float((a.double() - b.double()).abs().max()) <= tolerance * scale


def linear_shapes() -> None:
    whole, cut = _pair()
    for shape in ((3, 4), (2, 5, 4), (1, 1, 4), (4,), (2, 3, 1, 4)):
        value = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        # a sum's gradient is an expanded scalar: not contiguous, which megatron-core alone gets silently wrong
        for frozen in ((), ("0.weight", "2.weight"), ("0.weight", "0.bias", "2.weight", "2.bias"), ("0.bias",)):
            _close(_run(cut, value, frozen), _run(whole, value, frozen), 1e-13)
        strided = value.movedim(-1, 0).contiguous().movedim(0, -1)
        _close(_run(cut, strided), _run(whole, strided), 1e-13)
        with torch.no_grad():
            _close([cut(value)], [whole(value)], 1e-13)


def convolution_orders() -> None:
    whole, cut = _pair(convolution=True)
    value = torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = torch.randn(2, 6, 5, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = _run(whole, value, weights=weights)
    last = value.to(memory_format=torch.channels_last)
    for given in (value, last, value.transpose(2, 3).contiguous().transpose(2, 3)):
        for order in (weights, weights.to(memory_format=torch.channels_last)):
            _close(_run(cut, given, weights=order), expected, 1e-13)
            _close(_run(cut.to(memory_format=torch.channels_last), given, weights=order), expected, 1e-13)
            cut.to(memory_format=torch.contiguous_format)
    assert cut(last).is_contiguous(memory_format=torch.channels_last) == whole(last).is_contiguous(
        memory_format=torch.channels_last
    )


def bfloat16_autocast() -> None:
    for convolution, value in ((False, torch.randn(2, 5, 4)), (True, torch.randn(2, 4, 5, 5))):
        dist.broadcast(value, 0)
        whole, cut = _pair(convolution=convolution, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for frozen in ((), ("0.weight", "2.weight")):
                found, expected = _run(cut, value, frozen), _run(whole, value, frozen)
                assert found[0].dtype == torch.bfloat16
                _close(found, expected, 0.03)
    whole, cut = _pair(dtype=torch.bfloat16)
    value = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    _close(_run(cut, value), _run(whole, value), 0.03)


def recomputed() -> None:
    from torch.utils.checkpoint import checkpoint

    for convolution, shape in ((False, (2, 5, 4)), (True, (2, 4, 5, 5))):
        whole, cut = _pair(convolution=convolution)
        value = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

        class Recomputed(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, value: Tensor) -> Tensor:
                return checkpoint(self.inner, value, use_reentrant=False)  # type: ignore[no-any-return]

        _close(_run(Recomputed(cut), value), _run(whole, value), 1e-13)


def dropout_masks() -> None:
    layer = _layers().CutDropout(0.4, 1, dist.group.WORLD)
    value = torch.randn(3, 8, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.manual_seed(9)
    expected = nn.Dropout(0.4)(value)
    torch.manual_seed(9)
    rank, size = dist.get_rank(), dist.get_world_size()
    assert torch.equal(layer(value.chunk(size, 1)[rank]), expected.chunk(size, 1)[rank])
    assert float((expected == 0).double().mean()) > 0.1
    assert torch.equal(layer.eval()(value), value)


def as_peft_does_it() -> None:
    """PEFT's LoraParallelLinear on megatron-core's layers against our adapters, put on before the cut.

    PEFT 0.21.2's own entry, ``LoraConfig(megatron_config=…, megatron_core=…)``, fails before it comes to that
    (docs/decisions/002-lora-before-cutting.md), so its layer is made here, of layers that give what it expects.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora.tp_layer import LoraParallelLinear

    from nemo_aligner_diffusion.parallel.placements import placements
    from nemo_aligner_diffusion.parallel.tensor.lora import cut_layer_inputs, cut_layer_outputs

    class TensorColumn(ColumnParallelLinear):  # type: ignore[misc]
        def forward(self, *args: Any) -> Any:
            return super().forward(*args)[0]

    class TensorRow(RowParallelLinear):  # type: ignore[misc]
        def forward(self, *args: Any) -> Any:
            return super().forward(*args)[0]

    class TupleColumn(TensorColumn):
        def forward(self, *args: Any) -> Any:
            return super().forward(*args), None

    class TupleRow(TensorRow):
        def forward(self, *args: Any) -> Any:
            return super().forward(*args), None

    size = dist.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)  # PEFT's layers find their group there
    try:
        group = parallel_state.get_tensor_model_parallel_group()
        config = TransformerConfig(
            num_layers=1,
            hidden_size=8,
            num_attention_heads=4,
            tensor_model_parallel_size=size,
            use_cpu_initialization=True,
            perform_initialization=True,
        )
        common: dict[str, Any] = {"config": config, "init_method": nn.init.xavier_normal_, "skip_bias_add": False}
        tensor_layers = SimpleNamespace(ColumnParallelLinear=TensorColumn, RowParallelLinear=TensorRow)
        options: dict[str, Any] = {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["column", "row"],
            "init_lora_weights": False,
        }
        bases = {
            "column": TupleColumn(4, 8, bias=True, gather_output=False, **common),
            "row": TupleRow(8, 6, bias=True, input_is_parallel=True, **common),
        }
        theirs: Any = nn.ModuleDict(
            {
                name: LoraParallelLinear(
                    base, "default", LoraConfig(**options), tensor_layers, r=4, lora_alpha=6, megatron_config=config
                )
                for name, base in bases.items()
            }
        )
        ours: Any = nn.ModuleDict({"column": nn.Linear(4, 8), "row": nn.Linear(8, 6)})
        ours = inject_adapter_in_model(LoraConfig(**options), ours)
        torch.manual_seed(4)
        for parameter in ours.parameters():
            nn.init.normal_(parameter)
        ours.column = cut_layer_outputs(ours.column, group)
        ours.row = cut_layer_inputs(ours.row, group)
        for name, parameter in theirs.named_parameters():
            parameter.data.copy_(ours.get_parameter(name))
            parameter.requires_grad_("lora" in name)
        value = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
        weights = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(2))
        answers = []
        for model in (ours, theirs):
            given = value.clone().requires_grad_()
            hidden = model["column"](given)
            output = model["row"]((hidden[0] if isinstance(hidden, tuple) else hidden).relu())
            output = output[0] if isinstance(output, tuple) else output
            (output * weights).sum().backward()
            gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
            answers.append((output.detach(), given.grad, gradients))
        (output, given, found), (expected, expected_given, gradients) = answers
        assert len(found) == 4
        assert found.keys() == gradients.keys()
        where = placements(ours)
        _close([output, given], [expected, expected_given], 1e-5)
        _close([where[n].full(found[n]) for n in found], [where[n].full(gradients[n]) for n in found], 1e-5)
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    "check", [linear_shapes, convolution_orders, bfloat16_autocast, recomputed, dropout_masks, as_peft_does_it]
)
def test_layer(processes: ProcessPool, check: Any, size: int) -> None:
    processes.run(size, check)
