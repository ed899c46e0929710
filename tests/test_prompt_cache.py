"""Prompts that are encoded once: the encoders are called less, pictures and gradients are those of the plain call."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_decoding import LAST, gradient, inputs_of, model_of
from tiny.gradients import flat, generators, relative, run
from tiny_pipelines import PROMPTS
from torch import Tensor

from nemo_aligner_diffusion.config.load import load_settings
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.taps import PromptCache
from nemo_aligner_diffusion.diffusion.trajectory import sample
from nemo_aligner_diffusion.errors import ConfigurationError


def counted(model: DiffusionModel) -> list[int]:
    """Rows that the text encoders are called with, from now on."""
    rows: list[int] = []

    def before(_: Any, args: Any, kwargs: Any) -> None:
        rows.append(len(args[0] if args else kwargs["input_ids"]))

    for name, network in model.networks.items():
        if name.startswith("text_encoder"):
            network.register_forward_pre_hook(before, with_kwargs=True)
    return rows


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux-2-klein", "qwen-image", "z-image"])
def test_each_prompt_is_encoded_once_and_changes_nothing_but_rounding(name: str) -> None:
    model = model_of(name)
    expected, pictures = gradient(model, name)
    model.prompt_cache = PromptCache(16)
    rows = counted(model)
    found, again = gradient(model, name)
    assert relative(found, expected) < 1e-10
    assert (again - pictures).abs().max() < 1e-12
    assert set(rows) == {1}
    before = len(rows)
    known, same = gradient(model, name)
    assert len(rows) == before
    assert torch.equal(known, found)
    assert torch.equal(same, again)


@pytest.mark.parametrize(("name", "dtype", "close"), [("sd", torch.float32, 1e-6), ("sd3", torch.float64, 1e-12)])
def test_embeddings_do_not_depend_on_the_batch(name: str, dtype: torch.dtype, close: float) -> None:
    model = model_of(name, dtype)
    encoder = model.networks["text_encoder"]
    tokens = model.pipe.tokenizer(
        [*PROMPTS, PROMPTS[0]], padding="max_length", max_length=8, truncation=True, return_tensors="pt"
    ).input_ids
    plain = encoder(tokens, output_hidden_states=True)

    def encoded(cache: PromptCache, rows: Tensor) -> list[Tensor]:
        out = cache("text_encoder", encoder, rows, output_hidden_states=True)
        assert out.attentions is None
        return [out[0], out.last_hidden_state, out.hidden_states[-2], *out.hidden_states[1:], out["hidden_states"][0]]

    together = encoded(PromptCache(8), tokens)
    wanted = [plain[0], plain.last_hidden_state, plain.hidden_states[-2], *plain.hidden_states[1:],
              plain["hidden_states"][0]]  # fmt: skip
    assert all(relative(a, b) < close for a, b in zip(together, wanted, strict=True))
    tight = PromptCache(1)  # forgets one for the other
    for order in ([0], [1, 0], [2], [1, 2, 0]):
        for got, whole in zip(encoded(tight, tokens[order]), together, strict=True):
            assert torch.equal(got, whole[order])


def test_forgets_the_oldest_and_says_what_it_keeps(caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def encoder(tokens: Tensor) -> Any:
        calls.append(tokens.tolist())
        return (tokens.double().repeat(1, 1000),)

    cache = PromptCache(2)
    with caplog.at_level(logging.INFO):
        for prompt in (1, 2, 1, 3, 1, 2):
            assert cache("text_encoder", encoder, torch.tensor([[prompt]]))[0].eq(prompt).all()
    assert calls == [[[1]], [[2]], [[3]], [[2]]]
    assert [record.getMessage() for record in caplog.records] == [
        "text_encoder: outputs of up to 2 prompts are kept: 0.008 MB a prompt, 0.016 MB at most",
        "text_encoder: more prompts than model.cond_stage_config.cache_prompts = 2: those that were not asked for "
        "longest are encoded again",
    ]


@pytest.mark.parametrize(
    ("arguments", "output", "why"),
    [
        ((torch.ones(2, 3, 4),), None, "is called with more than rows of tokens"),
        ((torch.ones(2, 3), SimpleNamespace()), None, "is called with more than rows of tokens"),
        ((torch.ones(2, 3),), torch.ones(3, 2), "gives (0,) not by rows"),  # as Kolors' encoder: tokens first
    ],
)
def test_what_has_no_rows_is_passed_through_and_said_once(
    arguments: Any, output: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def encoder(*given: Any) -> Any:
        calls.append(len(given[0]))
        return (given[0] if output is None else output,)

    cache = PromptCache(8)
    for _ in range(3):
        assert torch.equal(cache("text_encoder", encoder, *arguments)[0], encoder(*arguments)[0])
    assert calls[-4:] == [2, 2, 2, 2]
    assert [record.getMessage() for record in caplog.records] == [
        f"model.cond_stage_config.cache_prompts: text_encoder {why}, and is called in every step"
    ]


def test_a_prompt_set_is_encoded_once_over_a_run_of_pictures() -> None:
    model = model_of("sdxl", torch.float32)
    plain = sample(model, generators(), inputs_of(model, "sdxl"))
    model.prompt_cache = PromptCache(8)
    rows = counted(model)
    for _ in range(3):
        assert (sample(model, generators(), inputs_of(model, "sdxl")) - plain).abs().max() < 1e-5
        flat(model, run(model, LAST, inputs_of(model, "sdxl"))[0].surrogate())
    assert len(rows) == 2 * len(PROMPTS)  # negative prompts are zeros: no encoder is asked


def test_sharded_text_encoders_are_refused() -> None:
    sharded = ["trainer.devices=2", "model.fsdp=true", "model.fsdp_frozen=[text_encoder]"]
    cached = "model.cond_stage_config.cache_prompts=100"
    assert load_settings("draftp_sd", [*sharded[:2], cached]).model.cache_prompts == 100
    with pytest.raises(ConfigurationError, match=r"cache_prompts = 100 with text_encoder in model.fsdp_frozen"):
        load_settings("draftp_sd", [*sharded, cached])
