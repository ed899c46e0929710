"""A disk that fills while a run writes: a small file system of its own, filled for real; one clear error each time."""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny.runs import overrides

from nemo_aligner_diffusion.config.load import load_config
from nemo_aligner_diffusion.errors import AlignerError, OutputError
from nemo_aligner_diffusion.runtime.directory import RunDirectory, read_state, unusable_disk
from nemo_aligner_diffusion.training.run import run_training

SIZE = 4 << 20  # bytes
TELLS = r"(could not be written|cannot write).*No space left on device.*room"


class FillingReward:
    """A user's reward that, at one of its calls, leaves no room on a file system, or makes it read-only."""

    def __init__(self, at: int, folder: str, shut: bool = False) -> None:
        self.at, self.folder, self.shut, self.calls = at, Path(folder), shut, 0

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.at:
            if self.shut:  # as the kernel does with a failing disk: whatever is open for writing
                subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", self.folder / "run"], check=True)
            else:
                fill(self.folder)
        return images.mean(dim=(1, 2, 3))


def fill(folder: Path) -> None:
    with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB; only root may make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", folder], capture_output=True)
    if made.returncode:
        pytest.skip("a file system of its own needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def start(pipeline: Path, prompts: Path, disk: Path, at: int, *more: str) -> int:
    custom = [
        "rm=custom",
        "rm.import_path=test_training_full_disk:FillingReward",
        f"+rm.kwargs={{at:{at},folder:{disk}}}",
        "model.global_batch_size=2",
        *more,
    ]
    given = [word for word in overrides(pipeline, prompts, disk / "run") if not word.startswith("rm=")]
    return run_training(load_config("draftp_sd", [*given, *custom]))


# The reward is called once a step, and twice (base, tuned) for each of the two pictures' batches of a validation.
@pytest.mark.parametrize(
    ("at", "more"),
    [
        # metrics.csv, or the second checkpoint
        (4, ["trainer.draftp_sd.val_check_interval=0", "exp_manager.create_tensorboard_logger=false"]),
        # TensorBoard's thread, the same
        (4, ["trainer.draftp_sd.val_check_interval=0", "exp_manager.create_tensorboard_logger=true"]),
        # the pictures of a validation
        (3, ["trainer.draftp_sd.max_steps=2", "exp_manager.create_tensorboard_logger=false"]),
    ],
)
def test_a_full_disk_is_told_and_earlier_checkpoints_stay(pipeline, prompts, small_disk, at, more, capsys) -> None:
    hook = threading.excepthook
    with pytest.raises(AlignerError, match=TELLS):
        start(pipeline, prompts, small_disk, at, *more)
    assert "Traceback" not in capsys.readouterr().err
    assert threading.excepthook is hook
    state = read_state(small_disk / "run")
    assert state["status"] == "failed"
    assert "No space left on device" in state["error"]
    checkpoints = [entry.name for entry in (small_disk / "run" / "checkpoints").glob("step_*")]
    assert checkpoints == ["step_000002"]

    (small_disk / "filler").unlink()
    assert start(pipeline, prompts, small_disk, 1000, *more, "exp_manager.resume_if_exists=true") == 0
    with (small_disk / "run" / "metrics.csv").open(newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == list(range(1, 1 + (2 if "trainer.draftp_sd.max_steps=2" in more else 4)))
    assert read_state(small_disk / "run")["status"] == "finished"
    assert (small_disk / "run" / "export" / "pytorch_lora_weights.safetensors").exists()


def test_a_disk_that_becomes_read_only_is_told(pipeline, prompts, small_disk, capsys) -> None:
    more = ["trainer.draftp_sd.val_check_interval=0", "exp_manager.create_tensorboard_logger=false"]
    try:
        with pytest.raises(AlignerError, match=r"(could not be written|cannot write).*Read-only file system.*resume"):
            start(pipeline, prompts, small_disk, 4, *more, "+rm.kwargs.shut=true")
    finally:
        subprocess.run(["umount", "-l", small_disk / "run"], check=True)
    assert "Traceback" not in capsys.readouterr().err
    assert start(pipeline, prompts, small_disk, 1000, *more, "exp_manager.resume_if_exists=true") == 0
    with (small_disk / "run" / "metrics.csv").open(newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [1, 2, 3, 4]
    assert read_state(small_disk / "run")["status"] == "finished"


def test_no_room_for_the_export(pipeline, prompts, small_disk) -> None:
    # the last validation comes after the last checkpoint and before the export
    more = ["trainer.draftp_sd.max_steps=3", "trainer.draftp_sd.val_check_interval=100"]
    with pytest.raises(AlignerError, match=TELLS):
        start(pipeline, prompts, small_disk, 4, *more, "exp_manager.create_tensorboard_logger=false")
    assert (small_disk / "run" / "checkpoints" / "step_000003").exists()
    assert read_state(small_disk / "run")["status"] == "failed"
    assert not list((small_disk / "run").glob("export/*.tmp"))


def test_how_a_run_ended_is_written_in_place_where_there_is_no_room(small_disk: Path) -> None:
    directory = RunDirectory.prepare(small_disk / "run")
    directory.begin("")
    fill(small_disk)
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "other").write_text("x")
    directory.finish("failed", error="the disk is full")
    assert json.loads((small_disk / "run" / "run.json").read_text())["error"] == "the disk is full"


def test_a_full_disk_is_known_by_whatever_name() -> None:
    plain = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/results/metrics.csv")
    found = unusable_disk(plain, None)
    assert isinstance(found, OutputError)
    assert str(found).startswith("/results/metrics.csv could not be written: [Errno 28] No space left on device")
    wrapped = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert unusable_disk(wrapped, None) is not None
    consequence = ValueError("the writer is closed")
    consequence.__context__ = plain
    assert unusable_disk(consequence, None) is not None
    assert unusable_disk(OSError(errno.ENOENT, "No such file"), None) is None
    assert unusable_disk(ValueError("something else"), None) is None
