"""Whole runs from the command line that are disturbed: started twice, left by their reader, hung up, not resumable."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_aligner_diffusion.runtime.directory import read_state

pytestmark = pytest.mark.alone

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 240.0
TRAIN = [sys.executable, "-c", "import sys; from nemo_aligner_diffusion.cli.train import train; sys.exit(train())"]
WORDS = [
    *("model.infer.inference_steps=2", "model.truncation_steps=1", "model.micro_batch_size=1"),
    *("model.global_batch_size=1", "trainer.accelerator=cpu", "trainer.draftp_sd.val_check_interval=0"),
    *("exp_manager.create_tensorboard_logger=false", "report.enable=false", "rm=symmetry"),
]


def start(folder: Path, steps: int, *more: str, **environment: str) -> subprocess.Popen[str]:
    place = f"exp_manager.explicit_log_dir={folder}"
    return subprocess.Popen(
        [*TRAIN, *WORDS, f"trainer.draftp_sd.max_steps={steps}", place, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def steps_of(folder: Path) -> list[int]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def wait_for_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while not (folder / "metrics.csv").exists() or step not in steps_of(folder):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_the_same_command_twice_at_once(tmp_path: Path) -> None:
    both = [start(tmp_path / "run", 2) for _ in range(2)]
    ended = [(process.communicate(timeout=PATIENCE)[1], process.returncode) for process in both]
    assert sorted(code for _, code in ended) == [0, 2], ended
    (refused,) = [said for said, code in ended if code == 2]
    assert f"{tmp_path / 'run'} is in use: process" in refused
    assert steps_of(tmp_path / "run") == [1, 2]
    assert read_state(tmp_path / "run")["status"] == "finished"


@pytest.mark.slow
def test_a_finished_run_is_neither_overwritten_nor_marked_by_what_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = start(run, 1, "model.peft.lora_tuning.adapter_dim=8")
    assert first.communicate(timeout=PATIENCE) is not None
    assert first.returncode == 0
    before = contents(run)
    # RANK as Kubernetes' PyTorchJob leaves it; another rank of the adapter than the checkpoint has
    for more, environment, message in (
        ((), {"RANK": "1"}, "already holds a finished run"),
        (("exp_manager.resume_if_exists=true", "model.peft.lora_tuning.adapter_dim=4"), {}, "does not fit this conf"),
    ):
        again = start(run, 2, *more, **environment)
        _, said = again.communicate(timeout=PATIENCE)
        assert again.returncode == 2, said
        assert message in said
        assert contents(run) == before


NAME = """
import logging, sys
from nemo_aligner_diffusion.runtime.ending import command
@command(interrupted="")
def main(argv):
    logging.getLogger("nemo_aligner_diffusion.somewhere").warning("%s is left out", "a\\x1b[2J\\rb")
    return 0
sys.exit(main())
"""


def test_a_name_in_a_warning_does_not_act_on_the_terminal() -> None:
    done = subprocess.run([sys.executable, "-c", NAME], capture_output=True, text=True, check=True)
    assert done.stderr == "a\\x1b[2J\\rb is left out\n"


@pytest.mark.parametrize("words", [["--help"], ["--cfg"]])
def test_who_reads_a_line_of_the_help_and_goes_sees_no_error(words: list[str]) -> None:
    with subprocess.Popen([*TRAIN, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(PATIENCE) == 0
        assert process.stderr.read() == ""


@pytest.mark.slow
def test_a_run_outlives_its_reader_and_a_hangup_saves_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run, 10_000)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stderr.close()
    wait_for_step(run, 3)
    process.send_signal(signal.SIGHUP)
    assert process.wait(PATIENCE) == 129
    state = read_state(run)
    assert state["status"] == "interrupted"
    last = steps_of(run)[-1]
    assert state["step"] == last >= 3
    assert (run / "checkpoints" / f"step_{last:06d}").is_dir()
    assert (run / "export" / "pytorch_lora_weights.safetensors").is_file()


def test_a_hangup_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """As under nohup."""
    program = (
        "import os, signal\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from nemo_aligner_diffusion.runtime.signals import Interruption\n"
        "with Interruption() as interruption:\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "print(interruption.requested)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == "None\n", done.stderr


@pytest.mark.parametrize("script", ["train_sd_draftp.py", "train_reward_model.py"])
def test_a_start_that_fails_leaves_no_folder(tmp_path: Path, script: str) -> None:
    (path,) = (ROOT / "examples").rglob(script)
    missing = f"model.data.train.webdataset.local_root_path={tmp_path / 'missing.tar'}"
    place = f"exp_manager.explicit_log_dir={tmp_path / 'a' / 'run'}"
    done = subprocess.run(
        [sys.executable, path, missing, place, "trainer.accelerator=cpu"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2, done.stderr
    assert "missing.tar" in done.stderr
    assert list(tmp_path.iterdir()) == []
