"""Slurm: who is to be requeued, by whom, and when not. A stand-in for scontrol; tests/slurm/ uses a real Slurm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny.reward_training import blue_shards, overrides, run_told, toy_nemo

from nemo_aligner_diffusion.errors import ConfigurationError, OutputError
from nemo_aligner_diffusion.rewards import restore_reward
from nemo_aligner_diffusion.runtime.directory import RunDirectory, read_state
from nemo_aligner_diffusion.runtime.process import check_agrees, this_process
from nemo_aligner_diffusion.runtime.settings import RequeueSettings, RunDirectorySettings
from nemo_aligner_diffusion.runtime.signals import SIGNALS
from nemo_aligner_diffusion.runtime.slurm import EXIT_REQUEUE, Requeue, SlurmJob

RUNNING = {"JobState": "RUNNING", "Requeue": "1", "Restarts": "0", "BatchFlag": "1", "PreemptTime": "None"}
RESUMES = ("resume_if_exists", "resume_ignore_no_checkpoint", "requeue_on_preemption")


class Scontrol:
    """A program on PATH that answers ``show job`` and notes what else it is asked."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.calls_file = folder / "calls"
        self.say(**RUNNING)
        program = folder / "scontrol"
        program.write_text(
            f"#!/bin/sh\necho \"$@\" >> '{self.calls_file}'\n"
            f"[ \"$1\" = show ] && cat '{folder / 'job'}'\n"
            f"[ -e '{folder / 'cut'}' ] && rm '{folder / 'cut'}' && kill -PIPE $$\n"
            f"[ -e '{folder / 'broken'}' ] && [ \"$1\" = requeue ] && echo 'Invalid user' >&2 && exit 1\nexit 0\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def say(self, **fields: str) -> None:
        values = {**RUNNING, **fields}
        (self.folder / "job").write_text("JobId=7 " + " ".join(f"{k}={v}" for k, v in values.items()) + " WorkDir=/x\n")

    def refuse(self) -> None:
        (self.folder / "broken").touch()

    @property
    def requeued(self) -> list[str]:
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [line.split()[1] for line in lines if line.startswith("requeue")]


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scontrol:
    folder = tmp_path / "slurm"
    folder.mkdir()
    return Scontrol(folder, monkeypatch)


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """A run that goes on in another start takes no notice of signals from then on: its process is to end."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_running_job_is_put_back_after_it_is_recorded(scontrol: Scontrol) -> None:
    seen: list[list[str]] = []
    requeue = Requeue(SlurmJob("7"))
    assert requeue.leave("SIGUSR1", lambda: seen.append(scontrol.requeued), steps=[3, 3, 5])
    assert seen == [[]]
    assert scontrol.requeued == ["7"]
    assert requeue.exit_code(138) == 0


@pytest.mark.parametrize(
    ("fields", "reason", "steps", "why"),
    [
        ({"JobState": "COMPLETING"}, "SIGTERM", [3], "cancelled, or at its time limit"),
        ({"Requeue": "0"}, "SIGTERM", [3], "without --requeue"),
        ({"BatchFlag": "0"}, "SIGUSR1", [3], "not submitted with sbatch"),
        ({}, "SIGUSR1", None, "training had not even begun"),
        ({}, "SIGUSR1", [1, 4, 4, 4], "3 starts in a row ended at step 4"),
    ],
)
def test_a_job_that_must_not_go_on(
    fields: dict[str, str],
    reason: str,
    steps: list[int] | None,
    why: str,
    scontrol: Scontrol,
    caplog: pytest.LogCaptureFixture,
) -> None:
    scontrol.say(**fields)
    requeue = Requeue(SlurmJob("7"))
    assert not requeue.leave(reason, lambda: pytest.fail("it ends here"), steps=steps)
    assert scontrol.requeued == []
    assert requeue.exit_code(143) == 143
    assert why in caplog.text


@pytest.mark.parametrize(
    ("fields", "reason", "steps"),
    [
        ({"PreemptTime": "2026-11-20T12:41:12"}, "SIGUSR1", None),  # while loading, but another job wants the nodes
        ({}, "SIGTERM", [4, 4, 4, 4]),  # preempted again and again is not a loop of its own making
        ({"JobState": "SIGNALING"}, "SIGUSR1", [3]),  # a node has not yet answered to the SIGCONT before the warning
        ({}, "SIGUSR1", [4, 4, 5]),
        ({}, "SIGUSR1", [None, None, 5]),
    ],
)
def test_a_job_that_may_go_on(
    fields: dict[str, str], reason: str, steps: list[int | None] | None, scontrol: Scontrol
) -> None:
    scontrol.say(**fields)
    assert Requeue(SlurmJob("7")).leave(reason, steps=steps)
    assert scontrol.requeued == ["7"]


def test_slurm_has_put_it_back_already(scontrol: Scontrol) -> None:
    scontrol.say(JobState="COMPLETING", Restarts="3")
    recorded = []
    requeue = Requeue(SlurmJob("7", restarts=2))
    assert requeue.leave("SIGTERM", lambda: recorded.append(True))
    assert recorded == [True]
    assert scontrol.requeued == []
    assert requeue.exit_code(143) == 0


def test_slurm_refuses(scontrol: Scontrol, caplog: pytest.LogCaptureFixture) -> None:
    scontrol.refuse()
    requeue = Requeue(SlurmJob("7"))
    assert not requeue.leave("SIGTERM")
    assert "Invalid user" in caplog.text
    assert requeue.exit_code(143) == 143


def test_a_connection_that_is_cut_is_made_again(scontrol: Scontrol) -> None:
    (scontrol.folder / "cut").touch()  # scontrol dies of SIGPIPE, once
    assert Requeue(SlurmJob("7")).leave("SIGTERM")
    assert scontrol.requeued == ["7"]


def test_without_scontrol_the_exit_status_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    recorded = []
    requeue = Requeue(SlurmJob("7"))
    assert requeue.leave("SIGTERM", lambda: recorded.append(True))
    assert recorded == [True]
    assert requeue.exit_code(143) == EXIT_REQUEUE == 75


@pytest.mark.parametrize("steps", [None, [4, 4, 4]])
def test_without_scontrol_a_job_does_not_go_round_for_ever(
    steps: list[int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    requeue = Requeue(SlurmJob("7"))
    assert not requeue.leave("SIGUSR1", lambda: pytest.fail("it ends here"), steps=steps)
    assert requeue.exit_code(138) == 138


def test_only_rank_0_talks_to_slurm(scontrol: Scontrol) -> None:
    requeue = Requeue(SlurmJob("7"), is_writer=False)
    assert requeue.leave("SIGTERM", lambda: pytest.fail("rank 0 does"))
    assert not scontrol.calls_file.exists()
    assert requeue.exit_code(143) == 0


def test_what_makes_a_job(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert SlurmJob.from_environment({}) is None
    assert SlurmJob.from_environment({"SLURM_JOB_ID": "7"}) is None  # salloc's shell
    array = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "4", "SLURM_RESTART_COUNT": "2"}
    assert SlurmJob.from_environment({**array, "SLURM_PROCID": "0"}) == SlurmJob("9_4", 2)
    resumes, wanted = RunDirectorySettings(resume_if_exists=True), RequeueSettings()
    assert Requeue.for_this_run(wanted, resumes, is_writer=True) is None
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    made = Requeue.for_this_run(wanted, resumes, is_writer=True)
    assert made is not None
    assert made.job == SlurmJob("7", 0, "n[1-2]")
    assert Requeue.for_this_run(RequeueSettings(requeue_on_preemption=False), resumes, is_writer=True) is None
    with caplog.at_level("INFO"):
        assert Requeue.for_this_run(wanted, RunDirectorySettings(), is_writer=True) is None
    assert "exp_manager.resume_if_exists=True" in caplog.text


STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_PROCID": "3"}


@pytest.mark.parametrize(
    ("devices", "nodes", "change", "message"),
    [
        (4, 2, {}, ""),
        (1, 1, {"SLURM_NTASKS": None}, ""),
        (1, 1, {"SLURM_STEP_ID": None, "SLURM_NTASKS": "1"}, ""),
        (2, 1, {"SLURM_PTY_PORT": "4711"}, ""),
        (8, 1, {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, ""),
        (8, 1, {}, "srun started 8 processes on 2 nodes.*trainer.devices=4 trainer.num_nodes=2"),
        (2, 2, {}, "srun started 8 processes.*ask Slurm for --nodes=2 --ntasks-per-node=2"),
        (1, 1, {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "srun started 2 processes on 2 nodes"),
        (4, 2, {"SLURM_NTASKS_PER_NODE": None}, "--ntasks-per-node=4 instead"),
        (4, 2, {"SLURM_STEP_ID": None}, "not started by srun"),
        (2, 1, {"SLURM_STEP_ID": None, "SLURM_NTASKS": "1"}, "not started by srun"),
    ],
)
def test_tasks_must_be_those_configured(devices: int, nodes: int, change: dict[str, Any], message: str) -> None:
    environment = {**STEP, "SLURM_NTASKS_PER_NODE": "4", **change}
    environment = {name: value for name, value in environment.items() if value is not None}
    if not message:
        check_agrees(this_process(environment), devices, nodes, environment)
    else:
        with pytest.raises(ConfigurationError, match=message):
            check_agrees(this_process(environment), devices, nodes, environment)


def test_the_run_directory_belongs_to_the_job(
    scontrol: Scontrol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare() -> RunDirectory:
        return RunDirectory.prepare(tmp_path / "run", resume=True, may_start_anew=True)

    monkeypatch.setattr("socket.gethostname", lambda: "n1")
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    prepare().begin("")
    assert read_state(tmp_path / "run")["slurm"] == {"job": "7", "restarts": 0, "nodes": ""}
    monkeypatch.setattr("socket.gethostname", lambda: "n2")  # where no lock may be seen
    prepare()  # the same job, put back into the queue while it ran
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setattr("socket.gethostname", lambda: "n3")
    with pytest.raises(OutputError, match="in use: Slurm job 7"):  # on whatever node that one is
        prepare()
    monkeypatch.delenv("SLURM_JOB_ID")  # at a shell
    with pytest.raises(OutputError, match="in use: Slurm job 7"):
        prepare()
    scontrol.say(JobState="FAILED")
    prepare()


@pytest.mark.parametrize(("signal_number", "status"), [(signal.SIGUSR1, 138), (signal.SIGTERM, 143)])
def test_a_signal_while_the_program_loads(
    signal_number: signal.Signals, status: int, scontrol: Scontrol, tmp_path: Path
) -> None:
    """The real command line: it is told while it imports torch, and Slurm is asked for a new start."""
    preempted = signal_number == signal.SIGTERM
    program = (
        "import os, sys, importlib.abc\n"
        "from nemo_aligner_diffusion.cli import train as cli\n"
        "class Tell(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'torch':\n"
        f"            os.kill(os.getpid(), {int(signal_number)})\n"
        "sys.meta_path.insert(0, Tell())\n"
        "sys.exit(cli.main('draftp_sd'))\n"
    )
    words = [f"exp_manager.explicit_log_dir={tmp_path / 'run'}", "exp_manager.resume_if_exists=True"]
    job = {**STEP, "SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "draftp"}
    result = subprocess.run(
        [sys.executable, "-c", program, *words],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **job},
    )
    assert "interrupted before training began" in result.stderr
    assert "Traceback" not in result.stderr
    assert ("put job 7 back into the queue" in result.stderr) == preempted
    assert scontrol.requeued == (["7"] if preempted else [])  # at a time limit that short it would never begin
    assert result.returncode == (0 if preempted else status)


@pytest.mark.slow
def test_a_whole_run_goes_on_after_its_time(scontrol: Scontrol, tmp_path: Path) -> None:
    """The real program as the only task of a job: at max_time_per_run it saves, is requeued, and then finishes."""
    job = {**STEP, "SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "draftp"}
    job |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "n1", "OMP_NUM_THREADS": "1"}
    words = [
        *("model.infer.inference_steps=2", "model.truncation_steps=1", "model.micro_batch_size=1"),
        *("model.global_batch_size=1", "trainer.accelerator=cpu", "trainer.draftp_sd.max_steps=3"),
        *("trainer.draftp_sd.val_check_interval=0", "report.enable=false", "exp_manager.resume_if_exists=True"),
        f"exp_manager.explicit_log_dir={tmp_path / 'run'}",
        "exp_manager.requeue_on_max_time=True",
    ]
    program = "import sys; from nemo_aligner_diffusion.cli.train import train_draftp; sys.exit(train_draftp())"

    def start(restarts: int, *more: str) -> str:
        environment = {**os.environ, **job, "SLURM_RESTART_COUNT": str(restarts)}
        result = subprocess.run(
            [sys.executable, "-c", program, *words, *more], capture_output=True, text=True, timeout=300, env=environment
        )
        assert result.returncode == 0, result.stderr
        return result.stderr

    first = start(0, "exp_manager.max_time_per_run=00:00:00:00")
    assert "exp_manager.max_time_per_run: put job 7 back into the queue" in first
    state = read_state(tmp_path / "run")
    assert (state["status"], state["step"]) == ("interrupted", 1)
    assert not list((tmp_path / "run" / "export").glob("*"))  # left to the start that finishes
    scontrol.say(Restarts="1")
    second = start(1)
    assert "Slurm job 7 on n1, restarted 1 time" in second
    state = read_state(tmp_path / "run")
    assert (state["status"], state["step"]) == ("finished", 3)
    assert state["slurm"] == {"job": "7", "restarts": 1, "nodes": "n1"}
    assert list((tmp_path / "run" / "export").glob("*"))
    assert scontrol.requeued == ["7"]


def test_reward_training_goes_on_in_the_next_start(
    scontrol: Scontrol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near the time limit it saves and is requeued, without an export; at the end it has learnt what it always does."""
    toy_nemo(tmp_path / "start.nemo")
    blue_shards(tmp_path / "train", 40)
    blue_shards(tmp_path / "validation", 20, seed=1)
    changed = {"trainer__max_steps": 5, "trainer__val_check_interval": 3, "report__enable": False}
    assert run_told(overrides(tmp_path, "undisturbed", **changed)) == 0
    for name, value in {**STEP, "SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    for name, value in {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "n1"}.items():
        monkeypatch.setenv(name, value)
    words = overrides(tmp_path, "requeued", **changed, **{f"exp_manager__{key}": True for key in RESUMES})
    assert run_told(words, step=3, number=signal.SIGUSR1) == 0
    assert scontrol.requeued == ["7"]
    state = read_state(tmp_path / "requeued")
    assert (state["status"], state["step"]) == ("interrupted", 3)
    assert not (tmp_path / "requeued" / "export").exists()  # left to the start that finishes
    scontrol.say(Restarts="1")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run_told(words) == 0
    assert read_state(tmp_path / "requeued")["status"] == "finished"
    one, other = (
        restore_reward(tmp_path / run / "export" / "reward.nemo").state_dict() for run in ("undisturbed", "requeued")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
