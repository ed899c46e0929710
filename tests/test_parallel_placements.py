"""Whole tensors from pieces and back, over a tensor group, a data group and both."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nemo_aligner_diffusion.parallel.placements import Placement, TensorCut, is_sharded, placements


@pytest.mark.parametrize("cut", [TensorCut(0), TensorCut(1), TensorCut(0, blocks=2)])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_cut_is_undone_by_joining(cut, size):
    full = torch.arange(12 * 6.0).reshape(12, 6)
    assert torch.equal(cut.join([cut.take(full, rank, size) for rank in range(size)]), full)


def test_each_half_of_a_gate_is_cut_alike():
    full = torch.arange(8)
    assert TensorCut(0, blocks=2).take(full, 1, 2).tolist() == [2, 3, 6, 7]


def test_what_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"\(6, 5\) cannot be cut into 1 × 4"):
        TensorCut(0).take(torch.zeros(6, 5), 0, 4)


def _round_trip(tensor_size: int, shard: bool) -> bool:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    data_size = 4 // tensor_size
    mesh = init_device_mesh("cpu", (data_size, tensor_size), mesh_dim_names=("data_parallel", "tensor_parallel"))
    group = mesh["tensor_parallel"].get_group()
    torch.manual_seed(0)
    full = {"weight": torch.randn(12, 5), "bias": torch.randn(12)}
    module = nn.Linear(5, 12 // tensor_size)
    cut = TensorCut(0, blocks=2)
    module.tensor_cuts, module.tensor_group = {"weight": cut, "bias": cut}, group  # type: ignore[assignment]
    outer = nn.Sequential(module)
    if shard:
        fully_shard(outer, mesh=mesh["data_parallel"])
    where = placements(outer)
    assert set(where) == {"0.weight", "0.bias"}
    with torch.no_grad():
        for name, parameter in outer.named_parameters():
            whole = full[name.removeprefix("0.")]
            parameter.copy_(where[name].local(whole, parameter))
            assert is_sharded(parameter) == shard
            assert torch.equal(where[name].full(parameter), whole)
    return True


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("tensor_size", [1, 2])
def test_pieces_of_every_layout_make_the_whole(processes, tensor_size, shard):
    assert processes.run(4, _round_trip, tensor_size, shard) == [True] * 4


def test_a_whole_parameter_is_itself():
    value = torch.randn(3, 2)
    assert torch.equal(Placement().full(value), value)
    assert torch.equal(Placement().local(value.double(), value), value)
