"""The run directory: where it is, who may use it, what it says about the run."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_aligner_diffusion.errors import OutputError
from nemo_aligner_diffusion.runtime.directory import RunDirectory, read_state, resolve_run_directory
from nemo_aligner_diffusion.runtime.files import atomic_path, write_atomic
from nemo_aligner_diffusion.runtime.settings import RunDirectorySettings


def _finished_run(path: Path, status: str = "finished") -> None:
    run = RunDirectory.prepare(path)
    run.begin("", ["train"])
    (path / "metrics.csv").write_text("step,reward\n1,0.5\n2,0.6\n")
    (path / "checkpoints" / "step_000002").mkdir()
    run.finish(status, step=2)
    run.release()


def test_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NEMO_EXPM_VERSION", raising=False)
    now = datetime.datetime(2026, 11, 20, 6, 13, 5)
    assert resolve_run_directory(RunDirectorySettings(explicit_log_dir="here", exp_dir="ignored")) == tmp_path / "here"
    assert (
        resolve_run_directory(RunDirectorySettings(exp_dir="runs", name="n", resume_if_exists=True))
        == tmp_path / "runs" / "n"
    )
    dated = resolve_run_directory(RunDirectorySettings(name="draftp_sd"), now)
    assert dated == tmp_path / "nemo_experiments" / "draftp_sd" / "2026-11-20_06-13-05"
    later = now + datetime.timedelta(seconds=1)
    assert resolve_run_directory(RunDirectorySettings(name="draftp_sd"), later) != dated  # a program may train twice
    monkeypatch.setenv("NEMO_EXPM_VERSION", "mine")
    assert resolve_run_directory(RunDirectorySettings(name="draftp_sd")) == dated.with_name("mine")


def test_a_new_directory(tmp_path: Path) -> None:
    run = RunDirectory.prepare(tmp_path / "a" / "b")
    run.begin("name: x\n", ["train.py", "a=1"])
    assert run.checkpoints.is_dir()
    assert run.samples.is_dir()
    assert (run.path / "config.yaml").read_text() == "name: x\n"
    state = json.loads((run.path / "run.json").read_text())
    assert state["status"] == "running"
    assert state["command"] == ["train.py", "a=1"]
    assert state["packages"]["torch"].startswith("2.")
    run.finish("interrupted", step=7)
    state = read_state(run.path)
    assert (state["status"], state["step"]) == ("interrupted", 7)
    assert datetime.datetime.fromisoformat(state["finished"]) >= datetime.datetime.fromisoformat(state["started"])
    run.release()
    assert sorted(p.name for p in run.path.iterdir()) == ["checkpoints", "config.yaml", "run.json", "samples"]


@pytest.mark.parametrize(
    ("status", "words"),
    [("finished", "a finished run"), ("interrupted", "an interrupted run"), ("failed", "a failed run")],
)
def test_a_second_run_is_refused_with_the_ways_out(tmp_path: Path, status: str, words: str) -> None:
    _finished_run(tmp_path, status)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(OutputError) as caught:
        RunDirectory.prepare(tmp_path)
    message = str(caught.value)
    assert f"{tmp_path} already holds {words} (2 steps in metrics.csv, last checkpoint step_000002," in message
    for way in ("resume_if_exists=True", "another exp_manager.explicit_log_dir", "remove the directory"):
        assert way in message
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_resuming(tmp_path: Path) -> None:
    _finished_run(tmp_path)
    run = RunDirectory.prepare(tmp_path, resume=True)
    assert run.previous["step"] == 2
    run.begin("", ["again"])
    run.finish(step=4)
    state = read_state(tmp_path)
    assert [entry["step"] for entry in state["history"]] == [2]
    assert state["step"] == 4


def test_resuming_where_there_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"holds no checkpoint\. .*resume_ignore_no_checkpoint=True"):
        RunDirectory.prepare(tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()
    run = RunDirectory.prepare(tmp_path / "new", resume=True, may_start_anew=True)
    assert run.previous == {}


def test_a_run_that_failed_at_its_data_may_be_tried_again(tmp_path: Path) -> None:
    run = RunDirectory.prepare(tmp_path)
    run.begin("", ["train"])
    run.finish("failed", error="no such shard")
    assert RunDirectory.prepare(tmp_path).previous["status"] == "failed"


def test_a_directory_in_use(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from nemo_aligner_diffusion.runtime.directory import RunDirectory;"
        f"run = RunDirectory.prepare(Path({str(tmp_path)!r})); print('ready', flush=True);"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for resume in (False, True):
            with pytest.raises(OutputError, match=f"in use: process {process.pid} on this machine"):
                RunDirectory.prepare(tmp_path, resume=resume)
        process.kill()
        process.wait()
    RunDirectory.prepare(tmp_path)  # killed before its first step: free again


def test_places_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(OutputError, match=f"{place} cannot be written to: .*explicit_log_dir"):
            RunDirectory.prepare(place)


def test_other_ranks_neither_look_nor_write(tmp_path: Path) -> None:
    _finished_run(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    run = RunDirectory.prepare(tmp_path, is_writer=False)
    run.begin("a: 1\n")
    run.finish()
    run.release()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


DAMAGED = {
    "config.yaml": b"model: {lr: 0.0001\n\tbetas: [",
    "metrics.csv": b"step,reward\n1,0.5\n2,\xff\xfe\n",
    "run.json": b'{"status": 7, "slurm": "no", "history": [3, {"step": 1}], "pid": "x", "started": null}',
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_beside_whole_checkpoints_is_passed_over(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    _finished_run(tmp_path)
    (tmp_path / name).write_bytes(DAMAGED[name])
    with pytest.raises(OutputError, match="already holds"):
        RunDirectory.prepare(tmp_path)
    run = RunDirectory.prepare(tmp_path, resume=True)
    assert run.changed_keys("model: {lr: 0.1}") == {} or name != "config.yaml"
    assert ("config.yaml cannot be read" in caplog.text) == (name == "config.yaml")
    run.begin("")
    run.finish(step=3)
    assert read_state(tmp_path)["step"] == 3
    assert run.steps_before() == ([1, None] if name == "run.json" else [2])


def test_a_start_that_fails_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for place, stays in ((tmp_path / "a" / "b", tmp_path), (tmp_path / "mine" / "c", tmp_path / "mine")):
        run = RunDirectory.prepare(place)
        (place / "prompts.txt").write_text("p\n")
        run.release(["prompts.txt"])
        assert sorted(tmp_path.iterdir()) == [tmp_path / "mine"]
        assert stays.is_dir()


def test_what_changed_between_two_runs(tmp_path: Path) -> None:
    run = RunDirectory.prepare(tmp_path)
    assert run.changed_keys("a: 1") == {}
    run.begin("model: {lr: 0.0001, betas: [0.9, 0.999]}\ngone: 1\n")
    now = "model: {lr: 0.0002, betas: [0.9, 0.999]}\nexp_manager: {resume_if_exists: true}\n"
    assert run.changed_keys(now) == {"model.lr": (1e-4, 2e-4), "gone": (1, None)}


def test_a_path_that_is_written_in_full_is_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunDirectory.prepare(tmp_path / "run")
    run.begin("model: {from_pretrained: ../flux}\n")
    assert run.changed_keys(f"model: {{from_pretrained: {tmp_path.parent / 'flux'}}}") == {}
    assert list(run.changed_keys(f"model: {{from_pretrained: {tmp_path / 'flux'}}}")) == ["model.from_pretrained"]


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
        "import sys; from pathlib import Path; from nemo_aligner_diffusion.runtime.directory import RunDirectory;"
        f"RunDirectory.prepare(Path({str(tmp_path)!r})).begin('');"
        "print(sorted({'torch', 'pytorch_lightning', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
