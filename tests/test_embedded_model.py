"""The embedded model, reward and prompts: what is shipped is small, loads in plain libraries, and works together."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import tarfile
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from nemo_aligner_diffusion.config.load import load_settings
from nemo_aligner_diffusion.data.prompts import read_prompts
from nemo_aligner_diffusion.diffusion.generate import Sampling, generate
from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.embedded_assets import embedded_model_path, embedded_prompts_path, embedded_reward_path
from nemo_aligner_diffusion.evaluation.diversity import mean_pairwise_distance, recognisability
from nemo_aligner_diffusion.rewards import restore_reward
from nemo_aligner_diffusion.training.build import build_sampling
from nemo_aligner_diffusion.training.run import run_training

BROAD = {"a fruit", "an animal", "a vehicle", "a building"}


@pytest.fixture(scope="module")
def model():
    return load_model(embedded_model_path())


@pytest.fixture(scope="module")
def reward():
    return restore_reward(embedded_reward_path())


@pytest.fixture(scope="module")
def settings():
    return build_sampling(load_settings("draftp_sd").model.infer)


@pytest.fixture(scope="module")
def specific():
    return [p for p in read_prompts(str(embedded_prompts_path("validation"))) if p not in BROAD]


def test_sizes():
    folder = Path(embedded_model_path())
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 25e6
    assert Path(embedded_reward_path()).stat().st_size <= 10e6
    assert len(read_prompts(str(embedded_prompts_path("train")))) >= 200
    assert 8 <= len(read_prompts(str(embedded_prompts_path("validation")))) <= 32


def test_the_reward_archive_carries_its_tokenizer():
    with tarfile.open(embedded_reward_path()) as archive:
        names = archive.getnames()
    assert any(name.endswith("vocab.json") for name in names)
    assert any(name.endswith("merges.txt") for name in names)
    assert any(name.endswith("model_config.yaml") for name in names)


def test_the_text_encoder_is_named_as_every_transformers_reads_it():
    """Only transformers from 5.10 find tensors without the prefix; older ones would fill in random weights."""
    with safe_open(Path(embedded_model_path()) / "text_encoder" / "model.safetensors", "pt") as file:
        assert all(name.startswith("text_model.") for name in file.keys())  # noqa: SIM118


def test_provenance_holds_the_files_sums():
    assets = Path(embedded_model_path()).parent
    text = (assets / "provenance.md").read_text(encoding="utf-8")
    sums = re.findall(r"^\| `(.*)` \| ([0-9a-f]{64}) \|$", text, re.MULTILINE)
    assert len(sums) == 4
    for name, checksum in sums:
        assert hashlib.sha256((assets / name).read_bytes()).hexdigest() == checksum, name


def test_provenance_names_sources_and_licences():
    text = (Path(embedded_model_path()).parent / "provenance.md").read_text(encoding="utf-8")
    for word in ("emoji-datasource-google", "Apache", "emojibase", "MIT"):
        assert word in text


def test_plain_diffusers_loads_it_and_draws_the_same_pictures(model, settings):
    pipeline = StableDiffusionPipeline.from_pretrained(embedded_model_path(), safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    prompts, guidance = ["red apple", "dog"], settings.guidance_scale
    theirs = pipeline(
        prompts, generator=generators, num_inference_steps=8, guidance_scale=guidance, output_type="pt"
    ).images
    kind = json.loads((Path(embedded_model_path()) / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    assert kind == "DDIMScheduler"
    assert torch.equal(generate(model, prompts, [1, 2], Sampling(8, guidance)), theirs)


def test_pictures_show_what_the_prompts_name(model, reward, settings, specific):
    """Chance is one in several hundred; the full measurement is in docs/embedded_model.md."""
    prompts = specific[:12]
    images = generate(model, prompts, list(range(12)), settings)
    found = recognisability(reward, images, prompts, read_prompts(str(embedded_prompts_path("train"))))
    assert found.mean_reciprocal_rank > 0.4
    noise = recognisability(reward, torch.rand_like(images), prompts, prompts)
    assert noise.top1 < 0.5


def test_a_broad_prompt_gives_different_pictures(model, reward, settings):
    images = generate(model, ["an animal"] * 6, list(range(6)), settings)
    with torch.no_grad():
        assert mean_pairwise_distance(reward.embed_images(images)) > 0.15


def test_the_reward_prefers_the_right_caption(model, reward, settings, specific):
    prompts = specific[:8]
    images = generate(model, prompts, list(range(8)), settings)
    right = reward(images, prompts)
    wrong = reward(images, prompts[1:] + prompts[:1])
    assert (right > wrong).float().mean() >= 0.75


@pytest.mark.parametrize("recipe", ["draftp_sd", pytest.param("drtune_sd", marks=pytest.mark.slow)])
def test_a_few_steps_raise_the_reward_on_prompts_that_were_not_trained_on(recipe, tmp_path):
    overrides = [
        "rm=symmetry",
        "model.infer.inference_steps=6",
        "model.drtune.early_stop_steps=2",
        "model.drtune.train_steps=2",
        "model.micro_batch_size=4",
        "model.global_batch_size=4",
        "model.optim.lr=1e-3",
        "model.kl_coeff=0",
        "model.data.validation.max_prompts=8",
        "model.data.validation.seeds=[0]",
        f"trainer.{recipe}.max_steps=10",
        f"trainer.{recipe}.val_check_interval=10",
        "trainer.accelerator=cpu",
        f"exp_manager.explicit_log_dir={tmp_path / 'run'}",
    ]
    if recipe == "draftp_sd":
        overrides = [text for text in overrides if "drtune" not in text]
    assert run_training(load_settings(recipe, overrides)) == 0
    with (tmp_path / "run" / "validation.csv").open(encoding="utf-8", newline="") as handle:
        last = list(csv.DictReader(handle))[-1]
    assert float(last["reward"]) > float(last["base_reward"]) + 0.002
    assert float(last["share_improved"]) >= 0.7
