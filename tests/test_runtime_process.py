"""Which process this is: one reading of the launchers' variables, and what is left over from launchers that are not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.runtime.ending import is_first_to_say, write_error_file
from nemo_aligner_diffusion.runtime.process import Process, check_agrees, is_interactive, left_over, this_process

ROOT = Path(__file__).parent.parent
PATIENCE = 120.0
TORCHRUN = {
    **{"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
    **{"GROUP_RANK": "1", "TORCHELASTIC_RESTART_COUNT": "2"},
}
SRUN = {
    **{"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_NODES": "2"},
    **{"SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_NODEID": "0"},
}
ENV = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "pod-0", "MASTER_PORT": "23456"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Process()),
        (TORCHRUN, Process(5, 8, 1, 4, 1, "torchrun", 2)),
        (SRUN, Process(3, 8, 3, 4, 0, "srun")),
        ({**SRUN, "LOCAL_RANK": "0", "RANK": "0"}, Process(3, 8, 3, 4, 0, "srun")),  # exported by a job script
        ({**SRUN, **TORCHRUN}, Process(5, 8, 1, 4, 1, "torchrun", 2)),  # srun has started torchrun
        (ENV, Process(1, 2, 0, 1, 0, "environment")),  # Kubernetes' PyTorchJob
        ({**ENV, "WORLD_SIZE": "1", "RANK": "0"}, Process()),
        # left over: nobody stands behind them
        ({"RANK": "1"}, Process()),
        ({"LOCAL_RANK": "1", "NODE_RANK": "3", "MASTER_ADDR": "gone"}, Process()),
        ({**ENV, "NAD_LAUNCHER": "1", "WORLD_SIZE": "1"}, Process()),  # of another launcher's children
        ({"JSM_NAMESPACE_RANK": "3"}, Process()),
        # shells in an allocation: by what Slurm says of them, not by their names
        ({**SRUN, "SLURM_PTY_PORT": "4711", "SLURM_JOB_NAME": "zsh"}, Process()),
        ({**SRUN, "SLURM_STEP_ID": "4294967290"}, Process()),  # salloc's on a node
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_JOB_NAME": "mine"}, Process()),  # salloc's elsewhere
        ({**SRUN, "SLURM_JOB_NAME": "bash"}, Process(3, 8, 3, 4, 0, "srun")),  # a script of that name
    ],
)
def test_who_this_is(environment: dict[str, str], expected: Process) -> None:
    assert this_process(environment) == expected


def test_a_program_that_srun_gives_a_terminal_is_no_shell() -> None:
    task = {**SRUN, "SLURM_PTY_PORT": "4711", "SLURM_TASK_PID": str(os.getpid())}
    assert not is_interactive(task)
    assert this_process(task).launcher == "srun"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "8"}, "RANK = '8' in the environment: expected a whole number from 0 to 7"),
        ({"RANK": "-1"}, "RANK = '-1'"),
        ({"RANK": "one"}, "RANK = 'one'"),
        ({"RANK": None}, "RANK = missing"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE = '0' in the environment: expected a whole number from 1"),
        ({"WORLD_SIZE": "²"}, "WORLD_SIZE = '²'"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK = '4' in the environment: expected a whole number from 0 to 3"),
        ({"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE = '9'"),
        ({"TORCHELASTIC_RESTART_COUNT": "9" * 5000}, "TORCHELASTIC_RESTART_COUNT = '9{40}' in"),
    ],
)
def test_a_launchers_variable_that_cannot_be_is_named(change: dict[str, str | None], message: str) -> None:
    environment = {name: value for name, value in {**TORCHRUN, **change}.items() if value is not None}
    with pytest.raises(ConfigurationError, match=message):
        this_process(environment)


@pytest.mark.parametrize(
    ("environment", "devices", "nodes", "message"),
    [
        (TORCHRUN, 4, 2, ""),
        (TORCHRUN, 1, 1, r"torchrun started 8 processes \(4 on this machine\).*trainer.devices=4 trainer.num_nodes=2"),
        (ENV, 1, 2, ""),
        (ENV, 1, 1, "WORLD_SIZE=2 in the environment, but .* = 1: .*unset RANK and WORLD_SIZE"),
        (ENV, 2, 1, "without LOCAL_RANK"),
        ({"RANK": "1"}, 1, 1, ""),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, 1, 1, "OMPI_COMM_WORLD_SIZE='4'.*use torchrun or srun"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, 1, 1, ""),
    ],
)
def test_what_was_started_is_what_is_configured(
    environment: dict[str, str], devices: int, nodes: int, message: str
) -> None:
    process = this_process(environment)
    if not message:
        check_agrees(process, devices, nodes, environment)
    else:
        with pytest.raises(ConfigurationError, match=message):
            check_agrees(process, devices, nodes, environment)


def test_what_is_advised_in_a_shell_that_srun_has_opened_helps() -> None:
    with pytest.raises(ConfigurationError, match=r"unset SLURM_STEP_ID SLURM_PROCID$"):
        check_agrees(this_process(SRUN), 1, 1, SRUN)
    after = {name: value for name, value in SRUN.items() if name not in ("SLURM_STEP_ID", "SLURM_PROCID")}
    assert this_process(after) == Process()
    for devices in (1, 2):
        check_agrees(Process(), devices, 1, after)


def test_what_is_left_over_is_said() -> None:
    assert left_over(Process(), {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x"}) == ""
    assert left_over(this_process(TORCHRUN), TORCHRUN) == ""
    assert "RANK='1', WORLD_SIZE='2' in the environment without effect" in left_over(
        Process(), {"RANK": "1", "WORLD_SIZE": "2"}
    )


def test_an_error_is_told_although_another_launchers_folder_holds_its_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that a rank of another run has started inherits where those agree on who speaks."""
    (tmp_path / "0").mkdir()
    monkeypatch.setenv("NAD_CLAIMS", str(tmp_path))
    monkeypatch.setenv("NAD_LAUNCHER", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))
    assert [is_first_to_say("no such file") for _ in range(2)] == [True, True]
    write_error_file("no such file")
    assert list((tmp_path / "0").iterdir()) == []


# Two processes of a run meet; rank 0 says at which addresses it listens then.
MEET = f"""
import os, re, sys, time
from datetime import timedelta
sys.path.insert(0, {str(ROOT)!r})
from nemo_aligner_diffusion.runtime.launch import start_processes
code = start_processes(2, 1)
if code is not None:
    sys.exit(code)
import torch
from nemo_aligner_diffusion.runtime.join import make_process_group, meet
from nemo_aligner_diffusion.runtime.process import this_process
process, wait = this_process(), timedelta(seconds=100)
store, greeting = meet(process, wait, "hello" if process.rank == 0 else "")
assert greeting == "hello"
make_process_group(process, torch.device("cpu"), store, wait)
found = set()
files = [f"/proc/self/fd/{{number}}" for number in os.listdir("/proc/self/fd")]
own = {{os.readlink(file) for file in files if os.path.islink(file)}}
for table in ("tcp", "tcp6"):
    for line in open(f"/proc/net/{{table}}").readlines()[1:]:
        words = line.split()
        if words[3] == "0A" and f"socket:[{{words[9]}}]" in own:
            found.add(words[1].partition(":")[0])
os.write(1, f"listens at {{sorted(found)}}\\n".encode())
torch.distributed.barrier()
os._exit(0)
"""


@pytest.mark.alone
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_on_one_machine_nothing_listens_on_the_network() -> None:
    done = subprocess.run([sys.executable, "-c", MEET], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()) == {"listens at ['0100007F']"}, done.stdout  # 127.0.0.1


WAIT = f"""
import logging, os, sys
from datetime import timedelta
sys.path.insert(0, {str(ROOT)!r})
logging.basicConfig(format="%(message)s")
from nemo_aligner_diffusion.runtime import join
from nemo_aligner_diffusion.runtime.process import this_process
from nemo_aligner_diffusion.runtime.signals import Interrupted, Interruption
join._SAID_AFTER = 0.3
with Interruption() as interruption:
    try:
        join.meet(this_process(), timedelta(seconds=float(sys.argv[1])))
    except Interrupted:
        sys.exit(interruption.exit_code)
    except join.RankLostError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
"""


@pytest.mark.alone
@pytest.mark.parametrize(
    ("rank", "whom", "number"), [(0, "rank 1", signal.SIGTERM), (1, "rank 0", signal.SIGINT), (1, "rank 0", None)]
)
def test_a_wait_for_others_says_for_whom_and_ends(rank: int, whom: str, number: signal.Signals | None) -> None:
    """As in a shell that srun has opened for two tasks: the other one never comes."""
    job = {**SRUN, "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": str(rank), "SLURM_JOB_NAME": "zsh"}
    job |= {"SLURM_LOCALID": str(rank), "MASTER_PORT": str(15100 + os.getpid() % 10000)}
    command = [sys.executable, "-c", WAIT, "1.0" if number is None else "600"]
    with subprocess.Popen(command, env={**os.environ, **job}, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        while " has waited " not in line:
            assert line, "it ended without a word"
            line = process.stderr.readline()
        assert f"rank {rank} has waited" in line
        assert f"for {whom} of 2 (srun, at 127.0.0.1:" in line
        started = time.monotonic()
        if number is not None:
            process.send_signal(number)
        assert process.wait(PATIENCE) == (4 if number is None else 128 + number)
        assert time.monotonic() - started < 30


@pytest.mark.alone
def test_two_steps_of_a_job_that_have_one_port_do_not_meet() -> None:
    job = {**SRUN, "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1", "MASTER_PORT": str(15200 + os.getpid() % 10000)}
    processes = []
    for rank, seconds in ((0, "600"), (1, "1.0")):  # rank 1 of the second step finds rank 0 of the first
        own = {"SLURM_STEP_ID": str(rank), "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        command = [sys.executable, "-c", WAIT, seconds]
        process = subprocess.Popen(command, env={**os.environ, **job, **own}, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        if rank == 0:
            assert process.stderr is not None
            while " has waited " not in process.stderr.readline():  # it serves
                assert process.poll() is None
    first, second = processes
    try:
        assert second.wait(PATIENCE) == 4
        assert second.stderr is not None
        assert "did not come within" in second.stderr.read()
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
