"""metrics.csv, validation.csv, and the loggers."""

from __future__ import annotations

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from tiny.training import Toy, fit

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.evaluation.metrics.peak_memory import peak_memory_bytes
from nemo_aligner_diffusion.runtime.csv_table import CSVTable
from nemo_aligner_diffusion.training.callbacks.metrics import build_loggers, wandb_arguments
from nemo_aligner_diffusion.training.callbacks.settings import LoggerSettings
from nemo_aligner_diffusion.training.checkpoints.resume import find_resume_point


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_per_optimizer_step(tmp_path: Path) -> None:
    module = Toy(max_steps=5)
    seen: list[float] = []
    module.at_step = lambda step: seen.append(module.last_metrics["reward"])
    fit(tmp_path, module, 5, accumulate=3, val_every=2)
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert header.startswith("step,reward,kl_penalty,loss,grad_norm,lr,images_per_second,peak_memory_bytes")
    rows = _rows(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert [float(row["reward"]) for row in rows] == seen  # to the last bit
    # the rate each step was made with, not the next one's
    assert [float(row["lr"]) for row in rows] == pytest.approx([0.0125, 0.025, 0.0375, 0.05, 0.05])
    assert all(float(r["images_per_second"]) == float(r["images"]) / float(r["seconds"]) for r in rows)
    assert all(100e6 < int(row["peak_memory_bytes"]) < 64e9 for row in rows)

    validation = _rows(tmp_path / "validation.csv")
    assert (tmp_path / "validation.csv").read_text().startswith("step,reward,base_reward\n")
    assert [row["step"] for row in validation] == ["2", "4"]
    assert float(validation[1]["reward"]) == module.last_validation["reward"]


def test_resuming_drops_the_rows_of_steps_that_are_done_again(tmp_path: Path) -> None:
    fit(tmp_path, Toy(), 4, save_interval=4, val_every=1)
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("5,-1.0,0.0,1.0,1.0,0.05,1.0,1\n6,-1.")  # a step after the checkpoint, and a row cut by the power
    with open(tmp_path / "validation.csv", "a") as file:
        file.write("5,-1.0,-1.5\n")
    fit(tmp_path, Toy(), 6, val_every=1, resume=find_resume_point(tmp_path / "checkpoints"))
    for name in ("metrics.csv", "validation.csv"):
        rows = _rows(tmp_path / name)
        assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
        assert all(None not in row and row["reward"] != "-1.0" for row in rows)


def test_bytes_that_are_no_text_cost_their_row_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.csv"
    content = b"step,reward\n1,1.0\n2,\xff\xfe\nthree,3.0\n4,4.0\n5,"
    path.write_bytes(content)
    table = CSVTable(path, ["step", "reward"])
    assert table.steps() == {1, 4}
    assert table.drop(lambda step: step > 3) == 4
    assert path.read_text() == "step,reward\n1,1.0\n"
    assert (tmp_path / "metrics.csv.damaged").read_bytes() == content
    assert "2 damaged rows are left out; the file as it was is metrics.csv.damaged" in caplog.text


def test_a_column_that_comes_later(tmp_path: Path) -> None:
    table = CSVTable(tmp_path / "t.csv", ["step", "reward"])
    table.append({"step": 1, "reward": 0.1 + 0.2})
    table.append({"step": 2, "reward": float("nan"), "symmetry": 1e-17})
    table.append({"step": 3})
    assert (tmp_path / "t.csv").read_text() == ("step,reward,symmetry\n1,0.30000000000000004,\n2,nan,1e-17\n3,,\n")
    again = CSVTable(tmp_path / "t.csv", ["step", "reward"])
    again.append({"symmetry": 2.0, "step": 4})
    assert (tmp_path / "t.csv").read_text().splitlines()[-1] == "4,,2.0"


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_memory_bytes()
    block = bytearray(before + (64 << 20))  # twice the peak: must raise it
    block[::4096] = b"x" * len(block[::4096])
    assert peak_memory_bytes() >= before + (32 << 20)
    # a program that this one starts is asked for its own
    code = "from nemo_aligner_diffusion.evaluation.metrics.peak_memory import peak_memory_bytes as p; print(p())"
    started = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=300)
    assert int(started.stdout) < before


@pytest.mark.parametrize("every", [1, 2])
def test_tensorboard_gets_the_same_figures(tmp_path: Path, every: int) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = build_loggers(LoggerSettings(), "mine", tmp_path)
    fit(tmp_path, Toy(), 3, val_every=3, logger=loggers, log_every_n_steps=every)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rewards = [(event.step, event.value) for event in events.Scalars("train/reward")]
    written = [(int(r["step"]), pytest.approx(float(r["reward"]))) for r in _rows(tmp_path / "metrics.csv")]
    assert rewards == written[every - 1 :: every]
    assert [event.step for event in events.Scalars("validation/base_reward")] == [3]


def test_weights_and_biases_gets_the_runs_name(tmp_path: Path) -> None:
    given = LoggerSettings(wandb_logger_kwargs={"project": "p", "group": None})
    assert wandb_arguments(given, "mine", tmp_path) == {"save_dir": str(tmp_path), "name": "mine", "project": "p"}
    given = LoggerSettings(wandb_logger_kwargs={"name": "other"})
    assert wandb_arguments(given, "mine", tmp_path)["name"] == "other"
    with pytest.raises(ConfigurationError, match=r"wandb_logger_kwargs\.project or \.name"):
        wandb_arguments(LoggerSettings(), "mine", tmp_path)


def test_no_logger(tmp_path: Path) -> None:
    assert build_loggers(LoggerSettings(create_tensorboard_logger=False), "mine", tmp_path) == []


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_logger_without_its_package(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"create_wandb_logger=True needs the package 'wandb'.*pip install"):
        build_loggers(LoggerSettings(create_wandb_logger=True), "mine", tmp_path)
