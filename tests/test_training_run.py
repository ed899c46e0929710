"""Whole runs on a tiny model: what a user starts, and what must be on disk afterwards."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tiny.runs import overrides, rows
from tiny.stable_diffusion import tiny_stable_diffusion

from nemo_aligner_diffusion.config.load import load_config, load_settings
from nemo_aligner_diffusion.errors import CheckpointError, ConfigurationError, NumericalError, OutputError
from nemo_aligner_diffusion.formats.checkpoints import read_notes, read_tensors
from nemo_aligner_diffusion.training.export import fingerprint
from nemo_aligner_diffusion.training.run import run_training

ROOT = Path(__file__).resolve().parents[1]


def run(pipeline, prompts, directory, *more, recipe="draftp_sd"):
    return run_training(load_config(recipe, overrides(pipeline, prompts, directory, *more, loop=recipe)))


def adapter(directory):
    from safetensors.torch import load_file

    return load_file(directory / "export" / "pytorch_lora_weights.safetensors")


TIMING = {"images_per_second", "peak_memory_bytes", "seconds"}


def figures(directory):
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows(directory / "metrics.csv")]


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("draftp_sd", ["model.truncation_steps=2", "exp_manager.ema.enable=true"]),
        ("drtune_sd", ["model.drtune.train_steps=2", "model.drtune.early_stop_steps=2", "model.kl_coeff=0.1"]),
        pytest.param("draft_sd", ["model.infer.sampler_type=euler"], marks=pytest.mark.slow),
        ("draft_lv_sd", []),
        pytest.param("refl_sd", ["model.infer.sampler_type=dpm++2m"], marks=pytest.mark.slow),
        pytest.param("alignprop_sd", ["model.infer.sampler_type=unipc"], marks=pytest.mark.slow),
        ("draftp_sd", ["trainer.precision=bf16", "model.kl_coeff=0.1"]),
    ],
)
def test_every_recipe_leaves_a_complete_run_directory(recipe, more, pipeline, prompts, tmp_path):
    directory = tmp_path / "run"
    assert run(pipeline, prompts, directory, *more, "report.enable=true", recipe=recipe) == 0
    metrics = rows(directory / "metrics.csv")
    assert [int(row["step"]) for row in metrics] == [1, 2, 3, 4]
    assert list(metrics[0])[:8] == (
        ["step", "reward", "kl_penalty", "loss", "grad_norm", "lr", "images_per_second", "peak_memory_bytes"]
    )
    assert all(math.isfinite(float(row["reward"])) and float(row["grad_norm"]) > 0 for row in metrics)
    assert float(metrics[0]["kl_penalty"]) == 0.0  # the adapter starts as the identity
    assert float(metrics[0]["images"]) == 4
    validation = rows(directory / "validation.csv")
    assert [int(row["step"]) for row in validation] == [2, 4]
    assert validation[-1]["reward"] != validation[-1]["base_reward"]
    assert sorted(path.name for path in (directory / "samples").iterdir()) == ["step_000002.png", "step_000004.png"]
    for name in ("config.yaml", "report.html", "export/pytorch_lora_weights.safetensors", "checkpoints/last"):
        assert (directory / name).stat().st_size > 0
    state = json.loads((directory / "run.json").read_text())
    assert (state["status"], state["threads"]) == ("finished", torch.get_num_threads())


def test_a_run_that_is_out_of_time_says_so_and_goes_on_to_the_same_end(pipeline, prompts, tmp_path):
    directory, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    assert run(pipeline, prompts, directory, "exp_manager.max_time_per_run=00:00:00:00", "report.enable=true") == 0
    state = json.loads((directory / "run.json").read_text())
    assert (state["status"], state["step"]) == ("interrupted", 1)
    assert "This run was interrupted" in (directory / "report.html").read_text(encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"this run was of .*, and model\.from_pretrained = None now"):
        run(pipeline, prompts, directory, "exp_manager.resume_if_exists=true", "model.from_pretrained=null")
    assert run(pipeline, prompts, directory, "exp_manager.resume_if_exists=true") == 0
    assert json.loads((directory / "run.json").read_text())["status"] == "finished"
    run(pipeline, prompts, undisturbed)
    assert figures(directory) == figures(undisturbed)
    assert (directory / "validation.csv").read_text() == (undisturbed / "validation.csv").read_text()


def test_full_fine_tuning_exports_a_unet_that_diffusers_loads(pipeline, prompts, tmp_path):
    from diffusers import UNet2DConditionModel

    directory = tmp_path / "run"
    run(pipeline, prompts, directory, "model.peft.peft_scheme=none", "model.kl_coeff=0.1", "model.optim.lr=1e-3")
    tuned = UNet2DConditionModel.from_pretrained(directory / "export" / "unet")
    base = UNet2DConditionModel.from_pretrained(pipeline / "unet")
    moved = [name for name, value in base.state_dict().items() if not torch.equal(value, tuned.state_dict()[name])]
    assert len(moved) > 0.9 * len(base.state_dict())
    header = read_notes(directory / "export" / "unet" / "diffusion_pytorch_model.safetensors")
    expected = {"format": "pt", "ss_sd_model_name": pipeline.name, "ss_steps": "4", "ss_learning_rate": "0.001",
                "modelspec.architecture": "stable-diffusion-v1", "nemo_aligner_diffusion.method": "draft+",
                "nemo_aligner_diffusion.reward": "symmetry"}  # fmt: skip
    assert {key: header.get(key) for key in expected} == expected
    assert "peft" not in json.loads(header["nemo_aligner_diffusion.settings"])
    assert header["nemo_aligner_diffusion.base_model_fingerprint"] == fingerprint(base)


EVERYWHERE = "[to_q,to_k,to_v,to_out.0,proj_in,proj_out,ff.net.0.proj,ff.net.2,conv1,conv2,conv_shortcut,time_emb_proj]"


def test_the_export_gives_the_same_picture_in_plain_diffusers(pipeline, prompts, tmp_path):
    from diffusers import StableDiffusionPipeline

    from nemo_aligner_diffusion.diffusion.generate import Sampling, generate
    from nemo_aligner_diffusion.diffusion.loading import load_model
    from nemo_aligner_diffusion.diffusion.lora import load_lora_weights

    directory = tmp_path / "run"
    tuning = {"alpha": 3, "adapter_dim": 2, "target_modules": EVERYWHERE}
    run(pipeline, prompts, directory, *(f"model.peft.lora_tuning.{key}={value}" for key, value in tuning.items()))
    ours = load_model(pipeline)
    sampling = Sampling(steps=6, guidance_scale=3.0)
    before = generate(ours, ["p1", "p2"], [3, 4], sampling)
    load_lora_weights(ours.denoiser, directory / "export", "tuned")
    pictures = generate(ours, ["p1", "p2"], [3, 4], sampling)
    assert (pictures - before).abs().max() > 1e-3
    theirs = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
    theirs.load_lora_weights(directory / "export")

    def plain(pipe):
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        pipe.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 6, "guidance_scale": 3.0, "output_type": "pt"}
        return pipe(["p1", "p2"], generator=generators, **options).images

    assert torch.equal(pictures, plain(ours.pipe))
    # weights at other addresses: kernels for aligned memory round otherwise
    torch.testing.assert_close(pictures, plain(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheme", ["sdlora", "none"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(scheme, pipeline, prompts, tmp_path):
    more = [f"model.peft.peft_scheme={scheme}", "model.kl_coeff=0.1", "exp_manager.ema.enable=true"]
    run(pipeline, prompts, tmp_path / "whole", *more)
    run(pipeline, prompts, tmp_path / "parts", *more, "trainer.draftp_sd.max_steps=2")
    run(pipeline, prompts, tmp_path / "parts", *more, "exp_manager.resume_if_exists=true")
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")
    assert rows(tmp_path / "parts" / "validation.csv") == rows(tmp_path / "whole" / "validation.csv")
    if scheme == "sdlora":
        whole, parts = adapter(tmp_path / "whole"), adapter(tmp_path / "parts")
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_accumulation_gives_the_gradient_of_the_whole_batch(pipeline, prompts, tmp_path):
    for name, micro in (("one", 4), ("four", 1)):
        run(pipeline, prompts, tmp_path / name, f"model.micro_batch_size={micro}", "model.kl_coeff=0.3",
            "model.rollout_precision=same")  # fmt: skip
    for one, four in zip(figures(tmp_path / "one"), figures(tmp_path / "four"), strict=True):
        for column in ("reward", "loss", "grad_norm", "images"):
            assert float(one[column]) == pytest.approx(float(four[column]), rel=1e-4)


def test_a_run_that_resumes_with_other_micro_batches_takes_the_same_steps(pipeline, prompts, tmp_path):
    """What one step accumulates changes with the layout, too; Lightning tells the ends of steps by counting batches."""
    more = ["trainer.draftp_sd.val_check_interval=3"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(pipeline, prompts, whole, *more, "trainer.draftp_sd.max_steps=6")
    run(pipeline, prompts, parts, *more, "model.micro_batch_size=4", "trainer.draftp_sd.max_steps=3")
    (parts / "validation.csv").unlink()  # as if it had been killed before: made up for
    more += ["exp_manager.resume_if_exists=true", "trainer.draftp_sd.max_steps=6"]
    run(pipeline, prompts, parts, *more, "model.micro_batch_size=1")
    for file, names in (("metrics.csv", ("step", "images", "reward", "lr")), ("validation.csv", ("step", "reward"))):
        mine, theirs = (
            [[float(row[name]) for name in names] for row in rows(folder / file)] for folder in (parts, whole)
        )
        assert mine == [pytest.approx(row, rel=1e-3) for row in theirs]


def test_nothing_is_in_effect_for_a_model_that_is_not_here(prompts, tmp_path, caplog):
    with caplog.at_level("INFO"), pytest.raises(CheckpointError, match="nowhere"):
        run(tmp_path / "nowhere", prompts, tmp_path / "run")
    assert "in effect" not in caplog.text
    assert "model family" not in caplog.text


def test_a_second_run_into_a_finished_directory_is_refused_and_changes_nothing(pipeline, prompts, tmp_path):
    directory = tmp_path / "run"
    run(pipeline, prompts, directory, "trainer.draftp_sd.max_steps=1")
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match="resume_if_exists"):
        run(pipeline, prompts, directory)
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


def test_nan_rewards_are_skipped_then_stop_the_run_without_touching_the_weights(
    pipeline, prompts, tmp_path, monkeypatch
):
    from nemo_aligner_diffusion.rewards.rules import Symmetry

    sane = Symmetry.score
    calls = []

    def sometimes(self, images, given):
        calls.append(1)
        score = sane(self, images, given)
        return score * float("nan") if 3 <= len(calls) <= broken_until else score

    monkeypatch.setattr(Symmetry, "score", sometimes)
    more = ["model.micro_batch_size=4", "trainer.draftp_sd.val_check_interval=0", "trainer.draftp_sd.max_steps=6"]
    broken_until = 4
    assert run(pipeline, prompts, tmp_path / "skips", *more, "model.nan_policy.max_consecutive=2") == 0
    assert all(torch.isfinite(value).all() for value in adapter(tmp_path / "skips").values())
    assert json.loads((tmp_path / "skips" / "run.json").read_text())["skipped_steps"] == 2
    calls.clear()
    broken_until = 1000
    with pytest.raises(NumericalError, match=r"step 5.*reward"):
        run(pipeline, prompts, tmp_path / "stops", *more, "model.nan_policy.max_consecutive=2", "report.enable=true")
    assert all(torch.isfinite(value).all() for value in adapter(tmp_path / "stops").values())
    assert (tmp_path / "stops" / "report.html").exists()
    assert json.loads((tmp_path / "stops" / "run.json").read_text())["status"] == "failed"


@pytest.mark.slow
@pytest.mark.alone
def test_ctrl_c_leaves_an_export_and_a_report(pipeline, prompts, tmp_path):
    directory = tmp_path / "run"
    command = [
        sys.executable,
        str(ROOT / "examples/mm/stable_diffusion/train_sd_draftp.py"),
        *overrides(pipeline, prompts, directory, "trainer.draftp_sd.max_steps=100000", "report.enable=true"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    metrics = directory / "metrics.csv"
    deadline = time.monotonic() + 300  # it imports torch, perhaps beside other tests
    while time.monotonic() < deadline and (not metrics.exists() or len(metrics.read_text().splitlines()) < 3):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert json.loads((directory / "run.json").read_text())["status"] == "interrupted"
    assert adapter(directory)
    assert (directory / "report.html").exists()


@pytest.mark.slow
def test_two_processes_train_as_one(pipeline, prompts, tmp_path):
    """The noise is keyed by sample, the plan by step: data parallelism changes rounding only."""
    run(pipeline, prompts, tmp_path / "one", "model.micro_batch_size=4", "model.rollout_precision=same")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "examples/mm/stable_diffusion/train_sd_draftp.py"),
        *overrides(pipeline, prompts, tmp_path / "two", "trainer.devices=2", "model.rollout_precision=same"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    for one, two in zip(figures(tmp_path / "one"), figures(tmp_path / "two"), strict=True):
        for column in ("reward", "loss", "images"):
            assert float(one[column]) == pytest.approx(float(two[column]), rel=1e-5)
        # this model's gradient is 1e-5 of its activations: float32 rounding shows in it
        assert float(one["grad_norm"]) == pytest.approx(float(two["grad_norm"]), rel=1e-2)
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=2e-3)
    ours, theirs = rows(tmp_path / "one" / "validation.csv"), rows(tmp_path / "two" / "validation.csv")
    assert [float(row["reward"]) for row in ours] == pytest.approx([float(row["reward"]) for row in theirs], rel=1e-5)


def test_single_file_weights_are_used_and_misfits_are_named(pipeline, prompts, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    torch.save(weights, tmp_path / "unet.ckpt")
    more = ["trainer.draftp_sd.max_steps=1", "trainer.draftp_sd.val_check_interval=0"]
    run(pipeline, prompts, tmp_path / "plain", *more)
    run(pipeline, prompts, tmp_path / "file", *more, f"model.unet_config.from_pretrained={tmp_path / 'unet.ckpt'}")
    assert figures(tmp_path / "plain") == figures(tmp_path / "file")
    del weights["conv_in.weight"]
    save_file(weights, tmp_path / "short.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing, e\.g\. conv_in\.weight"):
        run(pipeline, prompts, tmp_path / "x", f"model.unet_config.from_pretrained={tmp_path / 'short.safetensors'}")
    assert not (tmp_path / "x" / "config.yaml").exists()


def test_prompts_beyond_the_limit_are_counted(pipeline, tmp_path, caplog):
    file = tmp_path / "prompts.txt"
    file.write_text("a\na prompt much longer than eight letters\n", encoding="utf-8")
    more = ["trainer.draftp_sd.max_steps=1", "trainer.draftp_sd.val_check_interval=0"]
    run(pipeline, file, tmp_path / "run", *more, "model.micro_batch_size=2", "model.global_batch_size=2")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["truncated_prompts"] == 1
    assert "1 prompt" in caplog.text


def test_a_misspelt_target_module_is_named(pipeline, prompts, tmp_path):
    with pytest.raises(ConfigurationError, match="to_query"):
        run(pipeline, prompts, tmp_path / "run", "model.peft.lora_tuning.target_modules=[to_query]")


def test_pictures_decoded_one_by_one_are_the_same():
    from nemo_aligner_diffusion.diffusion.generate import Sampling, generate

    model = tiny_stable_diffusion()
    sizes = []
    model.vae.decoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    together, single = (
        generate(model, ["a", "b", "c"], [1, 2, 3], Sampling(2, 2.0), decode_batch_size=size) for size in (None, 1)
    )
    assert sizes == [3, 1, 1, 1]
    assert torch.allclose(together, single, atol=1e-6)


def test_a_report_that_fails_leaves_a_finished_run_finished(pipeline, prompts, tmp_path, monkeypatch, caplog):
    def broken(directory):
        raise ValueError("no pictures")

    monkeypatch.setattr("nemo_aligner_diffusion.training.run.write_report", broken)
    more = ["trainer.draftp_sd.max_steps=1", "trainer.draftp_sd.val_check_interval=0"]
    assert run(pipeline, prompts, tmp_path / "run", *more, "report.enable=true") == 0
    state = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (state["status"], state["step"], state["report_error"]) == ("finished", 1, "no pictures")
    assert "everything but the report is complete" in caplog.text
    more += ["trainer.draftp_sd.max_steps=2", "model.seed=5", "exp_manager.resume_if_exists=true"]
    assert run(pipeline, prompts, tmp_path / "run", *more) == 0
    assert "resuming with model.seed = 5; it was" in caplog.text
    assert "in effect: sampling steps 4, guidance 2, solver the pipeline's own, size the pipeline's own" in caplog.text
    assert "model.seed has changed: what is drawn at random" in caplog.text


@pytest.mark.slow
def test_a_run_goes_on_with_an_adapter_and_its_resume_with_its_own_checkpoint(pipeline, prompts, tmp_path):
    first, copy, straight, parted = (tmp_path / name for name in ("first", "copy", "straight", "parted"))
    run(pipeline, prompts, first, "trainer.draftp_sd.max_steps=2")
    given = f"model.peft.restore_from_path={first}"
    run(pipeline, prompts, copy, given, "model.optim.lr=1e-12", "trainer.draftp_sd.max_steps=1")
    assert all(torch.allclose(value, adapter(first)[name], atol=1e-6) for name, value in adapter(copy).items())
    assert set(adapter(copy)) == set(adapter(first))
    steps = ["sched=constant", "trainer.draftp_sd.max_steps="]
    run(pipeline, prompts, straight, given, *steps[:1], f"{steps[1]}4")
    run(pipeline, prompts, parted, given, *steps[:1], f"{steps[1]}2")
    # the file is another one by now: what the run has made of it counts
    run(pipeline, prompts, first, "trainer.draftp_sd.max_steps=4", "exp_manager.resume_if_exists=true")
    run(pipeline, prompts, parted, given, *steps[:1], f"{steps[1]}4", "exp_manager.resume_if_exists=true")
    assert all(torch.allclose(value, adapter(straight)[name], atol=1e-6) for name, value in adapter(parted).items())


def test_config_yaml_has_whole_paths_of_weights(tmp_path, monkeypatch):
    (tmp_path / "here" / "org").mkdir(parents=True)
    (tmp_path / "weights").touch()
    monkeypatch.chdir(tmp_path / "here")
    places = ["model.from_pretrained", *(f"model.{part}_config.from_pretrained" for part in ("unet", "cond_stage"))]
    places += ["model.first_stage_config.small_decoder", "model.peft.restore_from_path"]
    words = [f"{key}=../weights" for key in places]
    settings = load_settings(
        "draftp_sd", [*words, "model.family=sd15", "model.first_stage_config.from_pretrained=org/vae"]
    )
    kept = OmegaConf.create(settings.recorded())
    assert {OmegaConf.select(kept, key) for key in places} == {str(tmp_path / "weights")}
    assert kept.model.first_stage_config.from_pretrained == "org/vae"
    assert settings.model.from_pretrained == settings.shown["model"]["from_pretrained"] == "../weights"


def test_an_exported_adapter_says_where_it_comes_from(pipeline, prompts, tmp_path):
    from diffusers import UNet2DConditionModel

    tuning = "model.peft.lora_tuning"
    words = ["trainer.draftp_sd.max_steps=1", "name=mine", f"{tuning}.adapter_dim=8", f"{tuning}.alpha=32",
             "model.frozen_precision=bf16"]  # fmt: skip
    run(pipeline, prompts, tmp_path / "run", *words)
    prefix = "nemo_aligner_diffusion."
    for name in ("pytorch_lora_weights.safetensors", "kohya_lora_weights.safetensors"):
        file = tmp_path / "run" / "export" / name
        assert {tensor.dtype for tensor in read_tensors(file).values()} == {torch.float32}
        header = read_notes(file)
        expected = {"ss_output_name": "mine", "ss_steps": "1", "ss_network_dim": "8", "ss_network_alpha": "8",
                    "ss_sd_model_name": pipeline.name, "ss_base_model_version": "sd_v1", "ss_learning_rate": "0.01",
                    "ss_seed": "1234", "modelspec.architecture": "stable-diffusion-v1/lora",
                    f"{prefix}method": "draft+", f"{prefix}reward": "symmetry"}  # fmt: skip
        assert {key: header.get(key) for key in expected} == expected
        settings = json.loads(header[f"{prefix}settings"])
        assert settings["infer"]["inference_steps"] == 4
        assert settings["peft"]["lora_tuning"]["alpha"] == 32
        base = UNet2DConditionModel.from_pretrained(pipeline / "unet")  # in float32
        assert header[f"{prefix}base_model_fingerprint"] == fingerprint(base)
        assert str(tmp_path) not in json.dumps(header)
