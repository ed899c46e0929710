"""Faults in whole runs of two processes, started as users start them."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny.runs import overrides

from nemo_aligner_diffusion.errors import RankLostError

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "examples" / "mm" / "stable_diffusion" / "train_sd_draftp.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
VARYING = {"images_per_second", "peak_memory_bytes", "seconds"}


@pytest.fixture(scope="module")
def inputs(pipeline: Path, prompts: Path) -> tuple[Path, Path]:
    return pipeline, prompts


def run(launcher: list[str], inputs: tuple[Path, Path], directory: Path, reward: str, *more: str) -> tuple[int, str]:
    """Exit code, and the screen (both streams in their order)."""
    words = [word for word in overrides(*inputs, directory) if not word.startswith("rm=")]
    words += ["rm=custom", "rm.import_path=faulty_reward:FaultyReward", f"+rm.kwargs={reward}", "trainer.devices=2"]
    words += ["trainer.draftp_sd.max_steps=8", "exp_manager.create_tensorboard_logger=false"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(
        [*launcher, SCRIPT, *words, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        timeout=500,
    )
    return done.returncode, done.stdout


def metrics(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in VARYING} for row in csv.DictReader(file)]


def state(directory: Path) -> dict[str, str]:
    return json.loads((directory / "run.json").read_text())


@pytest.mark.alone
@pytest.mark.slow
def test_torchrun_starts_a_killed_run_again_to_the_same_end(tmp_path, inputs) -> None:
    quick = "trainer.draftp_sd.val_check_interval=0"
    code, screen = run(TORCHRUN, inputs, tmp_path / "calm", "{}", quick)
    assert code == 0, screen
    once = tmp_path / "killed"
    fault = f"{{what:kill,at:6,once:{once}}}"
    code, screen = run([*TORCHRUN, "--max-restarts=1"], inputs, tmp_path / "again", fault, quick)
    assert code == 0, screen
    assert once.exists()
    assert re.search(r"error on rank 1 \(host .*, pid \d+\), .*: the process is gone", screen)
    assert screen.count("error on rank") == 1
    assert "torchrun has started the processes again (restart 1): resuming this run" in screen
    assert "Traceback" not in screen
    assert [row["step"] for row in metrics(tmp_path / "again")] == [str(step) for step in range(1, 9)]
    assert metrics(tmp_path / "again") == metrics(tmp_path / "calm")
    calm, again = (
        load_file(tmp_path / name / "export" / "pytorch_lora_weights.safetensors") for name in ("calm", "again")
    )
    assert calm.keys() == again.keys()
    assert all(calm[name].equal(again[name]) for name in calm)
    assert state(tmp_path / "again")["status"] == "finished"


@pytest.mark.alone
@pytest.mark.slow
def test_an_exception_of_one_rank_is_what_the_screen_shows(tmp_path, inputs) -> None:
    directory = tmp_path / "run"
    code, screen = run([sys.executable], inputs, directory, "{what:raise,at:5}")
    assert code == 1, screen
    (told,) = re.findall(r"^error on rank .*$", screen, re.MULTILINE)
    assert re.fullmatch(
        r"error on rank 1 \(host .+, pid \d+\), forward pass of step 3: ValueError: this reward has had enough", told
    )
    assert "in fault: raise ValueError" in screen
    assert "Traceback" not in screen
    assert "onnection" not in screen.split(told)[1]  # what the other rank's libraries met when this one went
    assert (directory / "fault.txt").read_text().count("Traceback") == 1
    assert state(directory)["status"] == "failed"
    assert state(directory)["error"] == told


@pytest.mark.alone
@pytest.mark.slow
def test_a_hang_ends_with_its_place_and_no_process_stays(tmp_path, inputs) -> None:
    directory = tmp_path / "run"
    limits = "exp_manager.fault_tolerance."
    started = time.monotonic()
    code, screen = run(
        [*TORCHRUN],
        inputs,
        directory,
        "{what:loop,at:5}",
        "trainer.draftp_sd.val_check_interval=0",
        f"{limits}minimum_heartbeat_timeout=15",
        f"{limits}rank_heartbeat_timeout=15",
    )
    assert code != 0
    assert time.monotonic() - started < 400
    (told,) = re.findall(r"^error on rank 1 .* no progress for .*$", screen, re.MULTILINE)
    assert "forward pass of step 5" in told
    assert "rank 0 waits for it" in told
    assert "faulty_reward.py" in screen
    assert screen.index("torch.distributed.elastic.multiprocessing.errors.ChildFailedError") > screen.index(told)
    assert told in screen.split("Root Cause")[1]  # torchrun's summary shows the same
    assert f"exitcode  : {RankLostError.exit_code}" in screen
    assert state(directory)["error"] == told
