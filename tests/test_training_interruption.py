"""Ctrl-C and SIGTERM: the step completes, a checkpoint is saved, export and report still happen. Real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_toy import Toy, fit

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.training.checkpointing import find_resume_point
from nemo_aligner_diffusion.training.interruption import (
    Interrupted,
    Interruption,
    InterruptionCallback,
    parse_duration,
    run_then_close,
)
from nemo_aligner_diffusion.training.run_directory import RunDirectory, read_state

PROGRAM = """
import sys, time
sys.path.insert(0, {tests!r})
from training_toy import Toy, fit
from nemo_aligner_diffusion.training.interruption import Interruption, InterruptionCallback, run_then_close
from nemo_aligner_diffusion.training.run_directory import RunDirectory

run = RunDirectory.prepare({{"explicit_log_dir": sys.argv[1]}})
run.begin()
interruption = Interruption()
module = Toy(max_steps=1000)

def at_step(step):
    if step == 3:
        print("training", flush=True)
    time.sleep(0.2 if step >= 3 else 0)
module.at_step = at_step

def train():
    fit(run.path, module, 1000, accumulate=2, val_every=1000, callbacks=[InterruptionCallback(interruption)])

def export():
    (run.path / "export.txt").write_text(str(module.adapter.weight.sum().item()))

def report():
    run.finish("interrupted" if interruption.requested else "finished", step=module.trainer.global_step)

sys.exit(run_then_close(interruption, train, [export, report]))
"""


def test_a_signal_ends_the_run_well(tmp_path: Path) -> None:
    program = PROGRAM.format(tests=str(Path(__file__).parent))
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        try:
            assert process.stdout is not None
            assert any(line.strip() == "training" for line in process.stdout)
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGINT)  # a launcher passes on what the terminal has already sent: one wish
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "stopping after the step under way" in err
    state = read_state(tmp_path)
    assert state["status"] == "interrupted"
    resume = find_resume_point(tmp_path / "checkpoints")
    assert resume is not None
    assert resume.step == state["step"] >= 3
    weights = torch.load(resume.path, weights_only=True)["state_dict"]["adapter.weight"]
    assert float((tmp_path / "export.txt").read_text()) == float(weights.sum())  # export and checkpoint agree
    assert not (tmp_path / "validation.csv").exists()


def test_a_second_signal_stops_at_once_and_still_closes(tmp_path: Path) -> None:
    interruption, module, done = Interruption(), Toy(), []

    def stuck(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(interruption.again_after + 0.1)
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("went on")

    module.at_step = stuck
    code = run_then_close(
        interruption,
        lambda: fit(tmp_path, module, 6, callbacks=[InterruptionCallback(interruption)]) and None,
        [lambda: done.append(f"export after step {module.trainer.global_step}")],
    )
    assert code == 130
    assert done == ["export after step 2"]


def test_before_training_a_signal_stops_at_once() -> None:
    done = []

    def load() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("went on")

    interruption = Interruption()
    assert run_then_close(interruption, load, []) == 143
    assert done == []


def test_an_interrupted_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    fit(tmp_path / "whole", whole := Toy(), 6, accumulate=2)
    interruption = Interruption()
    first = Toy()
    first.at_step = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None
    run = tmp_path / "run"
    with interruption:
        trainer = fit(run, first, 6, accumulate=2, callbacks=[InterruptionCallback(interruption)])
    assert trainer.global_step == 3
    assert interruption.exit_code == 143
    again = Toy()
    fit(run, again, 6, accumulate=2, resume=find_resume_point(run / "checkpoints"), seed=None)
    assert torch.equal(again.adapter.weight, whole.adapter.weight)


def test_every_closing_step_runs_and_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    done: list[str] = []

    def broken() -> None:
        done.append("broken")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run_then_close(Interruption(), lambda: done.append("train"), [broken, lambda: done.append("report")])
    assert done == ["train", "broken", "report"]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_during_the_export_lets_it_finish() -> None:
    done: list[str] = []

    def export() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        done.append("export")

    assert run_then_close(Interruption(), lambda: None, [export, lambda: done.append("report")]) == 130
    assert done == ["export", "report"]


def test_an_error_in_training_is_not_swallowed(tmp_path: Path) -> None:
    run = RunDirectory.prepare({"explicit_log_dir": str(tmp_path)})
    run.begin()

    def train() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        run_then_close(Interruption(), train, [])
    assert issubclass(Interrupted, BaseException)
    assert not issubclass(Interrupted, Exception)


def test_durations() -> None:
    assert parse_duration("01:02:03:04").total_seconds() == 86400 + 2 * 3600 + 3 * 60 + 4
    for text in ("1:00", "00:00:60", "an hour", "00:1:00:00"):
        with pytest.raises(ConfigurationError, match="days:hours:minutes:seconds"):
            parse_duration(text)
