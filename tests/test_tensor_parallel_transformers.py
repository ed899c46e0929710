"""Diffusion transformers spread over processes compute what the whole ones do: output, gradients, norms."""

from __future__ import annotations

import itertools

import pytest
from process_pool import ProcessPool
from tiny import cut_transformers as toy

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
        assert answer["difference"][0] < 1e-5, answer["difference"]
        assert answer["held"] < 0.6


@pytest.mark.parametrize("kind", ["t5", "qwen3", "qwen-vl"])
def test_a_cut_text_encoder_is_the_whole_one(processes: ProcessPool, kind: str) -> None:
    for apart, held in processes.run(2, toy.compare_text_encoder, kind):
        assert apart < 1e-5
        assert held < 0.7
