"""The network of the steps without gradient: what it computes and shares, and that the trained one is not touched."""

from __future__ import annotations

import pytest
import torch
from naive_loop import PROMPTS, naive_run
from test_pipelines_further import NO_PROMPT, available, gradient
from test_trajectory_oracles import PLANS, SAMPLERS, STEPS, TARGETS, build
from tiny.gradients import flat, relative, run, with_adapters
from tiny.stable_diffusion import tiny_stable_diffusion
from tiny_pipelines import MAIN, ROWS, named

from nemo_aligner_diffusion.config.load import load_settings
from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.diffusion.lora import add_lora
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.network.compiled import Compiled
from nemo_aligner_diffusion.diffusion.network.rollout_network import RolloutNetwork, rollout_network_of
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.training.build import rollout_precision


def given_one(model: DiffusionModel, precision: str = "same") -> RolloutNetwork:
    model.rollout_network = RolloutNetwork(model.denoiser, precision)
    model.rollout_network.refresh()
    return model.rollout_network


def calls_of(model: DiffusionModel) -> list[int]:
    """Counts the network's own calls and the copy's."""
    counts = [0, 0]
    for place, network in enumerate((model.denoiser, model.rollout_network.network)):
        network.register_forward_hook(lambda *_, place=place: counts.__setitem__(place, counts[place] + 1))
    return counts


@pytest.mark.parametrize("plan", ["draft_k", "drtune", "draft_lv", "refl", "alignprop", "share", "gain"])
@pytest.mark.parametrize(("sampler", "eta"), SAMPLERS)
def test_folded_the_gradient_is_that_of_the_definition(sampler, eta, plan):
    model, parts, inputs = build(sampler, eta)
    given_one(model)
    counts = calls_of(model)
    result, _ = run(model, PLANS[plan], inputs, reference=True)
    trained = counts[0]
    assert counts[1] > 0
    assert trained < STEPS * 2  # the active steps and their reference alone
    got = flat(model, result.surrogate(0.7))
    assert relative(got, flat(model, naive_run(model, parts, result.plan, STEPS, eta, 0.7).loss)) < 1e-9


def test_in_bf16_the_latents_are_others_and_the_gradient_nearly_the_same():
    model = with_adapters(tiny_stable_diffusion(torch.float32), TARGETS)
    inputs = model.inputs(PROMPTS, STEPS, 2.5, 16, 16)
    exact = flat(model, run(model, PLANS["draft_k"], inputs)[0].surrogate())
    given_one(model, "bf16")
    result, _ = run(model, PLANS["draft_k"], inputs)
    assert result.ends[0].dtype == torch.float32
    got = flat(model, result.surrogate())
    assert 1e-5 < relative(got, exact) < 0.05
    assert torch.nn.functional.cosine_similarity(got, exact, 0) > 0.999


def test_kept_steps_are_computed_once():
    model, _, inputs = build()
    counts = []
    model.denoiser.register_forward_hook(lambda *_: counts.append(1))
    calls = {}
    for kept in (0, 1, 2, 9, None):
        result, _ = run(model, PLANS["draft_k"], inputs, kept_steps=kept)
        counts.clear()
        result.surrogate().backward()
        calls[kept] = len(counts)
    assert calls == {0: 2, 1: 1, 2: 0, 9: 0, None: 0}


@pytest.mark.parametrize("precision", ["same", "bf16"])
def test_folding_leaves_the_trained_network_as_it_was_and_follows_it(precision):
    model = load_model()
    add_lora(model.denoiser, 4, target_modules=model.lora_targets)
    adapters = model.trainable_parameters()
    for name, parameter in adapters:
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    before = {name: value.clone() for name, value in model.denoiser.state_dict().items()}
    copied = given_one(model, precision)
    first = {name: value.clone() for name, value in copied.network.state_dict().items()}
    after = model.denoiser.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any("lora" in name for name in first)
    shared = {p.data_ptr() for p in model.denoiser.parameters()} & {p.data_ptr() for p in copied.network.parameters()}
    assert shared  # norms at least are one tensor
    with torch.no_grad():
        for _, parameter in adapters:
            parameter.mul_(1.5)
    copied.refresh()
    moved = {name: value.clone() for name, value in copied.network.state_dict().items()}
    assert any(not torch.equal(value, moved[name]) for name, value in first.items())
    fresh = given_one(model, precision).network.state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in moved.items())
    model.denoiser.load_state_dict(before)
    copied.refresh()
    assert all(torch.equal(value, first[name]) for name, value in copied.network.state_dict().items())


def test_of_every_weight_the_copy_in_bf16_follows():
    model = tiny_stable_diffusion(torch.float32)
    model.denoiser.requires_grad_(True)
    copied = given_one(model, "bf16")
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            parameter.add_(0.25)
    copied.refresh()
    trained = model.denoiser.state_dict()
    for name, value in copied.network.state_dict().items():
        assert torch.equal(value, trained[name].to(value.dtype)), name
    assert {value.dtype for value in copied.network.state_dict().values()} == {torch.float32, torch.bfloat16}


def test_it_has_the_attention_processors_that_a_pipeline_gives_the_network():
    row = named("sd-pag")
    model = with_adapters(DiffusionModel(row.build(row.dtype)), row.lora_targets)
    given_one(model)
    kinds = []
    model.rollout_network.network.register_forward_pre_hook(
        lambda network, _: kinds.append({type(p).__name__ for p in network.attn_processors.values()})
    )
    gradient(row, model, kept_steps=0)
    assert kinds
    assert all(any("PAG" in kind for kind in of) for of in kinds)


def test_an_adapter_that_is_no_plain_lora_is_refused():
    from peft import LoraConfig

    model = tiny_stable_diffusion(torch.float32)
    model.denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q"], use_dora=True))
    with pytest.raises(ConfigurationError, match=r"to_q .* is not plain LoRA.*rollout_precision=null"):
        rollout_network_of(model.denoiser, "bf16", fast=True, share=True)
    assert rollout_network_of(model.denoiser, "auto", fast=True, share=True) is None


def test_bf16_has_no_place_in_float64(tmp_path):
    settings = load_settings("draftp_sd", ["trainer.precision=64", "model.rollout_precision=bf16"])
    with pytest.raises(
        ConfigurationError, match=r"rollout_precision = bf16 with trainer.precision = 64.* expected same"
    ):
        rollout_precision(settings)
    assert rollout_precision(load_settings("draftp_sd", ["trainer.precision=64"])) == "same"
    assert rollout_precision(load_settings("draftp_sd", [])) == "auto"


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=() if row in MAIN else pytest.mark.slow) for row in ROWS], ids=lambda row: row.name
)
def test_through_every_pipeline(row):
    """Arguments of every kind: times, positions, masks, pooled states, controls."""
    available(row)
    if row.name in NO_PROMPT:
        pytest.skip("it takes no prompt")
    for dtype, precision in ((row.dtype, "same"), (torch.float32, "bf16")):
        model = DiffusionModel(row.build(dtype), row.train, row.stateless)
        if hasattr(model.denoiser, "add_adapter"):
            with_adapters(model, row.lora_targets)
        else:
            model.denoiser.requires_grad_(True)
        exact = gradient(row, model, kept_steps=0)
        given_one(model, precision)
        got = gradient(row, model, kept_steps=0)
        if precision == "same":
            assert relative(got, exact) < (1e-9 if dtype == torch.float64 else 1e-4)
        elif row.name != "kandinsky3":  # whose random network makes 16 % of a rounding
            assert torch.nn.functional.cosine_similarity(got, exact, 0) > 0.98


@pytest.mark.slow
def test_compiled_it_computes_the_same(caplog):
    pytest.importorskip("torch._inductor")
    model = with_adapters(tiny_stable_diffusion(torch.float32), TARGETS)
    inputs = model.inputs(PROMPTS, STEPS, 2.5, 16, 16)
    exact = flat(model, run(model, PLANS["draft_k"], inputs)[0].surrogate())
    model.rollout_network = RolloutNetwork(model.denoiser, compile_mode="default")
    model.rollout_network.refresh()
    with caplog.at_level("INFO"):
        got = [flat(model, run(model, PLANS["draft_k"], inputs)[0].surrogate()) for _ in range(2)]
    assert sum("model.rollout_compile: compiled in" in line for line in caplog.messages) == 1  # one graph, once
    assert all(relative(x, exact) < 1e-4 for x in got)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [None, 0], ids=["kept", "made again"])
def test_compiled_steps_with_gradient_have_the_same(caplog, kept):
    pytest.importorskip("torch._inductor")
    model = with_adapters(tiny_stable_diffusion(torch.float32), TARGETS)
    inputs, names = model.inputs(PROMPTS, STEPS, 2.5, 16, 16), list(model.state_dict())
    exact = flat(model, run(model, PLANS["draft_k"], inputs, reference=True)[0].surrogate(0.7))
    model.compiled = Compiled(model.denoiser, "default", "model.replay_compile")
    given_one(model)
    said = []
    for _ in range(2):
        with caplog.at_level("INFO"):
            result, _ = run(model, PLANS["draft_k"], inputs, reference=True, kept_steps=kept)
            assert relative(flat(model, result.surrogate(0.7)), exact) < 1e-4
        said.append(sum("model.replay_compile: compiled in" in line for line in caplog.messages))
    assert said[0] == said[1] == 2  # kept: for latents without gradient, the first step's, and with; again: off and on
    assert list(model.state_dict()) == names


def test_what_compiling_needs(monkeypatch):
    with pytest.raises(ConfigurationError, match=r"rollout_compile = default is of the rollout's copy"):
        load_settings("draftp_sd", ["model.rollout_compile=default", "model.rollout_precision=null"])
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(ConfigurationError, match=r"needs a C\+\+ compiler.*g\+\+"):
        RolloutNetwork(tiny_stable_diffusion(torch.float32).denoiser, compile_mode="default")
