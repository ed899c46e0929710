"""NeMo-Aligner 0.7's own two configurations, unchanged: every key acts, is refused by name or is in the list of keys
without effect, and the runs start."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from tiny.runs import rows
from tiny_pipelines import named

from nemo_aligner_diffusion.api import _read_model
from nemo_aligner_diffusion.config.load import load_config
from nemo_aligner_diffusion.config.nemo_names import ALIASES, HALVES, NOT_YET, WITHOUT_EFFECT, pattern_of
from nemo_aligner_diffusion.config.schema import vocabulary
from nemo_aligner_diffusion.diffusion.generate import generate
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.keys import flatten
from nemo_aligner_diffusion.training.build import build_model, build_sampling
from nemo_aligner_diffusion.training.run import run_training
from nemo_aligner_diffusion.training.settings import RunSettings

NEMOS = Path(__file__).parent / "reference" / "nemo_aligner"
# What NeMo-Aligner's code reads besides (megatron_sd(xl)_draftp_model.py, supervised.py, train_sdxl_draftp.py).
READ_BESIDES = ["model.infer.vae_batch_size", "model.transformer_engine", "model.megatron_amp_O2", "model.ddp_overlap",
                "model.fsdp_limit_all_gathers", "model.fsdp_sharding_strategy", "model.fsdp_cpu_offload",
                "model.fsdp_grad_reduce_dtype", "fsdp_set_buffer_dtype", "trainer.draftp_sd.limit_train_batches",
                "trainer.draftp_sd.inference_metrics"]  # fmt: skip


def leaves(name: str) -> dict[str, Any]:
    return flatten(yaml.safe_load((NEMOS / f"{name}.yaml").read_text(encoding="utf-8")))


def becomes(key: str) -> str:
    """What becomes of a key: a word, empty where nobody knows it."""
    halves = {half for pair in HALVES.values() for half in pair}
    if vocabulary("draftp_sd").kind_of(key) is not None or key in ALIASES or key in halves:
        return "acts"
    if key in NOT_YET:
        return "is refused"
    return "has no effect" if pattern_of(key, WITHOUT_EFFECT) is not None else ""


@pytest.mark.parametrize("name", ["draftp_sd", "draftp_sdxl"])
def test_every_key_acts_or_is_named(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        cfg = load_config(name, config_dir=NEMOS)
    given = leaves(name)
    assert len(given) > 120
    unknown = [key for key in [*given, *READ_BESIDES] if not becomes(key)]
    assert unknown == []
    for key, value in given.items():
        if becomes(key) == "has no effect" and value is not None:
            assert f"{key}:" in caplog.text or f"{key}," in caplog.text, key
    shown = flatten(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
    for key, value in given.items():  # what has a name of ours has its value
        own = key.replace("trainer.draftp_sd.", f"trainer.{name}.")
        if vocabulary(name).kind_of(own) is not None and "${" not in str(value) and not isinstance(value, list | dict):
            assert shown[own] == value or str(shown[own]) == str(value) or shown[own] == float(value), key


def test_sdxls_sampling_section_acts() -> None:
    cfg = load_config("draftp_sdxl", config_dir=NEMOS)
    infer = cfg.model.infer
    assert (infer.inference_steps, infer.unconditional_guidance_scale, infer.sampler_type) == (40, 5.0, "Euler")
    assert (infer.height, infer.width) == (1024, 1024)
    assert cfg.model.pipeline.arguments == {"original_size": [1024, 1024], "crops_coords_top_left": [0, 0]}
    assert set(cfg.trainer.draftp_sdxl) >= {"max_steps", "save_interval"}
    assert "draftp_sd" not in cfg.trainer
    half = ["model.sampling.base.orig_width=768", "model.sampling.base.crop_coords_top=8"]
    over = load_config("draftp_sdxl", half, config_dir=NEMOS).model.pipeline.arguments
    assert over == {"original_size": [1024, 768], "crops_coords_top_left": [8, 0]}
    with pytest.raises(ConfigurationError, match=r"base.orig_height is not given: .*needs both"):
        load_config("draftp_sdxl", half[:1])
    with pytest.raises(ConfigurationError, match=r"base.orig_width = -1: expected an integer >= 0"):
        load_config("draftp_sdxl", ["model.sampling.base.orig_width=-1"], config_dir=NEMOS)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SDXL's folder: not to be changed."""
    folder = tmp_path_factory.mktemp("model") / "sdxl"
    named("sdxl").build().save_pretrained(folder)
    return folder


SMALL = ["trainer.accelerator=cpu", "trainer.precision=32", "trainer.draftp_sd.max_steps=1", "report.enable=false",
         "exp_manager.create_tensorboard_logger=false", "model.data.validation.max_prompts=1",
         "model.data.validation.seeds=[0]"]  # fmt: skip


@pytest.mark.parametrize("name", ["draftp_sd", "draftp_sdxl"])
def test_the_runs_start(name: str, pipeline: Path, sdxl: Path, prompts: Path, tmp_path: Path) -> None:
    """With tiny weights, pictures, one step and a processor in place of a GPU; all else is NeMo's."""
    directory = tmp_path / "run"
    words = [f"model.from_pretrained={sdxl if name == 'draftp_sdxl' else pipeline}", *SMALL]
    words += [f"model.data.webdataset.local_root_path={prompts}", f"exp_manager.explicit_log_dir={directory}"]
    section = "model.sampling.base" if name == "draftp_sdxl" else "model.infer"
    steps = "steps" if name == "draftp_sdxl" else "inference_steps"
    words += [f"{section}.height=16", f"{section}.width=16", f"{section}.{steps}=2"]
    assert run_training(load_config(name, words, config_dir=NEMOS)) == 0
    (step,) = rows(directory / "metrics.csv")
    assert float(step["grad_norm"]) > 0
    assert (directory / "export" / "pytorch_lora_weights.safetensors").is_file()
    written = yaml.safe_load((directory / "config.yaml").read_text("utf-8"))
    assert written["model"]["family"] == ("sdxl" if name == "draftp_sdxl" else "other")
    assert written["exp_manager"]["ema"]["enable"] is True


def test_a_pipeline_object_brings_its_family() -> None:
    _, words = _read_model(named("flux").build())
    model = load_config("draftp_sd", words).model
    assert (model.family, model.family_because, model.infer.height) == ("flux1", "it is a FluxPipeline", 512)


def test_size_and_crop_conditioning_reach_the_pipeline(sdxl: Path) -> None:
    """The picture is that of the plain call with ``original_size`` and ``crops_coords_top_left``, and no other's."""
    sampling = ["width=16", "height=16", "steps=2", "scale=3"]
    words = ["rm=symmetry", f"model.from_pretrained={sdxl}", *(f"model.sampling.base.{word}" for word in sampling)]
    conditions = ["orig_width=24", "orig_height=40", "crop_coords_top=2", "crop_coords_left=4"]

    def picture(*more: str) -> torch.Tensor:
        settings = RunSettings.of(load_config("draftp_sdxl", [*words, *(f"model.sampling.base.{m}" for m in more)]))
        model = build_model(settings)
        with model.reference():
            return generate(model, ["red apple"], [3], build_sampling(settings.model.infer))

    pipe = named("sdxl").build()

    def plain(**conditioning: Any) -> torch.Tensor:
        return pipe("red apple", num_inference_steps=2, guidance_scale=3.0, height=16, width=16, output_type="pt",
                    generator=[torch.Generator().manual_seed(3)], **conditioning).images  # fmt: skip

    conditioned = plain(original_size=(40, 24), crops_coords_top_left=(2, 4))
    torch.testing.assert_close(picture(*conditions), conditioned, atol=2e-6, rtol=0)
    torch.testing.assert_close(picture(), plain(), atol=2e-6, rtol=0)
    assert (conditioned - plain()).abs().max() > 1e-3
