"""Precision: what of a run ``trainer.precision`` does not reach, and what half precision does to gradients."""

from __future__ import annotations

import csv

import pytest
import torch
from tiny.gradients import with_adapters
from tiny.stable_diffusion import save_tiny_pipeline, tiny_stable_diffusion
from tiny_pipelines import named

from benchmarks.precision_of_gradients import PRECISIONS, cosine, gradients, tiny
from nemo_aligner_diffusion.config.load import load_config, load_settings
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.training.build import build_model
from nemo_aligner_diffusion.training.run import run_training


def figure(file, column):
    with file.open(encoding="utf-8", newline="") as handle:
        return float(next(csv.DictReader(handle))[column])


def test_the_precision_of_the_weights_is_not_that_of_the_reward(tmp_path, monkeypatch):
    """The reward has rm.trainer.precision. Noise is drawn as the pipeline draws it: in the precision of its weights."""
    (tmp_path / "judge_in_float32.py").write_text(
        "import torch\n\n\n"
        "class Judge(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.weight = torch.nn.Parameter(torch.tensor([0.3, 0.6, 0.7]))\n\n"
        "    def forward(self, images, prompts):\n"
        "        assert self.weight.dtype == torch.float32\n"
        "        return torch.einsum('bchw,c->b', images.float(), self.weight) / images[0, 0].numel()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = [
        "rm=custom",
        "rm.import_path=judge_in_float32:Judge",
        "rm.augment.noise_std=0.1",
        f"model.from_pretrained={save_tiny_pipeline(tmp_path / 'pipeline')}",
        "family=embedded",
        "model.data.validation.max_prompts=3",
        "model.infer.inference_steps=2",
        "model.truncation_steps=1",
        "model.kl_coeff=0",
        "model.micro_batch_size=2",
        "model.global_batch_size=2",
        "trainer.accelerator=cpu",
        "trainer.draftp_sd.max_steps=1",
        "report.enable=false",
    ]
    found = {}
    for precision in ("32", "64-true", "bf16-true"):
        directory = tmp_path / precision
        more = [f"trainer.precision={precision}", f"exp_manager.explicit_log_dir={directory}"]
        assert run_training(load_config("draftp_sd", [*words, *more])) == 0
        files = (("validation.csv", "base_reward"), ("metrics.csv", "reward"))
        found[precision] = [figure(directory / name, column) for name, column in files]
    for precision in ("64-true", "bf16-true"):  # other noise, of the same distribution
        assert found[precision] == pytest.approx(found["32"], rel=2e-2)
        assert found[precision] != found["32"]


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("sd", ["model.peft.peft_scheme=sdlora"]),
        ("sd", ["model.peft.peft_scheme=none"]),
        ("sd", ["model.peft.peft_scheme=none", "trainer.precision=bf16"]),
        ("flux", ["model.peft.peft_scheme=none"]),
        ("flux", ["model.peft.peft_scheme=sdlora"]),
    ],
    ids=["LoRA", "every weight", "every weight, mixed", "transformer", "transformer, LoRA"],
)
def test_frozen_weights_in_bfloat16(tmp_path, family, more):
    row = named(family)
    row.build().save_pretrained(tmp_path / "pipeline")
    words = [
        *more,
        "rm=symmetry",
        f"model.from_pretrained={tmp_path / 'pipeline'}",
        *(f"model.{'infer' if key in ('height', 'width') else 'pipeline.arguments'}.{key}={value}"
          for key, value in row.arguments.items()),
        "model.infer.unconditional_guidance_scale=2",
        "model.infer.inference_steps=2",
        "model.truncation_steps=1",
        "model.kl_coeff=0.1",
        "model.micro_batch_size=2",
        "model.global_batch_size=2",
        "model.data.validation.max_prompts=2",
        "trainer.accelerator=cpu",
        "trainer.draftp_sd.max_steps=2",
        "report.enable=false",
    ]  # fmt: skip
    rewards = {}
    for precision in ("32", "bf16"):
        directory = tmp_path / precision
        word = f"model.frozen_precision={precision}"
        assert run_training(load_config("draftp_sd", [*words, word, f"exp_manager.explicit_log_dir={directory}"])) == 0
        rewards[precision] = figure(directory / "validation.csv", "base_reward")
        assert figure(directory / "metrics.csv", "grad_norm") > 0
    assert rewards["bf16"] == pytest.approx(rewards["32"], rel=0.05)  # other noise, too: drawn in bfloat16
    assert rewards["bf16"] != rewards["32"]
    model = build_model(load_settings("draftp_sd", [*words, "model.frozen_precision=bf16"]))
    found = {p.requires_grad: p.dtype for p in model.parameters()}
    assert all(p.dtype == found[p.requires_grad] for p in model.parameters())
    assert found == {True: torch.float32, False: torch.bfloat16}


def test_frozen_weights_have_one_precision():
    with pytest.raises(ConfigurationError, match="frozen_precision = bf16 with trainer.precision = bf16-true, which"):
        load_settings("draftp_sd", ["model.frozen_precision=bf16", "trainer.precision=bf16-true"])


@pytest.mark.parametrize("name", list(PRECISIONS))
def test_scaling_the_objective_saves_float16_from_a_tiny_gradient(name):
    model = with_adapters(tiny_stable_diffusion(), ("to_q", "to_v"))
    dtype, autocast = PRECISIONS[name]
    short = {"steps": 2, "active": 1}
    expected = gradients(model, torch.float32, None, tiny, 1.0, **short)
    scaled = gradients(model, dtype, autocast, tiny, 256.0, **short)
    for found, true in zip(scaled, expected, strict=True):
        assert cosine(found, true) > 0.97
        assert 0.9 < float(found.norm() / true.norm()) < 1.1  # the scale is divided out
    if "float16" in name.split()[0]:
        lost = gradients(model, dtype, autocast, tiny, 1.0, **short)
        assert all(cosine(found, true) < 0.5 for found, true in zip(lost, expected, strict=True))
