"""Precision: what of a run ``trainer.precision`` does not reach, and what half precision does to gradients."""

from __future__ import annotations

import csv

import pytest
import torch
from tiny.gradients import with_adapters
from tiny.stable_diffusion import save_tiny_pipeline, tiny_stable_diffusion

from benchmarks.precision_of_gradients import PRECISIONS, cosine, gradients, tiny
from nemo_aligner_diffusion.config.load import load_config
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
