"""Each family in its published block structure, narrow, by the words that a user types: in, trained, out, spread."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors.torch import load_file
from test_files_in import in_cache
from tiny.published import PUBLISHED, narrow
from tiny.runs import rows

from nemo_aligner_diffusion.cli.export import main as export
from nemo_aligner_diffusion.config.load import load_config
from nemo_aligner_diffusion.runtime.signals import Interruption
from nemo_aligner_diffusion.training.run import train
from nemo_aligner_diffusion.training.settings import RunSettings

SLOW = pytest.mark.slow
SIZE, STEPS = 32, 2
# what a text encoder of two layers, or few letters a token, needs said
ARGUMENTS: dict[str, dict[str, Any]] = {
    "sd35": {"max_sequence_length": 8},
    "flux1": {"max_sequence_length": 8},
    "flux2_klein": {"max_sequence_length": 48},
    "z_image": {"max_sequence_length": 48},
}
EACH = pytest.mark.parametrize("family", PUBLISHED)


def words(family: str, source: str | Path, prompts: Path, directory: Path, *more: str) -> list[str]:
    return [
        f"model.from_pretrained={source}",
        "rm=symmetry",
        f"model.data.train.webdataset.local_root_path={prompts}",
        f"model.infer.inference_steps={STEPS}",
        f"model.infer.height={SIZE}",
        f"model.infer.width={SIZE}",
        *(f"model.pipeline.arguments.{name}={value}" for name, value in ARGUMENTS.get(family, {}).items()),
        "model.peft.lora_tuning.adapter_dim=4",
        "model.micro_batch_size=2",
        "model.global_batch_size=2",
        "model.optim.lr=0.01",
        "sched=constant",
        "trainer.accelerator=cpu",
        "trainer.draftp_sd.max_steps=2",
        "trainer.draftp_sd.val_check_interval=0",
        f"exp_manager.explicit_log_dir={directory}",
        "report.enable=false",
        *more,
    ]


def trained(family: str, source: str | Path, prompts: Path, directory: Path, *more: str) -> Any:
    """The model after a run whose figures are right; ``run_training`` is this, but for its exit code."""
    cfg = load_config("draftp_sd", words(family, source, prompts, directory, *more))
    assert cfg.model.family == family, cfg.model.family_because
    ended = train(RunSettings.of(cfg), Interruption())
    assert ended.code == 0
    figures = rows(directory / "metrics.csv")
    assert all(float(row["grad_norm"]) > 0 and torch.tensor(float(row["loss"])).isfinite() for row in figures)
    return ended.module.model


def pictures(family: str, pipe: Any) -> torch.Tensor:
    if family == "sd15":  # the recipe's; the folder says PNDM
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    given = {"negative_prompt": [" "]} if family == "qwen_image" else {}
    size = {"height": SIZE, "width": SIZE, "num_inference_steps": STEPS, "output_type": "pt"}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return pipe(prompt=["a red cube"], generator=generator, **size, **given, **ARGUMENTS.get(family, {})).images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def saved(family: str) -> Path:
        path = tmp_path_factory.mktemp(family) / "model"
        narrow(family).save_pretrained(path)
        return path

    return saved


def plain(folder: Path) -> Any:
    return DiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)


@EACH
def test_an_adapter_of_a_folder_and_its_exports(family: str, folder: Any, prompts: Path, tmp_path: Path) -> None:
    source, run = folder(family), tmp_path / "run"
    tuned = pictures(family, trained(family, source, prompts, run).pipe)
    assert (tuned - pictures(family, plain(source))).abs().max() > 0.01
    # diffusers' layout
    pipe = plain(source)
    pipe.load_lora_weights(run / "export", weight_name="pytorch_lora_weights.safetensors")
    assert (tuned - pictures(family, pipe)).abs().max() < 1e-3
    # kohya's
    assert export([str(run), "--to", "kohya", "--output", str(tmp_path / "kohya.safetensors")]) == 0
    assert any(name.endswith(".alpha") for name in load_file(tmp_path / "kohya.safetensors"))
    pipe = plain(source)
    pipe.load_lora_weights(load_file(tmp_path / "kohya.safetensors"))
    assert (tuned - pictures(family, pipe)).abs().max() < 1e-3
    # merged
    assert export([str(run), "--to", "pipeline", "--output", str(tmp_path / "merged")]) == 0
    assert (tuned - pictures(family, plain(tmp_path / "merged"))).abs().max() < 1e-3


@EACH
def test_all_weights_of_a_hub_id(
    family: str, folder: Any, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_cache(monkeypatch, tmp_path / "cache", "someone/narrow", folder(family))
    more = ["model.peft.peft_scheme=none", "model.optim.lr=1e-3", "trainer.draftp_sd.max_steps=1"]
    model = trained(family, "someone/narrow", prompts, tmp_path / "run", *more)
    pipe = plain(folder(family))
    base = {name: tensor.clone() for name, tensor in getattr(pipe, model.trained).state_dict().items()}
    exported = type(model.denoiser).from_pretrained(tmp_path / "run" / "export" / model.trained)
    unmoved = [name for name, tensor in exported.state_dict().items() if torch.equal(tensor, base[name])]
    assert len(unmoved) < 0.2 * len(base), unmoved
    setattr(pipe, model.trained, exported)
    assert (pictures(family, model.pipe) - pictures(family, pipe)).abs().max() < 1e-3
