"""Ctrl-C and SIGTERM: the step completes, a checkpoint is saved, export and report still happen. Real signals."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny.training import Numbers, Toy, fit
from torch.utils.data import DataLoader

from nemo_aligner_diffusion.runtime.directory import RunDirectory, read_state
from nemo_aligner_diffusion.runtime.signals import Interrupted, Interruption, run_then_close
from nemo_aligner_diffusion.training.callbacks.interruption import InterruptionCallback
from nemo_aligner_diffusion.training.checkpoints.resume import find_resume_point

PROGRAM = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from tiny.training import Toy, fit
from nemo_aligner_diffusion.runtime.signals import Interruption, run_then_close
from nemo_aligner_diffusion.training.callbacks.interruption import InterruptionCallback
from nemo_aligner_diffusion.runtime.directory import RunDirectory

run = RunDirectory.prepare(Path(sys.argv[1]))
run.begin("")
interruption = Interruption()
interruption.again_after = 600.0  # however long the machine takes between the two signals below
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


@pytest.mark.alone
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
            _, err = process.communicate(timeout=240)
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
    weights = load_file(resume.path / "tensors-00000.safetensors")["adapter.weight"]
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
    with pytest.raises(Interrupted):
        run_then_close(interruption, load, [lambda: done.append("exported what no checkpoint was read into yet")])
    assert done == []
    assert interruption.exit_code == 143


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


@pytest.mark.parametrize("step", range(1, 7))
def test_wherever_it_was_interrupted_the_last_checkpoint_is_the_same(step: int, tmp_path: Path) -> None:
    """Also at a step that is validated (3, 6) or saved anyway (4)."""

    def last_checkpoint(run: Path, module: Toy, **more: Any) -> dict[str, bytes]:
        fit(run, module, 7, save_interval=4, val_every=3, **more)
        return {file.name: file.read_bytes() for file in (run / "checkpoints" / "step_000007").iterdir()}

    whole = last_checkpoint(tmp_path / "whole", Toy())
    interruption = Interruption()
    first = Toy()
    first.at_step = lambda now: os.kill(os.getpid(), signal.SIGTERM) if now == step else None
    run = tmp_path / "run"
    with interruption:
        fit(run, first, 7, save_interval=4, val_every=3, callbacks=[InterruptionCallback(interruption)])
    resume = find_resume_point(run / "checkpoints")
    assert resume is not None
    assert resume.step == step
    assert last_checkpoint(run, Toy(), resume=resume, seed=None) == whole
    assert (run / "validation.csv").read_bytes() == (tmp_path / "whole" / "validation.csv").read_bytes()


def test_a_step_done_again_after_its_validation_gives_the_same_checkpoint(tmp_path: Path) -> None:
    fit(tmp_path, Toy(), 7, save_interval=3, val_every=3)
    last = tmp_path / "checkpoints" / "step_000007"
    whole = {file.name: file.read_bytes() for file in last.iterdir()}
    shutil.rmtree(last)  # as if killed in step 7, with step 6 saved and validated
    resume = find_resume_point(tmp_path / "checkpoints")
    assert resume is not None
    assert resume.step == 6
    fit(tmp_path, Toy(), 7, save_interval=3, val_every=3, resume=resume, seed=None)
    assert {file.name: file.read_bytes() for file in last.iterdir()} == whole


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


def test_sigterm_in_the_last_validation_lets_it_finish(tmp_path: Path) -> None:
    """Lightning puts a handler of its own in front, in each of its calls, which would end the program there."""
    interruption, module, done = Interruption(), Toy(), []
    trainers = []

    def train() -> None:
        trainers.append(fit(tmp_path, module, 2, val_every=10, callbacks=[InterruptionCallback(interruption)]))

    def validate() -> None:
        trainers[0].limit_val_batches = 3
        validation_step = module.validation_step

        def told(batch: torch.Tensor, batch_idx: int) -> None:
            if batch_idx == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            validation_step(batch, batch_idx)
            done.append(batch_idx)

        module.validation_step = told
        trainers[0].validate(module, DataLoader(Numbers(0), batch_size=2), verbose=False)

    assert run_then_close(interruption, train, [validate, lambda: done.append("export")]) == 143
    assert done == [0, 1, 2, "export"]


def test_what_another_process_was_told_is_not_a_first_signal_of_this_one(caplog: pytest.LogCaptureFixture) -> None:
    interruption, done = Interruption(), []

    def export() -> None:
        os.kill(os.getpid(), signal.SIGTERM)  # late, because this process was busy
        done.append("export")
        time.sleep(interruption.again_after + 0.1)
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("went on")

    assert run_then_close(interruption, lambda: interruption.note_signal_elsewhere(signal.SIGTERM), [export]) == 143
    assert done == ["export"]
    assert "another process got SIGTERM" in caplog.text


def test_an_error_in_training_is_not_swallowed(tmp_path: Path) -> None:
    run = RunDirectory.prepare(tmp_path)
    run.begin("")

    def train() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        run_then_close(Interruption(), train, [])
    assert issubclass(Interrupted, BaseException)
    assert not issubclass(Interrupted, Exception)


def test_after_dismissal_signals_do_not_change_the_exit_status() -> None:
    program = """
import os, signal, sys
from nemo_aligner_diffusion.runtime.signals import Interruption
interruption = Interruption()
with interruption:
    interruption.dismiss()
    os.kill(os.getpid(), signal.SIGTERM)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    os.kill(os.getpid(), number)
sys.exit(75)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (75, "")
