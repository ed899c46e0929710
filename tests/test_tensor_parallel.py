"""Tensor parallelism: a cut UNet computes what the whole one does, output and every gradient."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from process_pool import ProcessPool
from tiny import tensor_parallel as toy
from transformers import CLIPConfig, CLIPModel

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.parallel.tensor.plans import check_tensor_parallel


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize(
    ("name", "size"),
    [("sd15", 1), ("sd15", 2), ("sd15", 4), ("sd2", 2), ("sdxl", 2), ("sdxl", 4), ("scale_shift", 2), ("embedded", 4)],
)
def test_cut_model_is_the_whole_model(processes: ProcessPool, name: str, mode: str, size: int) -> None:
    for answer in processes.run(size, toy.compare, name, mode):
        assert answer["difference"][0] < 1e-10, answer["difference"]
        assert answer["compared"] > 40
        if mode == "lora":
            assert answer["off"][0] < 1e-10
            assert answer["on again"]
            assert answer["moved"] > 1e-3


@pytest.mark.parametrize(
    ("name", "mode"), [("sd15", "checkpointed"), ("sdxl", "dropout"), ("scale_shift", "two_adapters")]
)
def test_ways_of_training(processes: ProcessPool, name: str, mode: str) -> None:
    """Recomputed activations; dropout, with the masks of the whole model; two weighted adapters with biases."""
    for answer in processes.run(2, toy.compare, name, mode):
        assert answer["difference"][0] < 1e-10, answer["difference"]
        assert answer["calls"] > 1.5 if mode == "checkpointed" else answer["calls"] == 1


@pytest.mark.parametrize("mode", ["full", "checkpointed"])
def test_sharded_by_fsdp_on_top(processes: ProcessPool, mode: str) -> None:
    for difference in processes.run(4, toy.compare_sharded, "sdxl", mode):
        assert difference[0] < 1e-10, difference


def test_all_reduces_are_as_few_as_can_be(processes: ProcessPool) -> None:
    """Forward: one a row layer. Backward: one for query, key and value together, one for each other column layer."""
    for transformers, residuals, forward, backward in processes.run(2, toy.all_reduces, "sd15"):
        assert transformers == 4
        assert residuals == 8
        assert forward == 3 * transformers + residuals
        # a residual block's first convolution and its time projection; text states need no gradient
        assert backward == 3 * transformers + 2 * residuals


@pytest.mark.parametrize(
    ("name", "change", "size", "message"),
    [
        ("sd15", "no plan", 1, "ConfigurationError: .* no tensor-parallel plan for Linear; .*UNet2DConditionModel"),
        ("sd15", "cut", 2, "ValueError: this UNet2DConditionModel is cut .* already"),
        ("sd15", "dora", 2, "ConfigurationError: .*attn1.to_q: .*DoRA .use_dora.*use plain LoRA"),
        ("sd15", "lokr", 2, "ConfigurationError: .*attn1.to_q: only LoRA adapters .* not peft.tuners.lokr"),
        ("sd15", "fused", 2, "ConfigurationError: .*fused projections; call unfuse_qkv_projections"),
        ("sd15", "", 3, "ConfigurationError: .*is 3, .* attention heads: 4 .*Sizes that work: 1, 2, 4$"),
    ],
)
def test_what_cannot_be_cut_is_refused_untouched(
    processes: ProcessPool, name: str, change: str, size: int, message: str
) -> None:
    for answer in processes.run(size, toy.refused, name, change):
        assert re.match(message, answer), answer


def empty_unet(**change: Any) -> torch.nn.Module:
    """SD 1.5's, without memory."""
    with torch.device("meta"):
        return UNet2DConditionModel(**{"cross_attention_dim": 768, "attention_head_dim": 8, **change})


@pytest.mark.parametrize(
    ("change", "size", "message"),
    [
        ({}, 3, r"attention heads: 8 .*feed-forward features: 1280, 2560, 5120 .*groups: 32 .*: 1, 2, 4, 8$"),
        ({}, 16, r"attention heads: 8 \(first in down_blocks.0.*attn1\)\. Sizes that work: 1, 2, 4, 8$"),
        ({"attention_head_dim": [5, 10, 20, 20]}, 2, "attention heads: 5 .*Sizes that work: 1$"),
        ({"norm_num_groups": 5}, 2, "group-norm groups: 5 .*Sizes that work: 1$"),
        (
            {
                "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
                "encoder_hid_dim": 8,
                "encoder_hid_dim_type": "text_proj",
            },
            2,
            "add_k_proj",
        ),
    ],
)
def test_sizes_are_checked_before_anything_is_cut(change: dict[str, Any], size: int, message: str) -> None:
    unet = empty_unet(**change)
    with pytest.raises(ConfigurationError, match=message) as caught:
        check_tensor_parallel(unet, size)
    assert "model.tensor_model_parallel_size" in str(caught.value)
    with pytest.raises(ConfigurationError, match=r"rm\.tensor"):
        check_tensor_parallel(unet, size, "rm.tensor_model_parallel_size")


def test_sizes_that_work_pass_the_check() -> None:
    for size in (1, 2, 4, 8):
        check_tensor_parallel(empty_unet(), size)
    with pytest.raises(ConfigurationError, match="no tensor-parallel plan for Linear"):
        check_tensor_parallel(torch.nn.Linear(2, 2), 2)


def test_a_missing_engine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron", None)
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    for module in ("layers", "lora"):
        monkeypatch.delitem(sys.modules, f"nemo_aligner_diffusion.parallel.tensor.{module}", raising=False)
    with pytest.raises(ConfigurationError, match=r"nemo-aligner-diffusion\[megatron\]"):
        check_tensor_parallel(empty_unet(), 2)


def test_most_of_a_model_is_cut() -> None:
    model = empty_unet()
    assert sum(p.numel() for p in model.parameters()) == 859_520_964
    assert toy.cut_share(model) == pytest.approx(0.8803, abs=1e-4)


@pytest.mark.parametrize("size", [2, 4])
def test_clip_reward_is_exact_down_to_the_picture(processes: ProcessPool, size: int) -> None:
    for difference in processes.run(size, toy.compare_clip):
        assert difference[0] < 1e-10, difference
    with pytest.raises(ConfigurationError, match=r"rm\.tensor.* is 8, but this CLIPModel .*heads: 4 .*work: 1, 2, 4"):
        check_tensor_parallel(CLIPModel(CLIPConfig(**toy.clip_config())), 8, "rm.tensor_model_parallel_size")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["full", "lora", "checkpointed"])
def test_one_gpu_with_nccl(tmp_path: Path, mode: str) -> None:
    torch.distributed.init_process_group(
        "nccl", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        assert toy.compare("sdxl", mode, "cuda")["difference"][0] < 1e-10
    finally:
        torch.distributed.destroy_process_group()
