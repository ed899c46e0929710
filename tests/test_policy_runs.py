"""DDPO's runs: advantages, inner passes, chunks, resuming, rewards that are numbers."""

from __future__ import annotations

import io
import logging
import math
import os
import random
import subprocess
import sys
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_training_run import adapter, figures, run
from tiny.runs import overrides, rows

from nemo_aligner_diffusion import DDPO
from nemo_aligner_diffusion.algorithms.policy.advantages import Advantages
from nemo_aligner_diffusion.config.load import load_config, load_settings
from nemo_aligner_diffusion.data.datamodule import PromptDataModule
from nemo_aligner_diffusion.errors import ConfigurationError, RewardError
from nemo_aligner_diffusion.rewards import JPEGSize
from nemo_aligner_diffusion.training.run import batches_of, run_training

COMMON = ["rm=jpeg_size", "model.infer.sampler_type=ddim", "optim=adamw"]


def ddpo(pipeline: Path, prompts: Path, directory: Path, *more: str) -> int:
    return run(pipeline, prompts, directory, *COMMON, *more, recipe="ddpo_sd")


@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize("per_prompt", [False, True])
def test_advantages_are_those_of_brute_force(per_prompt, clip):
    rng, seen = np.random.default_rng(0), {}
    advantages = Advantages(buffer=5 if per_prompt else None, min_count=3, clip=clip)
    for step in range(6):
        prompts = list(rng.choice(["a", "b", "c"], 7, p=[0.7, 0.2, 0.1]))
        rewards = rng.normal(3, 2, 7).tolist()
        if step == 3:  # a checkpoint
            state, advantages = advantages.state_dict(), Advantages(5 if per_prompt else None, 3, clip)
            advantages.load_state_dict(state)
        for prompt, reward in zip(prompts, rewards, strict=True):
            seen.setdefault(prompt, deque(maxlen=5)).append(reward)
        expected = []
        for prompt, reward in zip(prompts, rewards, strict=True):
            enough = per_prompt and len(seen[prompt]) >= 3
            of = list(seen[prompt]) if enough else rewards
            value = (reward - np.mean(of)) / (np.std(of) + (1e-6 if per_prompt else 1e-8))
            expected.append(value if clip is None else np.clip(value, -clip, clip))
        assert advantages(prompts, rewards) == pytest.approx(expected, rel=1e-12)
    before = advantages.state_dict()
    assert all(map(math.isnan, advantages(["a", "b"], [1.0, math.inf])))
    assert advantages.state_dict() == before


def test_a_run_writes_its_figures_and_counts_pictures_once(pipeline, prompts, tmp_path):
    more = [
        "model.ddpo.inner_passes=2",
        "model.ddpo.clip_range=0.2",
        "model.ddpo.statistics=prompt",
        "report.enable=true",
    ]
    assert ddpo(pipeline, prompts, tmp_path / "run", *more) == 0
    metrics = rows(tmp_path / "run" / "metrics.csv")
    assert [float(row["images"]) for row in metrics] == [4, 0, 4, 0]
    assert [float(row["approx_kl"]) > 0 for row in metrics] == [False, True, False, True]
    assert metrics[0]["reward"] == metrics[1]["reward"] != metrics[2]["reward"]
    assert all(float(row["grad_norm"]) > 0 and -1 < float(row["reward"]) < 0 for row in metrics)
    assert (tmp_path / "run" / "report.html").stat().st_size > 0


def test_chunks_do_not_matter(pipeline, prompts, tmp_path):
    for name, micro in (("one", 4), ("four", 1)):
        more = [
            "model.ddpo.inner_passes=2",
            "model.ddpo.step_share=0.5",
            "model.ddpo.clip_range=0.2",
            "trainer.ddpo_sd.max_steps=2",
        ]
        ddpo(
            pipeline,
            prompts,
            tmp_path / name,
            *more,
            f"model.micro_batch_size={micro}",
            "trainer.ddpo_sd.val_check_interval=0",
        )
    for one, four in zip(figures(tmp_path / "one"), figures(tmp_path / "four"), strict=True):
        for column in ("reward", "loss", "grad_norm", "approx_kl", "images"):
            assert float(one[column]) == pytest.approx(float(four[column]), rel=1e-3, abs=1e-6), column


def test_a_run_resumed_between_passes_is_the_undisturbed_one_bit_for_bit(pipeline, prompts, tmp_path):
    more = ["model.ddpo.inner_passes=3", "model.ddpo.step_share=0.5", "model.ddpo.statistics=prompt",
            "model.ddpo.buffer=2", "model.ddpo.min_count=2", "trainer.ddpo_sd.max_steps=4",
            "trainer.ddpo_sd.val_check_interval=0"]  # fmt: skip
    ddpo(pipeline, prompts, tmp_path / "whole", *more)
    ddpo(pipeline, prompts, tmp_path / "parts", *more, "trainer.ddpo_sd.max_steps=2")
    ddpo(pipeline, prompts, tmp_path / "parts", *more, "exp_manager.resume_if_exists=true")
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")
    assert float(figures(tmp_path / "whole")[2]["approx_kl"]) > 0
    whole, parts = adapter(tmp_path / "whole"), adapter(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.slow
def test_what_two_processes_stored_one_goes_on_with(pipeline, prompts, tmp_path):
    more = [*COMMON, "model.ddpo.inner_passes=3", "model.ddpo.clip_range=0.2", "trainer.ddpo_sd.val_check_interval=0"]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        str(Path(__file__).parents[1] / "examples/mm/stable_diffusion/train_sd_ddpo.py"),
        *overrides(pipeline, prompts, tmp_path / "parts", *more, "trainer.devices=2", "trainer.ddpo_sd.max_steps=2",
                   loop="ddpo_sd"),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ddpo(pipeline, prompts, tmp_path / "parts", *more, "exp_manager.resume_if_exists=true")
    ddpo(pipeline, prompts, tmp_path / "whole", *more)
    for parts, whole in zip(figures(tmp_path / "parts"), figures(tmp_path / "whole"), strict=True):
        for column in ("reward", "images", "approx_kl", "grad_norm"):
            assert float(parts[column]) == pytest.approx(float(whole[column]), rel=1e-3, abs=1e-6), column


def test_batches_come_several_times_and_none_is_lost(tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(10)))

    def data() -> PromptDataModule:
        return PromptDataModule(str(tmp_path / "prompts.txt"), micro_batch_size=2, repeats=3, epochs=1, seed=1)

    def batches(module: PromptDataModule) -> list[list[int]]:
        return [batch["index"].tolist() for batch in module.train_dataloader()]

    every = batches(data())
    assert every == [[2 * i, 2 * i + 1] for i in range(5) for _ in range(3)]
    for done in (1, 3, 5, 14):
        first, again = data(), data()
        first.train_dataloader()
        first._batches_processed = lambda done=done: done
        again.load_state_dict(first.state_dict())
        assert batches(again) == every[done:], done


def test_a_process_s_share_comes_whole():
    more = ["model.global_batch_size=16", "model.micro_batch_size=2", "model.ddpo.inner_passes=3"]
    settings = load_settings("ddpo_sd", more)
    assert batches_of(settings, settings.method()) == (1, {"micro_batch_size": 16, "repeats": 3})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.ddpo.clip_range=0"], r"model\.ddpo\.clip_range = 0: expected"),
        (["model.ddpo.statistics=prompt", "model.ddpo.buffer=4"], r"min_count = 16 with model\.ddpo\.buffer = 4"),
        (["model.infer.inference_steps=1"], "needs a step before the last"),
        (["model.ddpo.inner_pases=2"], "did you mean model.ddpo.inner_passes"),
    ],
)
def test_settings_that_cannot_be(words, message):
    with pytest.raises(ConfigurationError, match=message):
        load_config("ddpo_sd", words)


def test_what_it_does_not_read_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        cfg = load_config("ddpo_sd", ["model.kl_coeff=0.1", "model.reward_margin=2"])
    assert "model.kl_coeff, model.reward_margin: model.algorithm=ddpo does not read it" in caplog.text
    assert "kl_coeff" not in cfg.model


@pytest.mark.parametrize("words", [["rm=jpeg_size"], ["rm=composite", "rm.parts.files={name:jpeg_size,wanted:large}"]])
def test_a_reward_without_gradient_is_refused_by_methods_that_need_one(words):
    other = "incompressibility" if len(words) > 1 else "compressibility"
    with pytest.raises(ConfigurationError, match=rf"has no gradient: expected algorithm=ddpo, .*name={other}$"):
        load_config("draftp_sd", words)
    assert load_config("ddpo_sd", words).rm


def test_a_solver_without_a_density_stops_before_anything_is_written(pipeline, prompts, tmp_path):
    with pytest.raises(ConfigurationError, match="sampler_type=ddim"):
        ddpo(pipeline, prompts, tmp_path / "run", "model.infer.sampler_type=euler")
    assert not (tmp_path / "run").exists()


def test_dropout_and_further_passes(pipeline, prompts, tmp_path):
    with pytest.raises(ConfigurationError, match=r"inner_passes = 2 with dropout.*lora_tuning\.dropout=0"):
        ddpo(pipeline, prompts, tmp_path / "run", "model.ddpo.inner_passes=2", "model.peft.lora_tuning.dropout=0.1")


def test_a_reward_that_is_not_finite_changes_no_weights_and_the_batch_is_sampled_anew(
    pipeline, prompts, tmp_path, here
):
    (here / "faulty_of_test.py").write_text(
        "calls = []\ndef judge(images, prompts):\n    calls.append(1)\n"
        "    return [float('nan') if len(calls) == 2 else float(image.mean()) for image in images]\n"
    )
    more = [
        "rm=custom",
        "rm.import_path=faulty_of_test:judge",
        "model.ddpo.inner_passes=2",
        "model.ddpo.clip_range=0.2",
    ]
    assert ddpo(pipeline, prompts, tmp_path / "run", *more, "trainer.ddpo_sd.val_check_interval=0") == 0
    metrics = rows(tmp_path / "run" / "metrics.csv")
    assert [float(row["images"]) for row in metrics] == [4, 4, 4, 0]  # the second pass over the first batch is a first
    assert [math.isfinite(float(row["grad_norm"])) for row in metrics] == [False, True, True, True]


def test_functions_that_return_numbers(pipeline, prompts, tmp_path, here):
    (here / "numbers_of_test.py").write_text(
        "def brightness(images, prompts):\n    return [float(image.detach().mean()) for image in images]\n"
    )
    custom = ["rm=custom", "rm.import_path=numbers_of_test:brightness", "trainer.ddpo_sd.max_steps=1"]
    assert ddpo(pipeline, prompts, tmp_path / "run", *custom) == 0
    assert float(rows(tmp_path / "run" / "metrics.csv")[0]["grad_norm"]) > 0
    words = overrides(pipeline, prompts, tmp_path / "other", "rm=custom", "rm.import_path=numbers_of_test:brightness")
    with pytest.raises(RewardError, match=r"gave a list; expected a tensor .*methods that need none, such as ddpo"):
        run_training(load_config("draftp_sd", words))


def test_the_size_of_a_real_file(images):
    score = JPEGSize(quality=80).build()(images, ["a"] * 3)
    for picture, value in zip(images, score.tolist(), strict=True):
        file = io.BytesIO()
        Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy()).save(file, "JPEG", quality=80)
        assert value == pytest.approx(-len(file.getvalue()) / 1000)
    assert torch.equal(JPEGSize(quality=80, wanted="large").build()(images, ["a"] * 3), -score)
    with pytest.raises(RewardError, match="no gradient: expected algorithm=ddpo, or the differentiable"):
        JPEGSize().build()(images.clone().requires_grad_(), ["a"] * 3)


def test_a_share_of_the_steps_is_drawn():
    for share, count in ((1.0, 8), (0.5, 4), (0.01, 1)):
        assert len(set(DDPO(step_share=share).drawn(range(8), random.Random(0)))) == count
