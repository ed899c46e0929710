"""The run directory: where it is, who may use it, what it says about the run."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_aligner_diffusion.errors import OutputError
from nemo_aligner_diffusion.runtime.directory import RunDirectory, read_state, resolve_run_directory
from nemo_aligner_diffusion.runtime.files import atomic_path, write_atomic


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Ranks and the version that a run hands to the processes it launches must not leak between tests."""
    kept = {name: os.environ.pop(name, None) for name in ("NEMO_EXPM_VERSION", "RANK", "LOCAL_RANK", "SLURM_PROCID")}
    yield
    os.environ.pop("NEMO_EXPM_VERSION", None)
    os.environ.update({name: value for name, value in kept.items() if value is not None})


def _finished_run(path: Path, status: str = "finished") -> None:
    run = RunDirectory.prepare({"explicit_log_dir": str(path)})
    run.begin(["train"])
    (path / "metrics.csv").write_text("step,reward\n1,0.5\n2,0.6\n")
    (path / "checkpoints" / "step_000002").mkdir()
    run.finish(status, step=2)


def test_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    now = datetime.datetime(2026, 11, 20, 6, 13, 5)
    assert resolve_run_directory({"explicit_log_dir": "here", "exp_dir": "ignored"}) == tmp_path / "here"
    assert resolve_run_directory({"exp_dir": "runs", "name": "n", "resume_if_exists": True}) == tmp_path / "runs" / "n"
    assert "NEMO_EXPM_VERSION" not in os.environ
    dated = resolve_run_directory({}, "draftp_sd", now)
    assert dated == tmp_path / "nemo_experiments" / "draftp_sd" / "2026-11-20_06-13-05"
    assert resolve_run_directory({}, "draftp_sd") == dated  # as a process that this one launches


def test_a_new_directory(tmp_path: Path) -> None:
    run = RunDirectory.prepare({"explicit_log_dir": str(tmp_path / "a" / "b")})
    assert run.checkpoints.is_dir()
    assert run.samples.is_dir()
    run.write_config(OmegaConf.create({"name": "x", "model": {"lr": 1e-4, "title": "${name}"}}))
    assert OmegaConf.load(run.path / "config.yaml") == {"name": "x", "model": {"lr": 1e-4, "title": "x"}}
    run.begin(["train.py", "a=1"])
    state = json.loads((run.path / "run.json").read_text())
    assert state["status"] == "running"
    assert state["command"] == ["train.py", "a=1"]
    assert state["packages"]["torch"].startswith("2.")
    run.finish("interrupted", step=7)
    state = read_state(run.path)
    assert (state["status"], state["step"]) == ("interrupted", 7)
    assert datetime.datetime.fromisoformat(state["finished"]) >= datetime.datetime.fromisoformat(state["started"])
    assert sorted(p.name for p in run.path.iterdir()) == ["checkpoints", "config.yaml", "run.json", "samples"]


@pytest.mark.parametrize(
    ("status", "words"),
    [("finished", "a finished run"), ("interrupted", "an interrupted run"), ("failed", "a failed run")],
)
def test_a_second_run_is_refused_with_the_ways_out(tmp_path: Path, status: str, words: str) -> None:
    _finished_run(tmp_path, status)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(OutputError) as caught:
        RunDirectory.prepare({"explicit_log_dir": str(tmp_path)})
    message = str(caught.value)
    assert f"{tmp_path} already holds {words} (2 steps in metrics.csv, last checkpoint step_000002," in message
    for way in ("resume_if_exists=True", "another exp_manager.explicit_log_dir", "remove the directory"):
        assert way in message
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_resuming(tmp_path: Path) -> None:
    _finished_run(tmp_path)
    run = RunDirectory.prepare({"explicit_log_dir": str(tmp_path), "resume_if_exists": True})
    assert run.previous["step"] == 2
    run.begin(["again"])
    run.finish(step=4)
    state = read_state(tmp_path)
    assert [entry["step"] for entry in state["history"]] == [2]
    assert state["step"] == 4


def test_resuming_where_there_is_nothing(tmp_path: Path) -> None:
    resume = {"explicit_log_dir": str(tmp_path / "new"), "resume_if_exists": True}
    with pytest.raises(OutputError, match=r"holds no checkpoint\. .*resume_ignore_no_checkpoint=True"):
        RunDirectory.prepare(resume)
    run = RunDirectory.prepare({**resume, "resume_ignore_no_checkpoint": True})
    assert run.previous == {}


def test_a_run_that_failed_at_its_data_may_be_tried_again(tmp_path: Path) -> None:
    run = RunDirectory.prepare({"explicit_log_dir": str(tmp_path)})
    run.begin(["train"])
    run.finish("failed", error="no such shard")
    assert RunDirectory.prepare({"explicit_log_dir": str(tmp_path)}).previous["status"] == "failed"


def test_a_directory_in_use(tmp_path: Path) -> None:
    program = (
        "import sys, time; from nemo_aligner_diffusion.runtime.directory import RunDirectory;"
        f"RunDirectory.prepare({{'explicit_log_dir': {str(tmp_path)!r}}}).begin([]); print('ready', flush=True);"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for resume in (False, True):
            with pytest.raises(OutputError, match=f"in use: process {process.pid} on this machine"):
                RunDirectory.prepare({"explicit_log_dir": str(tmp_path), "resume_if_exists": resume})
        process.kill()
        process.wait()
    RunDirectory.prepare({"explicit_log_dir": str(tmp_path)})  # killed before its first step: free again


def test_places_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(OutputError, match=f"{place} cannot be written to: .*explicit_log_dir"):
            RunDirectory.prepare({"explicit_log_dir": str(place)})


def test_other_ranks_neither_look_nor_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _finished_run(tmp_path)
    monkeypatch.setenv("RANK", "1")
    run = RunDirectory.prepare({"explicit_log_dir": str(tmp_path)})
    before = (tmp_path / "run.json").read_bytes()
    run.begin()
    run.write_config(OmegaConf.create({"a": 1}))
    run.finish()
    assert (tmp_path / "run.json").read_bytes() == before
    assert not (tmp_path / "config.yaml").exists()


def test_what_changed_between_two_runs(tmp_path: Path) -> None:
    run = RunDirectory.prepare({"explicit_log_dir": str(tmp_path)})
    assert run.changed_keys(OmegaConf.create({"a": 1})) == {}
    run.write_config(OmegaConf.create({"model": {"lr": 1e-4, "betas": [0.9, 0.999]}, "same": "${model.lr}", "gone": 1}))
    now = OmegaConf.create({"model": {"lr": 2e-4, "betas": [0.9, 0.999]}, "same": 1e-4})
    now.exp_manager = {"resume_if_exists": True}
    assert run.changed_keys(now) == {"model.lr": (1e-4, 2e-4), "gone": (1, None)}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")

    def fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"
    assert oct(path.stat().st_mode & 0o777) == oct(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_it_needs_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from nemo_aligner_diffusion.runtime.directory import RunDirectory;"
        f"RunDirectory.prepare({{'explicit_log_dir': {str(tmp_path)!r}}}).begin([]);"
        "print(sorted({'torch', 'pytorch_lightning', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
