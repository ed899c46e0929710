"""``tune``: the README's example, every kind of argument and error, and that nothing but the pipeline is changed."""

from __future__ import annotations

import asyncio
import csv
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny.stable_diffusion import save_tiny_pipeline, tiny_pipeline

from nemo_aligner_diffusion import DPO, DRaFTK, DRTune, tune
from nemo_aligner_diffusion.config.load import load_config
from nemo_aligner_diffusion.diffusion.plan import Plan
from nemo_aligner_diffusion.embedded_assets import embedded_reward_path
from nemo_aligner_diffusion.errors import ArchiveError, ConfigurationError, DataError, RewardError
from nemo_aligner_diffusion.rewards import Symmetry
from nemo_aligner_diffusion.training.run import run_training

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"method": "draft_k", "inference_steps": 2, "batch_size": 2, "lr": 0.01}
FIGURES = ("step", "reward", "kl_penalty", "loss", "grad_norm", "lr", "images", "active_steps")


def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def small(model=None, **more):
    arguments = {"reward": redness, "prompts": ["a", "b", "c"], "steps": 1, **SMALL, **more}
    if not isinstance(overrides := arguments.get("overrides", []), str):
        arguments["overrides"] = ["model.micro_batch_size=2", *overrides]  # a tiny pipeline's own is 1
    return tune(tiny_pipeline() if model is None else model, **arguments)


def figures(rows):
    return [{name: float(row[name]) for name in FIGURES} for row in rows]


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    (example,) = [block for block in blocks if "tune(" in block]
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    for written, here in (
        ('"path/or/hub-id"', "None"),  # the embedded model
        ("steps=20", "steps=2, batch_size=2, inference_steps=12"),
        ('pipeline("a red fox")', 'pipeline("a red fox", num_inference_steps=2)'),
    ):
        assert example.count(written) == 1
        example = example.replace(written, here)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert [file.name for file in tmp_path.iterdir()] == ["before_after.png"]
    with Image.open("before_after.png") as grid:
        assert grid.width > 300
        assert "a red fox" in grid.info["grid"]
    result = names["result"]
    assert type(result.pipeline).__module__.startswith("diffusers.")
    assert [row["step"] for row in result.history] == [1, 2]
    assert not result.interrupted


def test_the_history_is_that_of_the_command_line_to_the_last_digit(tmp_path):
    folder, file = save_tiny_pipeline(tmp_path / "model"), tmp_path / "prompts.txt"
    prompts = [f"p{i}" for i in range(7)]
    file.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    run_training(
        load_config(
            "drtune_sd",
            [
                "rm=symmetry", f"model.from_pretrained={folder}", "model.infer.inference_steps=5",
                f"model.data.train.webdataset.local_root_path={file}", "model.drtune.train_steps=2",
                "model.drtune.early_stop_steps=3", "model.kl_coeff=0.1", "model.optim.lr=0.01", "model.seed=5",
                "model.micro_batch_size=6", "model.global_batch_size=12", "trainer.drtune_sd.max_steps=3",
                "trainer.drtune_sd.val_check_interval=2", f"exp_manager.explicit_log_dir={tmp_path / 'run'}",
            ],
        )
    )  # fmt: skip
    with (tmp_path / "run" / "metrics.csv").open(encoding="utf-8") as stream:
        expected = figures(csv.DictReader(stream))
    settings = {
        "method": DRTune(train_steps=2, early_stop_steps=3), "inference_steps": 5, "kl_coeff": 0.1, "lr": 0.01,
        "seed": 5, "batch_size": 12, "steps": 3, "progress": False, "overrides": ["model.micro_batch_size=6"],
    }  # fmt: skip
    by_path = tune(folder, reward="symmetry", prompts=file, **settings)
    assert figures(by_path.history) == expected
    torch.manual_seed(7)  # the caller's generator has no say
    by_objects = tune(tiny_pipeline(), reward=Symmetry(), prompts=prompts, **settings)
    assert figures(by_objects.history) == expected
    assert len({row["reward"] for row in by_path.history}) == 3


def nested():
    weight = torch.tensor([1.0, -1.0, 0.5])

    def judge(images, prompts):
        return torch.einsum("bchw,c->b", images, weight) / images[0].numel()

    return judge


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 1, 3)

    def forward(self, images, prompts):
        return self.layer(images).mean((1, 2, 3))


@pytest.mark.parametrize(
    "reward",
    [lambda images, prompts: -images.square().mean((1, 2, 3)), nested(), Network(), Symmetry().build(), "symmetry",
     embedded_reward_path(), "test_api:redness"],
    ids=["lambda", "nested", "module", "Reward", "name", "nemo", "import path"],
)  # fmt: skip
def test_every_kind_of_reward_trains(reward):
    result = small(reward=reward)
    assert result.history[0]["grad_norm"] > 0
    assert max(parameter.abs().max() for name, parameter in trained(result) if "lora_B" in name) > 0


def trained(result):
    return [(n, p) for n, p in result.pipeline.unet.named_parameters() if p.requires_grad]


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (lambda images, prompts: images.detach().mean((1, 2, 3)), "reward=<lambda> gave scores without a gradient"),
        (lambda images, prompts: images.mean(), r"gave \(\) torch.float32 for 2 pictures"),
        (lambda images, prompts: images.mean((1, 2)), r"gave \(2, 16\) .* for 2 pictures"),
        (lambda images, prompts: [1.0, 2.0], "gave a list"),
        (lambda images, prompts: images.mean((1, 2, 3)) * float("nan"), "scores of which none is finite"),
        (lambda images, prompts: (images * 0).sum((1, 2, 3)).sqrt(), "gradients in the pictures of which none"),
        (lambda images: images.mean((1, 2, 3)), r"cannot be called as \(images, prompts\)"),
        (Symmetry, r"a class; expected an object of it: Symmetry\("),
        (None, "reward=None: expected a function"),
        ("symetry", "no such reward; did you mean symmetry"),
    ],
)  # fmt: skip
def test_a_reward_that_cannot_be_trained_on_is_refused_before_a_trajectory(reward, words, tmp_path):
    pipe = tiny_pipeline()
    calls = []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(RewardError, match=words):
        small(pipe, reward=reward, output=tmp_path / "run")
    assert len(calls) <= 1  # guided, one step
    assert not (tmp_path / "run").exists()


def test_what_was_refused_can_be_mended(tmp_path):
    pipe = tiny_pipeline()
    for output in (None, tmp_path / "run"):
        with pytest.raises(RewardError):
            small(pipe, reward=lambda images, prompts: images.mean(), output=output)
    assert small(pipe, output=tmp_path / "run").history[0]["grad_norm"] > 0
    told = json.loads((tmp_path / "run" / "run.json").read_text())["pipeline"]
    assert told["given"] == ""  # an object that does not say where it is from: the report asks


def test_an_error_inside_the_users_function_is_the_users_own():
    with pytest.raises(ZeroDivisionError):
        small(reward=lambda images, prompts: 1 / 0)


def test_a_reward_without_files_and_a_method_are_named():
    with pytest.raises(ArchiveError, match=r"none\.nemo"):
        small(reward="none.nemo")
    with pytest.raises(ConfigurationError, match="did you mean drtune"):
        small(method="drtun")
    with pytest.raises(ConfigurationError, match=r"a class was given: DRTune\(\)"):
        small(method=DRTune)
    with pytest.raises(ConfigurationError, match=r"method=.*lambda.*active steps must be integers in 0 … 1"):
        small(method=lambda path, rng: Plan(active=(path.steps,)))
    with pytest.raises(ConfigurationError, match=r"method=dpo learns from pairs.*model\.preference\.pairs=online"):
        small(method=DPO())


def test_methods_come_as_objects_rules_and_names():
    expected = figures(small(method=DRaFTK(truncation_steps=2)).history)
    assert figures(small(method=lambda path, rng: Plan(active=(0, 1))).history) == expected
    assert figures(small(method="DRaFT", kl_coeff=0.0).history) == expected


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([], r"prompts=\[\] has no prompt"),
        (["a", " "], r"prompts\[1\] is an empty prompt"),
        (["a", 3], r"prompts\[1\] is a int \(3\); expected a string"),
        ("a red fox", r"a red fox does not exist .* prompts themselves come in a list: prompts=\['a red fox'\]"),
        (7, "prompts is a int; expected a list of prompts"),
    ],
)
def test_prompts_that_are_none(prompts, words, tmp_path):
    with pytest.raises(DataError, match=words):
        small(prompts=prompts, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_prompts_are_taken_as_they_are(tmp_path):
    seen = []

    def judge(images, prompts):
        seen.extend(prompts)
        return redness(images, prompts)

    odd = ['it\'s "a" ${name} {0..3}, \\', "two\nlines"]
    small(reward=judge, prompts=odd, validation_prompts=odd[:1])
    assert set(seen) == {odd[0], "two lines"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"overrides": ["model.optim.lrr=1"]}, r"unknown key 'model.optim.lrr'; did you mean model.optim.lr\?"),
        ({"overrides": "model.optim.lr=1"}, r"expected a list of them: \['model.optim.lr=1'\]"),
        ({"overrides": ["trainer.devices=2", "model.micro_batch_size=1"]}, "tune works in one process"),
        ({"overrides": ["model.unet_config.from_pretrained=x"]}, "model is a pipeline already"),
        ({"steps": 0}, r"^steps \(trainer.draft_k_sd.max_steps\) = 0: expected an integer >= 1"),
        ({"lora_rank": 4, "every_weight": True}, "expected one of them"),
        ({"model": 3}, "model is a int; expected a diffusers pipeline"),
        ({"model": tiny_pipeline(dtype=torch.float16), "every_weight": True}, "unet is in torch.float16"),
    ],
)
def test_arguments_that_cannot_be(arguments, words):
    with pytest.raises(ConfigurationError, match=words):
        small(**arguments)


def test_a_pipeline_object_is_tuned_itself_and_keeps_its_scheduler():
    pipe = tiny_pipeline()
    scheduler, before = pipe.scheduler, {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    result = small(pipe, steps=2)
    assert result.pipeline is pipe
    assert pipe.scheduler is scheduler
    assert not pipe.unet.training
    with_adapter = pictures(pipe)
    pipe.disable_lora()
    assert np.array_equal(pictures(pipe), pictures(tiny_pipeline()))
    assert not np.array_equal(pictures(pipe), with_adapter)
    pipe.enable_lora()
    with pytest.raises(ConfigurationError, match=r"adapter 'default' already.*pipeline.fuse_lora\(\)"):
        small(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert any(not torch.equal(before[k], v) for k, v in pipe.unet.state_dict().items())
    small(pipe)


def pictures(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe("a", generator=generator, num_inference_steps=3, output_type="np").images


def test_adapters_of_a_pipeline_in_half_precision_are_float32():
    result = small(tiny_pipeline(dtype=torch.bfloat16))
    assert {parameter.dtype for _, parameter in trained(result)} == {torch.float32}
    assert result.pipeline.unet.dtype == torch.bfloat16
    pictures(result.pipeline)


def test_what_is_saved_gives_plain_diffusers_the_same_pictures(tmp_path):
    result = small(steps=2)
    file = result.save(tmp_path / "export")
    plain = tiny_pipeline()
    plain.load_lora_weights(file.parent)
    assert np.abs(pictures(plain) - pictures(result.pipeline)).max() < 1e-6
    whole = small(steps=2, every_weight=True)
    plain.unload_lora_weights()
    plain.unet = type(plain.unet).from_pretrained(whole.save(tmp_path / "whole"))
    assert np.array_equal(pictures(plain), pictures(whole.pipeline))


def test_a_comparison_shows_the_base_model_above_the_tuned_one(tmp_path):
    result = small(steps=2)
    shown = result.compare(["a", "b"], seeds=[0, 1])
    assert shown.prompts == ["a", "a", "b", "b"]
    assert shown.seeds == [0, 1, 0, 1]
    assert shown.base.shape == shown.tuned.shape == (4, 3, 16, 16)
    assert torch.allclose(redness(shown.tuned, shown.prompts), torch.tensor(shown.tuned_rewards))
    assert torch.equal(shown.base, small(tiny_pipeline()).compare(["a", "b"], seeds=[0, 1]).base)
    assert shown._repr_png_().startswith(b"\x89PNG")
    with Image.open(shown.save(tmp_path / "new" / "grid.png")) as picture:
        assert picture.format == "PNG"
    with pytest.raises(ConfigurationError, match=r"grid\.jpg'.*expected a name such as before_after\.png"):
        shown.save(tmp_path / "grid.jpg")
    with pytest.raises(ConfigurationError, match=r"expected a list of prompts"):
        result.compare("a")


def test_with_output_the_run_directory_is_the_command_lines(tmp_path):
    result = small(output=tmp_path / "run", steps=2, validation_prompts=["a"], validation_seeds=[3])
    assert result.run_dir == tmp_path / "run"
    for name in (
        "metrics.csv",
        "report.html",
        "export/pytorch_lora_weights.safetensors",
        "checkpoints/last",
        "prompts.txt",
    ):
        assert (result.run_dir / name).exists(), name
    assert [row["step"] for row in result.validation] == [2]
    temporary = small()
    assert {path.name for path in temporary.run_dir.iterdir()} >= {"metrics.csv", "config.yaml"}
    assert not any((temporary.run_dir / "checkpoints").iterdir())
    gone = temporary.run_dir
    del temporary
    assert not gone.exists()


def stopping(at_call):
    calls = []

    def judge(images, prompts):
        calls.append(1)
        if len(calls) == at_call:
            raise KeyboardInterrupt
        return redness(images, prompts)

    return judge


def test_ctrl_c_returns_what_was_learnt():
    whole = small(steps=1, overrides=["sched=constant"])
    handler = signal.getsignal(signal.SIGINT)
    result = small(reward=stopping(3), steps=5, overrides=["sched=constant"])  # a trial, the first step, the second
    assert result.interrupted
    assert [row["step"] for row in result.history] == [1]
    assert signal.getsignal(signal.SIGINT) is handler
    for (name, one), (_, other) in zip(trained(whole), trained(result), strict=True):
        assert torch.equal(one, other), name
    assert result.compare(["a"]).tuned.shape == (1, 3, 16, 16)
    with pytest.raises(KeyboardInterrupt, match="nothing was learnt"):
        small(reward=stopping(1))


def test_a_signal_ends_the_run_after_the_step_under_way(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from tiny.stable_diffusion import tiny_pipeline\n"
        "from nemo_aligner_diffusion import tune\n"
        "result = tune(tiny_pipeline(), reward='symmetry', prompts=['a'], method='draft_k', inference_steps=2,\n"
        "              batch_size=2, steps=100000)\n"
        "print('returned', result.interrupted, len(result.history) == result.history[-1]['step'], flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    assert process.stdout is not None
    line = next(line for line in process.stdout if line.startswith("step "))  # transformers may have its say before
    assert "reward" in line
    assert "KL" in line
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0, rest
    assert "Ctrl-C: stopping after the step under way; again to stop at once" in rest
    assert rest.splitlines()[-1] == "returned True True"


def state():
    return {
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),  # noqa: NPY002  # the legacy one is what may be changed behind one's back
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "logging": [logging.getLogger(name).level for name in ("", "nemo_aligner_diffusion", "pytorch_lightning",
                                                               "lightning.pytorch", "diffusers", "transformers")],
        "handlers": list(logging.getLogger().handlers),
        "warnings": list(warnings.filters),
        "environment": dict(os.environ),
        "threads": threading.excepthook,
    }  # fmt: skip


def test_nothing_of_the_callers_is_changed_and_it_works_without_gradients():
    before = state()
    with torch.no_grad():
        assert small(overrides=["trainer.precision=bf16"]).history[0]["grad_norm"] > 0
        assert not torch.is_grad_enabled()
    with pytest.raises(ZeroDivisionError):
        small(reward=lambda images, prompts: 1 / 0)
    after = state()
    assert after == before


def test_it_works_in_a_running_loop_and_in_a_thread():
    async def cell():
        return figures(small().history)

    here = asyncio.run(cell())
    found = []
    thread = threading.Thread(target=lambda: found.append(figures(small().history)))
    thread.start()
    thread.join()
    assert found == [here]


@pytest.mark.alone
def test_the_package_is_imported_without_torch():
    code = "import sys, nemo_aligner_diffusion as n; assert 'tune' in dir(n); assert 'torch' not in sys.modules"
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert time.monotonic() - started < 20
