"""Whole runs: learning, early stopping, resuming, exporting, the test command; and the configuration's errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from process_pool import ProcessPool
from tiny.reward_training import blue_shards, overrides, run_told, toy_nemo
from tiny.runs import rows

from nemo_aligner_diffusion.cli import evaluate_reward as evaluate_cli
from nemo_aligner_diffusion.cli import train_reward as train_cli
from nemo_aligner_diffusion.config.layers import file_layer
from nemo_aligner_diffusion.config.recipes import conf_directory
from nemo_aligner_diffusion.errors import AlignerError, ConfigurationError, OutputError
from nemo_aligner_diffusion.reward_training.configuration import (
    VOCABULARY,
    RewardTrainingSettings,
    load_reward_config,
)
from nemo_aligner_diffusion.reward_training.evaluate import preference_figures, score_pairs
from nemo_aligner_diffusion.reward_training.run import run_reward_training
from nemo_aligner_diffusion.rewards import restore_reward
from nemo_aligner_diffusion.rewards.rules import Symmetry
from nemo_aligner_diffusion.runtime.signals import Interrupted, Interruption

ROOT = Path(__file__).resolve().parents[1]
DATA = "model.data.train.webdataset.local_root_path"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards")
    toy_nemo(path / "start.nemo")
    blue_shards(path / "train", 120)
    blue_shards(path / "validation", 45, seed=1)
    return path


def train(folder: Path, run: str, **changed: object) -> Path:
    assert run_reward_training(load_reward_config(overrides(folder, run, **changed))) == 0
    return folder / run


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    return train(folder, "trained")


def accuracy(nemo: Path, shards: Path) -> float:
    return preference_figures(*score_pairs(restore_reward(nemo), str(shards))).accuracy


def test_it_learns_what_generalises(folder: Path, trained: Path) -> None:
    before = accuracy(folder / "start.nemo", folder / "validation")
    after = accuracy(trained / "export" / "reward.nemo", folder / "validation")
    assert after > 0.9
    assert after > before + 0.2


def test_the_run_directory(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"config.yaml", "metrics.csv", "validation.csv", "run.json", "report.html", "loss.png"} <= names
    assert not [path for path in trained.rglob("*") if path.name.startswith(".")]
    steps = rows(trained / "metrics.csv")
    assert [int(row["step"]) for row in steps] == list(range(1, 21))
    assert all(0 <= float(row["accuracy"]) <= 1 and float(row["loss"]) > 0 for row in steps)
    rates = [float(row["lr"]) for row in steps]
    assert rates[0] < rates[2] == pytest.approx(2e-3)
    assert rates[2] > rates[10] > rates[-1]
    validation = rows(trained / "validation.csv")
    assert [int(row["step"]) for row in validation] == [5, 10, 15, 20]
    assert {row["pairs"] for row in validation} == {"45"}, "repetitions that fill the last batch do not count"
    page = (trained / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert json.loads((trained / "run.json").read_text())["status"] == "finished"


def test_the_export_holds_the_best_weights(folder: Path, trained: Path) -> None:
    best = min(float(row["loss"]) for row in rows(trained / "validation.csv"))
    scores, labels = score_pairs(restore_reward(trained / "export" / "reward.nemo"), str(folder / "validation"))
    assert preference_figures(scores, labels).loss == pytest.approx(best, rel=1e-4)


def test_early_stopping_and_the_best_weights(folder: Path) -> None:
    # A rate this large makes things worse after the first validation; patience 1 ends the run at the second.
    changed: dict[str, Any] = {
        "model__optim__lr": 0.3,
        "trainer__early_stopping__patience": 1,
        "trainer__max_steps": 40,
    }
    run = train(folder, "stopped", **changed)
    losses = {int(row["step"]): float(row["loss"]) for row in rows(run / "validation.csv")}
    assert max(losses) < 40
    state = json.loads((run / "run.json").read_text())
    assert state["best_step"] == min(losses, key=lambda step: losses[step])


def learnt(run: Path, *columns: str) -> list[tuple[str, ...]]:
    wanted = columns or ("step", "loss", "accuracy", "grad_norm", "lr", "logit_scale")
    return [tuple(row[name] for name in wanted) for row in rows(run / "metrics.csv")]


def validated(run: Path) -> list[tuple[str, ...]]:
    columns = ("step", "loss", "accuracy", "calibration_error")
    return [tuple(row[name] for name in columns) for row in rows(run / "validation.csv")]


def exported(run: Path) -> dict[str, torch.Tensor]:
    return restore_reward(run / "export" / "reward.nemo").state_dict()


@pytest.mark.parametrize(
    ("stop", "async_save"),
    [pytest.param(7, False, marks=pytest.mark.slow), (10, True)],  # 10: where a validation is due
)
def test_resuming_is_exact(folder: Path, stop: int, async_save: bool) -> None:
    whole, parts = folder / f"whole_{stop}", folder / f"parts_{stop}"
    changed: dict[str, Any] = {"trainer__max_steps": 12, "trainer__early_stopping__patience": 0}
    changed["exp_manager__checkpoint_callback_params__async_save"] = async_save
    train(folder, whole.name, **changed)
    words = overrides(folder, parts.name, **changed)
    assert run_told(words, step=stop) == 143
    assert [step for (step,) in learnt(parts, "step")] == [str(step) for step in range(1, stop + 1)]
    assert json.loads((parts / "run.json").read_text())["status"] == "interrupted"
    assert exported(parts), "as far as it came"
    assert run_told([*words, "exp_manager.resume_if_exists=true"]) == 0
    assert learnt(parts) == learnt(whole)
    assert validated(parts) == validated(whole)
    one, other = exported(whole), exported(parts)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_signal_before_training_leaves_the_export_alone(folder: Path) -> None:
    words = overrides(folder, "early", trainer__max_steps=3)
    assert run_told(words, step=2) == 143
    nemo = folder / "early" / "export" / "reward.nemo"
    before = nemo.read_bytes()
    with pytest.raises(Interrupted):
        run_told([*words, "exp_manager.resume_if_exists=true"], step=0)
    assert nemo.read_bytes() == before
    assert json.loads((folder / "early" / "run.json").read_text())["status"] == "interrupted"


def test_a_second_signal_in_the_export_is_recorded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told_twice(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(Interruption.again_after + 0.1)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("it went on")

    monkeypatch.setattr("nemo_aligner_diffusion.reward_training.run.save_clip_reward", told_twice)
    assert run_told(overrides(folder, "twice", trainer__max_steps=3, trainer__val_check_interval=0)) == 130
    state = json.loads((folder / "twice" / "run.json").read_text())
    assert (state["status"], state["step"]) == ("interrupted", 3)


# Adam would move what has no gradient but rounding noise (biases of keys) by the learning rate, in either direction.
SIX_STEPS: dict[str, Any] = {
    "trainer__max_steps": 6,
    "trainer__val_check_interval": 3,
    "model__optim__name": "sgd",
    "model__optim__momentum": 0.9,
    "model__optim__lr": 0.1,
}


@pytest.fixture(scope="module")
def two(folder: Path, processes: ProcessPool) -> list[str]:
    """The words of a training by two processes, that has been done in ``folder/two``."""
    changed: dict[str, Any] = {"model__micro_batch_size": 4, "trainer__devices": 2}
    words = overrides(folder, "two", **SIX_STEPS, **changed)
    assert processes.run(2, run_told, words) == [0, 0]
    return words


def test_two_processes_learn_what_one_does(folder: Path, two: list[str]) -> None:
    one = train(folder, "one", **SIX_STEPS)
    for mine, theirs in zip(rows(folder / "two" / "metrics.csv"), rows(one / "metrics.csv"), strict=True):
        for name in ("loss", "accuracy", "ties", "grad_norm", "lr", "logit_scale"):
            assert float(mine[name]) == pytest.approx(float(theirs[name]), rel=1e-4), name
    for name in ("loss", "accuracy", "pairs", "ties"):
        mine, theirs = ([float(row[name]) for row in rows(run / "validation.csv")] for run in (folder / "two", one))
        assert mine == pytest.approx(theirs, rel=1e-4), name
    weights, expected = exported(folder / "two"), exported(one)
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-6, msg=name)


def test_two_processes_stop_together_and_resume_exactly(folder: Path, two: list[str], processes: ProcessPool) -> None:
    """Only the second process hears the signal; both complete the step, of several micro-batches, and one exports."""
    words = [*two, f"exp_manager.explicit_log_dir={folder / 'again'}"]
    assert processes.run(2, run_told, words, 4, signal.SIGTERM, 1) == [143, 0]
    assert json.loads((folder / "again" / "run.json").read_text())["status"] == "interrupted"
    assert [step for (step,) in learnt(folder / "again", "step")] == ["1", "2", "3", "4"]
    assert processes.run(2, run_told, [*words, "exp_manager.resume_if_exists=true"]) == [0, 0]
    assert learnt(folder / "again") == learnt(folder / "two")
    assert validated(folder / "again") == validated(folder / "two")
    one, other = exported(folder / "two"), exported(folder / "again")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.alone
@pytest.mark.slow
def test_the_command_starts_its_processes_and_names_one_that_is_killed(folder: Path) -> None:
    run = folder / "killed"
    changed = {"model__micro_batch_size": 8, "trainer__devices": 2, "trainer__max_steps": 100_000}
    changed |= {"trainer__val_check_interval": 0, "exp_manager__fault_tolerance__workload_check_interval": 0.1}
    words = overrides(folder, run.name, **changed)
    script = str(ROOT / "examples" / "mm" / "clip" / "train_reward_model.py")
    command = subprocess.Popen([sys.executable, script, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 300  # two processes import torch, perhaps beside other tests
    while not (run / "metrics.csv").exists() or len(rows(run / "metrics.csv")) < 30:
        assert command.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()
    (second,) = (pid for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(int(second), signal.SIGKILL)
    screen = command.communicate(timeout=300)[0].decode()
    assert command.returncode == 4, screen
    assert f"pid {second}), " in screen
    assert "of step " in screen
    assert "killed by SIGKILL" in screen
    assert "error on rank 1" in json.loads((run / "run.json").read_text())["error"]


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize("watched", [True, False])
def test_what_one_process_refuses_is_said_once_and_ends_all(folder: Path, trained: Path, watched: bool) -> None:
    words = overrides(folder, trained.name, trainer__devices=2, model__micro_batch_size=8)
    script = str(ROOT / "examples" / "mm" / "clip" / "train_reward_model.py")
    words += [f"exp_manager.create_{what}_callback={watched}" for what in ("fault_tolerance", "straggler_detection")]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("already holds a finished run") == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    if watched:
        assert done.stderr.startswith("error on rank 0 ("), "who met it, not who heard of it first"


@pytest.mark.alone
@pytest.mark.parametrize(
    ("connect", "raising"),
    [
        pytest.param((3, 0), (0, 0), marks=pytest.mark.slow),
        pytest.param((0, 0), (0, 4), marks=pytest.mark.nightly),
        pytest.param((0, 3), (4, 0), marks=pytest.mark.nightly),
        pytest.param((14, 0), (0, 0.3), marks=pytest.mark.nightly),  # longer than ranks wait for each other
        pytest.param((0, 14), (0, 4), marks=pytest.mark.nightly),
        pytest.param((14, 14), (0, 0), marks=pytest.mark.nightly),
    ],
)
def test_ranks_that_come_late_change_nothing_about_it(
    folder: Path, trained: Path, connect: tuple[float, float], raising: tuple[float, float]
) -> None:
    words = overrides(folder, trained.name, trainer__devices=2, model__micro_batch_size=8)
    command = [sys.executable, str(ROOT / "tests" / "delayed_ranks.py")]
    command += [json.dumps({"connect": connect, "raise": raising}), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error on rank 0 ("), done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "darwin", reason="there such devices may exist")
def test_what_every_process_refuses_before_it_has_joined_the_others_is_said_once(folder: Path) -> None:
    words = overrides(folder, "nowhere", trainer__devices=2, model__micro_batch_size=8, trainer__accelerator="mps")
    script = str(ROOT / "examples" / "mm" / "clip" / "train_reward_model.py")
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "PyTorch finds no Apple GPU here" in done.stderr


def test_accumulation_is_the_larger_batch(folder: Path) -> None:
    large = train(folder, "large", trainer__max_steps=3, trainer__val_check_interval=0)
    small = train(folder, "small", trainer__max_steps=3, trainer__val_check_interval=0, model__micro_batch_size=4)
    for one, other in zip(rows(large / "metrics.csv"), rows(small / "metrics.csv"), strict=True):
        assert float(one["loss"]) == pytest.approx(float(other["loss"]), rel=1e-4)
        assert one["accuracy"] == other["accuracy"]
        assert one["ties"] == other["ties"]


def test_a_directory_with_a_run_is_not_overwritten(folder: Path, trained: Path) -> None:
    with pytest.raises(OutputError, match="already holds a finished run"):
        run_reward_training(load_reward_config(overrides(folder, "trained")))


def test_the_test_command(folder: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nemo = trained / "export" / "reward.nemo"
    assert evaluate_cli.main([str(nemo), str(folder / "validation"), "--output", str(tmp_path), "--bins", "5"]) == 0
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert f"accuracy                    {figures['accuracy']:.4f}" in printed
    assert figures["pairs"] == 45
    assert figures["ties"] == sum(part.label == (0.5, 0.5) for part in _pairs(folder / "validation"))
    assert len(figures["bins"]) == 5
    assert sum(part["pairs"] for part in figures["bins"]) == 45 - figures["ties"]
    assert (tmp_path / "reliability.png").read_bytes().startswith(b"\x89PNG")


def _pairs(folder: Path) -> list[Any]:
    from nemo_aligner_diffusion.data.bad_samples import BadSamples
    from nemo_aligner_diffusion.data.preferences.shards import read_preference_file

    return [pair for path in sorted(folder.glob("*.tar")) for pair in read_preference_file(path, BadSamples())]


def test_any_reward_can_be_tested(folder: Path) -> None:
    scores, labels = score_pairs(Symmetry().build(), str(folder / "validation"))
    assert scores.shape == labels.shape == (45, 2)
    assert labels.tolist() == [pytest.approx(list(pair.label)) for pair in _pairs(folder / "validation")]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["model.optim.learning_rate=1"], ["model.optim.learning_rate", "did you mean"]),
        (["trainer.max_step=3"], ["did you mean trainer.max_steps"]),
        (["trainer.max_steps=0"], ["trainer.max_steps = 0", ">= 1"]),
        (["model.vision=3"], ["model.vision is a section", "model.vision.freeze"]),
        (["trainer.early_stopping.metric=f1"], ["one of loss, accuracy"]),
        (
            ["model.micro_batch_size=3", "model.global_batch_size=8"],
            ["8", "3 × 1 = 3", "would fit: model.global_batch_size=6 or 9"],
        ),
        (["model.restore_from_path=a", "model.from_pretrained=b"], ["both say where to start"]),
        (["~model.seed"], ["cannot be deleted"]),
        (["model.data.data_path=other"], ["two spellings"]),
    ],
)
def test_configuration_errors(words: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_reward_config([f"{DATA}=x", *words])
    for part in parts:
        assert part in str(caught.value)


def test_configuration_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model:\n  data: {data_path: shards}\n  optim: {sched: {warmup_ratio: 0.1}}\n")
    cfg = load_reward_config(["model.micro_batch_size=8"], "mine", tmp_path)
    assert cfg.model.data.train.webdataset.local_root_path == "shards"
    assert (cfg.model.optim.sched.warmup_ratio, cfg.model.optim.sched.warmup_steps) == (0.1, None)
    assert RewardTrainingSettings.of(cfg).accumulation == 4
    (tmp_path / "bad.yaml").write_text("model: {visoin: {freeze: true}}\n")
    with pytest.raises(ConfigurationError, match=r"model\.visoin\.freeze' in .*bad\.yaml.*model\.vision\.freeze"):
        load_reward_config([], "bad", tmp_path)
    with pytest.raises(ConfigurationError, match="is not set; expected preference shards"):
        load_reward_config([])


def test_every_key_is_documented_and_known() -> None:
    file = file_layer(conf_directory() / "reward_model.yaml")
    free = "exp_manager.wandb_logger_kwargs."
    assert set(VOCABULARY.kinds) - {f"{free}*"} == {key for key in file.leaves if not key.startswith(free)}
    load_reward_config([f"{DATA}=x"])  # every value of the file is one its key accepts


@pytest.mark.parametrize("script", ["train_reward_model", "test_reward_model", "parquet_to_shards", "folder_to_shards",
                                    "make_rule_preferences", "judge_rule"])  # fmt: skip
def test_help_needs_no_torch(script: str) -> None:
    path = ROOT / "examples" / "mm" / "clip" / f"{script}.py"
    code = (
        f"import runpy, sys; sys.argv = [{str(path)!r}, '--help']\n"
        f"try: runpy.run_path({str(path)!r}, run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0, shown.stderr
    assert f"usage: {script}.py" in shown.stdout


def test_mistakes_are_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_cli.main([f"{DATA}={tmp_path / 'none'}"]) == 2
    assert evaluate_cli.main([str(tmp_path / "none.nemo"), str(folder / "train")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: ") and "does not exist" in line for line in lines)


def test_a_reward_that_is_no_clip(folder: Path, tmp_path: Path) -> None:
    from nemo_aligner_diffusion.formats.nemo import save_nemo

    save_nemo(tmp_path / "other.nemo", {"target": "somebody.elses.Model"}, {"a": torch.zeros(1)}, {})
    cfg = load_reward_config(overrides(folder, "other", model__restore_from_path=tmp_path / "other.nemo"))
    with pytest.raises(AlignerError, match="somebody"):
        run_reward_training(cfg)
    assert not (folder / "other" / "metrics.csv").exists()
