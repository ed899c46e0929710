"""Weights that are kept in 8 bits, and products in float8: what they round, what they refuse, whole runs."""

from __future__ import annotations

import csv
import sys

import pytest
import torch
from naive_loop import PROMPTS
from test_rollout_network import given_one
from test_trajectory_oracles import PLANS, TARGETS
from tiny.gradients import flat, run, with_adapters
from tiny.stable_diffusion import tiny_stable_diffusion
from tiny_pipelines import named

from nemo_aligner_diffusion.config.load import load_config, load_settings
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.network.eight_bits import dense, keep_in_8_bits, multiply_in_fp8
from nemo_aligner_diffusion.diffusion.network.rollout_network import RolloutNetwork
from nemo_aligner_diffusion.diffusion.settings import Float8Settings
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.training.build import build_model, convert_frozen, rollout_precision
from nemo_aligner_diffusion.training.run import run_training

pytestmark = pytest.mark.extras("torchao")
CPU = torch.device("cpu")
EMULATED = Float8Settings(emulate=True)


def tiny() -> DiffusionModel:
    return with_adapters(tiny_stable_diffusion(torch.float32), TARGETS)


def gradient(model: DiffusionModel) -> torch.Tensor:
    return flat(model, run(model, PLANS["draft_k"], model.inputs(PROMPTS, 4, 2.0, 16, 16))[0].surrogate())


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), 0))


@pytest.mark.parametrize(("kind", "least"), [("int8", 0.995), ("fp8", 0.97)])
def test_weights_in_8_bits_are_the_rounded_ones(kind, least):
    model = tiny()
    exact = gradient(model)
    convert_frozen(model, torch.bfloat16)
    in_16_bits = sum(p.nbytes for p in model.denoiser.parameters())
    count = keep_in_8_bits([model.denoiser], kind)
    layers = [layer for layer in model.denoiser.modules() if type(layer) is torch.nn.Linear]
    layers = [layer for layer in layers if hasattr(layer.weight, "qdata")]
    assert count == len(layers) > 20
    assert {layer.weight.qdata.element_size() for layer in layers} == {1}
    kept = gradient(model)
    assert least < cosine(kept, exact) < 1
    for layer in layers:
        layer.weight = torch.nn.Parameter(dense(layer.weight.detach()), requires_grad=False)
    assert in_16_bits == sum(p.nbytes for p in model.denoiser.parameters())
    assert cosine(kept, gradient(model)) > 0.995  # activations round to 16 bits at other places


def test_a_copy_for_the_rollout_is_made_of_weights_in_8_bits():
    model = tiny()
    convert_frozen(model, torch.bfloat16)
    keep_in_8_bits([model.denoiser], "int8")
    alone = gradient(model)
    for precision in ("same", "bf16"):
        given_one(model, precision)
        assert cosine(gradient(model), alone) > 0.995


@pytest.mark.parametrize("recipe", ["rowwise", "tensorwise"])
def test_products_in_float8(recipe):
    model = tiny()
    exact = gradient(model)
    names = [name for name, _ in model.denoiser.named_modules()]
    count = multiply_in_fp8(model.denoiser, Float8Settings(recipe=recipe, emulate=True), CPU, "it")
    changed = [name for name, layer in model.denoiser.named_modules() if type(layer).__name__ == "Float8Linear"]
    assert count == len(changed)
    assert [name for name, _ in model.denoiser.named_modules()] == names
    assert not any("lora" in name or "time_embedding" in name for name in changed)
    rounded = gradient(model)
    assert 0.9 < cosine(rounded, exact) < 0.99999


def test_the_rollouts_products_in_float8():
    model = tiny()
    exact = gradient(model)
    model.rollout_network = RolloutNetwork(model.denoiser, "fp8", fp8=EMULATED)
    model.rollout_network.refresh()
    assert not any(type(layer).__name__ == "Float8Linear" for layer in model.denoiser.modules())
    got = gradient(model)
    given_one(model, "bf16")
    assert cosine(gradient(model), exact) > cosine(got, exact) > 0.95


def test_layers_that_are_named():
    model = tiny()
    multiply_in_fp8(model.denoiser, Float8Settings(scope=("attn1.to_q",), emulate=True), CPU, "it")
    changed = [name for name, layer in model.denoiser.named_modules() if type(layer).__name__ == "Float8Linear"]
    assert changed
    assert all(name.endswith("attn1.to_q.base_layer") for name in changed)
    with pytest.raises(ConfigurationError, match=r"it: UNet2DConditionModel has no linear layer.*\['to_z'\]"):
        multiply_in_fp8(tiny().denoiser, Float8Settings(scope=("to_z",), emulate=True), CPU, "it")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trainer.precision=fp8"], r"trainer.precision=fp8 needs a GPU.*8\.9.*on cpu.*emulate=true"),
        (
            ["trainer.precision=fp8", "model.frozen_precision=int8", "model.fp8.emulate=true"],
            r"frozen_precision = int8 with trainer\.precision = fp8.*frozen_precision=bf16",
        ),
        (
            ["model.frozen_precision=fp8", "model.fsdp=true", "trainer.devices=2"],
            r"frozen_precision = fp8 with model\.fsdp = True",
        ),
        (
            ["trainer.precision=fp8", "model.tensor_model_parallel_size=2", "trainer.devices=2"],
            r"trainer\.precision = fp8.*with model\.tensor_model_parallel_size = 2.*replicas",
        ),
        (
            ["model.fp8.backend=transformer_engine", "model.fp8.emulate=true"],
            r"backend = transformer_engine with .*expected recipe=tensorwise and emulate=false",
        ),
        (["trainer.precision=64", "model.rollout_precision=fp8"], r"rollout_precision = fp8 with trainer\.precision"),
    ],
)
def test_what_does_not_go_together(words, said):
    def build():
        settings = load_settings("draftp_sd", [*words, "trainer.accelerator=cpu"])
        rollout_precision(settings)
        build_model(settings)

    with pytest.raises(ConfigurationError, match=said):
        build()


def test_packages_that_are_missing_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ConfigurationError, match=r"frozen_precision=int8 needs the package torchao.*\[quantization\]"):
        keep_in_8_bits([tiny().denoiser], "int8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    settings = Float8Settings(backend="transformer_engine", recipe="tensorwise")
    with pytest.raises(ConfigurationError, match=r"transformer_engine needs that package.*backend=torchao"):
        multiply_in_fp8(tiny().denoiser, settings, torch.device("cuda"), "trainer.precision=fp8")


@pytest.mark.parametrize("family", ["sd", "flux"])
@pytest.mark.parametrize(
    "words",
    [
        ["trainer.precision=fp8", "model.fp8.emulate=true", "model.rollout_precision=fp8"],
        ["model.frozen_precision=int8", "model.rollout_precision=bf16"],
        ["model.frozen_precision=fp8", "peft=none", "trainer.precision=bf16"],
    ],
    ids=["products", "weights", "every weight"],
)
def test_runs_and_resumes(tmp_path, family, words):
    row = named(family)
    row.build().save_pretrained(tmp_path / "pipeline")
    common = [
        *words, "rm=symmetry", f"model.from_pretrained={tmp_path / 'pipeline'}",
        *(f"model.{'infer' if key in ('height', 'width') else 'pipeline.arguments'}.{key}={value}"
          for key, value in row.arguments.items()),
        "model.fp8.scope=[to_q,to_k,to_v,to_out.0]" if family == "sd" else "model.fp8.scope=null",
        "model.infer.unconditional_guidance_scale=2", "model.infer.inference_steps=2", "model.truncation_steps=1",
        "model.kl_coeff=0.1", "model.micro_batch_size=2", "model.global_batch_size=2",
        "model.data.validation.max_prompts=2", "trainer.accelerator=cpu", "report.enable=false",
        "exp_manager.resume_if_exists=true",
    ]  # fmt: skip
    for name, stops in (("whole", (2,)), ("resumed", (1, 2))):
        for steps in stops:
            more = [f"trainer.draftp_sd.max_steps={steps}", f"exp_manager.explicit_log_dir={tmp_path / name}"]
            assert run_training(load_config("draftp_sd", [*common, *more])) == 0
    whole, resumed = ([*csv.DictReader((tmp_path / name / "metrics.csv").open())] for name in ("whole", "resumed"))
    assert [row["reward"] for row in whole] == [row["reward"] for row in resumed]
    assert float(whole[-1]["grad_norm"]) > 0
