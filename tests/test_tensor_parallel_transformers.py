"""Diffusion transformers spread over processes compute what the whole ones do: output, gradients, norms."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from process_pool import ProcessPool
from tiny import cut_transformers as toy

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.parallel.tensor.plans import check_tensor_parallel

FAMILIES = ("sd3", "flux", "flux-2-klein", "qwen-image", "z-image")
# processes, fsdp, tensor, recomputed activations
LAYOUTS = {
    "TP2": (2, False, 2, False),
    "FSDP2": (2, True, 1, False),
    "TP2 DP2": (4, False, 2, True),
    "FSDP2 TP2": (4, True, 2, False),
}
CASES = [
    pytest.param(*case, marks=() if case[1:] == ("TP2", "full") else pytest.mark.slow)
    for case in itertools.product(FAMILIES, LAYOUTS, ("full", "lora"))
]


@pytest.mark.parametrize(("name", "layout", "what"), CASES)
def test_a_spread_transformer_is_the_whole_one(processes: ProcessPool, name: str, layout: str, what: str) -> None:
    size, *how = LAYOUTS[layout]
    for answer in processes.run(size, toy.compare, name, what, *how):
        assert answer["difference"][0] < (1e-10 if answer["exact"] else 1e-5), answer["difference"]
        assert answer["compared"] > 20
        assert answer["norm"] < 1e-5  # each tensor's norm is taken in float32
        assert answer["held"] < (0.6 if how[0] else 1)  # embeddings are most of Z-Image's here


@pytest.mark.parametrize("name", [FAMILIES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES[1:])])
def test_adapters_in_float32_over_a_sharded_base_in_bfloat16(processes: ProcessPool, name: str) -> None:
    for answer in processes.run(2, toy.compare, name, "bf16", True, 1):
        # FSDP2's hooks change the order in which bfloat16 gradients are added up: by the last digit, 1/256
        assert answer["difference"][0] < 0.02, answer["difference"]
        assert answer["held"] < 0.6


@pytest.mark.parametrize("kind", ["t5", "qwen3", "qwen-vl"])
def test_a_cut_text_encoder_is_the_whole_one(processes: ProcessPool, kind: str) -> None:
    for apart, held in processes.run(2, toy.compare_text_encoder, kind):
        assert apart < 1e-5
        assert held < 0.7


def empty(kind: Any, **config: Any) -> Any:
    """A model of a published shape, without memory and with few of its blocks."""
    with torch.device("meta"):
        return kind(**config)


KLEIN = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 24, "joint_attention_dim": 7680}
PUBLISHED: dict[str, tuple[Any, dict[str, Any], str]] = {  # the sizes into which they can be cut
    "SD3.5 large": (SD3Transformer2DModel, {"num_layers": 2, "num_attention_heads": 38, "qk_norm": "rms_norm",
                                            "caption_projection_dim": 2432}, "1, 2, 19, 38"),
    "FLUX.1": (FluxTransformer2DModel, {"num_layers": 1, "num_single_layers": 1}, "1, 2, 3, 4, 6, 8, 12, 24"),
    "FLUX.2-klein": (Flux2Transformer2DModel, KLEIN, "1, 2, 3, 4, 6, 8, 12, 24"),
    "Qwen-Image": (QwenImageTransformer2DModel, {"num_layers": 1}, "1, 2, 3, 4, 6, 8, 12, 24"),
    "Z-Image": (ZImageTransformer2DModel, {"n_layers": 1}, "1, 2, 5, 10"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_sizes_of_published_transformers(name: str) -> None:
    kind, config, sizes = PUBLISHED[name]
    model = empty(kind, **config)
    with pytest.raises(ConfigurationError, match=f"cannot be cut into 7 parts.*attention heads.* work: {sizes}$"):
        check_tensor_parallel(model, 7)
    check_tensor_parallel(model, 2)
    blocks = [child for child in model.modules() if type(child).__name__ in model._no_split_modules]
    assert cut_share(torch.nn.ModuleList(blocks), check_tensor_parallel(model, 2), model) > 0.5


def cut_share(part: Any, blocks: Any, model: Any) -> float:
    """Of a part's numbers, those of layers that are cut; modulations and norms stay whole."""
    layers = [model.get_submodule(f"{b.path}.{name}") for b in blocks for name in (*b.columns, *b.rows)]
    return sum(layer.weight.numel() for layer in layers) / sum(p.numel() for p in part.parameters())


def changed(change: str) -> Any:
    model = empty(FluxTransformer2DModel, num_layers=1, num_single_layers=1)
    block = model.transformer_blocks[0]
    if change == "fused":
        block.attn.fused_projections = True
    elif change == "norm over all heads":
        block.attn.norm_q = torch.nn.RMSNorm(block.attn.inner_dim)
    elif change == "processor":
        block.attn.processor = FluxIPAdapterAttnProcessor(8, 8)
    elif change == "style":
        model._tp_plan = {**model._tp_plan, "transformer_blocks.*.attn.to_q": "moe_tp_experts"}
    else:
        model._tp_plan = {name: style for name, style in model._tp_plan.items() if name != change}
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("fused", r"blocks\.0\.attn cannot be cut, for fused projections; call unfuse_qkv_projections"),
        ("norm over all heads", r"blocks\.0\.attn cannot be cut, for norm_q, which would read what other ranks hold"),
        ("processor", "FluxIPAdapterAttnProcessor, processor, which"),
        ("style", "style moe_tp_experts; known are"),
        ("transformer_blocks.*.ff.net.2", r"blocks\.0\.ff\.net\.0\.proj cannot be cut, for no layer after it is cut"),
        ("transformer_blocks.*.ff.net.0.proj", r"blocks\.0\.ff\.net\.2 cannot be cut, for no layer before it"),
    ],
)
def test_what_a_table_cannot_cut_is_refused(change: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^model.tensor_model_parallel_size: .*{message}.*; set the key to 1"):
        check_tensor_parallel(changed(change), 2)
