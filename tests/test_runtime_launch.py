"""Processes started by the program itself: their places, signals to them, and the end of all when one fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.runtime import launch
from nemo_aligner_diffusion.runtime.join import choose_threads
from nemo_aligner_diffusion.runtime.launch import cores, start_processes
from nemo_aligner_diffusion.runtime.process import Process

ROOT = Path(__file__).parent.parent
PATIENCE = 120.0  # seconds until a test gives up; the processes below would sleep for longer than all of its waits
# Starts itself: the first process looks after the others, which say who they are and then do what the word says.
PROGRAM = f"""
import json, os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from nemo_aligner_diffusion.runtime import launch
from nemo_aligner_diffusion.runtime.health.processes import death_of, is_running
launch.SECONDS_AFTER_A_CRASH = 0.5
word, folder, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
code = launch.start_processes(count, 1)
if code is not None:
    assert "torch" not in sys.modules
    sys.exit(code)
rank = int(os.environ["RANK"])
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT",
         "OMP_NUM_THREADS")
def note(name, content):
    with open(f"{{folder}}/{{name}}_{{rank}}.part", "w") as file: json.dump(content, file)
    os.rename(file.name, f"{{folder}}/{{name}}_{{rank}}")
if word == "polite":
    def stop(number, frame):
        note("stopped", number)
        time.sleep(0.2 * rank)
        sys.exit(128 + number)
    signal.signal(signal.SIGTERM, stop); signal.signal(signal.SIGINT, stop)
if word == "deaf" and rank == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if word == "same":
    from nemo_aligner_diffusion.runtime.ending import is_first_to_say
    for text in ("no such device", "no such file"):
        if is_first_to_say(text): os.write(2, (text + "\\n").encode())
note("here", {{**{{name: os.environ[name] for name in names}}, "pid": os.getpid(), "argv": sys.argv[1:]}})
if word in ("exit", "same"): sys.exit(0)
while not all(os.path.exists(f"{{folder}}/here_{{other}}") for other in range(count)): time.sleep(0.02)
if word == "error" and rank == 1: sys.exit(2)
if word == "error":
    with open(f"{{folder}}/here_1") as file: other = json.load(file)["pid"]
    while is_running(other): time.sleep(0.02)
    time.sleep(0.7)  # long enough for the first process to see it, too
    note("closed", death_of(other))
    sys.exit(2)
if rank == 1 and word in ("crash", "deaf"): sys.exit(1)
if rank == 1 and word == "killed": os.kill(os.getpid(), signal.SIGKILL)
time.sleep(900)
"""


def start(folder: Path, word: str, count: int = 3, threads: str | None = "1") -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, word, str(folder), str(count)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    told = {} if threads is None else {"OMP_NUM_THREADS": threads}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**environment, **told})


def places(folder: Path, count: int = 3) -> list[dict]:
    deadline = time.monotonic() + PATIENCE
    while not all((folder / f"here_{rank}").exists() for rank in range(count)):
        assert time.monotonic() < deadline, os.listdir(folder)
        time.sleep(0.02)
    return [json.loads((folder / f"here_{rank}").read_text()) for rank in range(count)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the second: it went between opening and reading
        return False


def test_processes_know_their_places_and_have_the_same_words(tmp_path):
    assert start(tmp_path, "exit").wait(PATIENCE) == 0
    found = places(tmp_path)
    assert [(place["RANK"], place["LOCAL_RANK"]) for place in found] == [("0", "0"), ("1", "1"), ("2", "2")]
    assert {(place["WORLD_SIZE"], place["LOCAL_WORLD_SIZE"], place["NODE_RANK"]) for place in found} == {
        ("3", "3", "0")
    }
    assert len({place["MASTER_PORT"] for place in found}) == 1
    assert all(place["argv"] == ["exit", str(tmp_path), "3"] for place in found)


def test_processes_share_the_cores(tmp_path):
    """With threads for every core in each of them all wait for one another: 30 times the seconds of a step."""
    _, errors = start(tmp_path, "exit", 2, threads=None).communicate(timeout=PATIENCE)
    each = str(max(1, cores() // 2))
    assert [place["OMP_NUM_THREADS"] for place in places(tmp_path, 2)] == [each, each]
    assert errors == f"2 processes of {each} threads each (OMP_NUM_THREADS)\n"


def test_threads_that_the_user_asked_for_are_kept(tmp_path):
    assert start(tmp_path, "exit", 2, threads="7").communicate(timeout=PATIENCE)[1] == ""
    assert [place["OMP_NUM_THREADS"] for place in places(tmp_path, 2)] == ["7", "7"]


@pytest.mark.alone
def test_threads_are_as_many_as_other_programs_leave_cores(monkeypatch):
    monkeypatch.setattr(launch, "cores", lambda: 8)
    for others, left in ((0.3, 8), (1.3, 7), (3.4, 5), (20.0, 1)):  # seconds of work in a second, or a little longer
        seen = iter([100.0, 100.0 + others])
        monkeypatch.setattr(launch, "_busy_seconds", seen.__next__)
        assert launch.free_cores(1.0) == left
    monkeypatch.setattr(launch, "_busy_seconds", lambda: None)  # not Linux
    assert launch.free_cores(0.25) == 8


@pytest.mark.alone
@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux says how busy cores are")
def test_a_busy_process_is_seen():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:
        time.sleep(0.3)
        left = launch.free_cores()
        neighbour.kill()
    assert left <= max(1, cores() - 1)


@pytest.fixture
def four_threads(monkeypatch):
    """Those of this process, put back afterwards; nobody has named a number."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_who_decides_about_threads(monkeypatch, four_threads, caplog):
    cpu, alone = torch.device("cpu"), Process()
    monkeypatch.setattr("nemo_aligner_diffusion.runtime.join.free_cores", lambda: 3)
    monkeypatch.setattr("nemo_aligner_diffusion.runtime.join.cores", lambda: 4)

    def chosen(*given):
        torch.set_num_threads(4)
        choose_threads(*given)
        return torch.get_num_threads()

    with caplog.at_level("INFO"):
        assert chosen(None, None, cpu, alone) == 3
        assert caplog.messages == ["3 of 4 cores: others are busy (trainer.threads, OMP_NUM_THREADS)"]
    assert chosen(None, 2, cpu, alone) == 2  # as the run began
    assert chosen(1, 2, cpu, alone) == 1
    assert chosen(None, None, cpu, Process(world_size=2, launcher="nad-train")) == 4
    assert chosen(None, None, torch.device("cuda"), alone) == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert chosen(None, 2, cpu, alone) == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_process_once_and_they_may_close(tmp_path, number):
    parent = start(tmp_path, "polite")
    places(tmp_path)
    parent.send_signal(number)
    _, errors = parent.communicate(timeout=PATIENCE)
    assert parent.returncode == 128 + number
    assert [json.loads((tmp_path / f"stopped_{rank}").read_text()) for rank in range(3)] == [int(number)] * 3
    assert errors == ""


@pytest.mark.alone
@pytest.mark.parametrize(
    ("word", "code", "says"),
    [
        ("crash", 1, "process 1 of 3 failed with exit code 1; ending the others"),
        ("killed", 137, "process 1 of 3 was ended by SIGKILL; ending the others"),
        ("deaf", 1, "ending the others"),
    ],
)
def test_when_one_dies_all_end_and_the_reason_is_told(tmp_path, word, code, says):
    parent = start(tmp_path, word)
    pids = [place["pid"] for place in places(tmp_path)]
    _, errors = parent.communicate(timeout=PATIENCE)
    assert parent.returncode == code
    assert says in errors
    assert not any(map(alive, pids))


def test_what_all_have_to_say_is_said_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    parent = start(tmp_path, "same")
    _, errors = parent.communicate(timeout=PATIENCE)
    assert parent.returncode == 0
    assert sorted(errors.splitlines()) == ["no such device", "no such file"]
    assert not list(tmp_path.glob("nad-*"))  # where they agreed on who says it


@pytest.mark.alone
def test_after_an_error_that_was_told_the_others_may_finish(tmp_path):
    parent = start(tmp_path, "error")
    _, errors = parent.communicate(timeout=PATIENCE)
    assert (parent.returncode, errors) == (2, "")
    for rank in (0, 2):  # which could still ask how it ended
        assert json.loads((tmp_path / f"closed_{rank}").read_text()) == "it exited with code 2"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells children of their parent's death")
def test_no_process_outlives_a_killed_parent(tmp_path):
    parent = start(tmp_path, "wait")
    pids = [place["pid"] for place in places(tmp_path)]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + PATIENCE
    while any(map(alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_nothing_is_started_for_one_process_or_under_a_launcher(monkeypatch):
    refuse = ["/nowhere/at/all"]
    assert start_processes(1, 1, refuse) is None
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}.items():
        monkeypatch.setenv(name, value)
    assert start_processes(2, 1, refuse) is None


def test_what_another_launcher_has_left_behind_is_not_handed_on(tmp_path, monkeypatch):
    for name, value in {"NODE_RANK": "1", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29500", "RANK": "5"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "0")
    parent = start(tmp_path, "exit", 2)
    _, errors = parent.communicate(timeout=PATIENCE)
    assert parent.returncode == 0
    assert "MASTER_ADDR='192.0.2.1' is not used: all processes are on this machine" in errors
    found = places(tmp_path, 2)
    assert {place["MASTER_ADDR"] for place in found} == {"127.0.0.1"}
    assert {place["NODE_RANK"] for place in found} == {"0"}
    assert {place["RANK"] for place in found} == {"0", "1"}


def test_several_machines_without_a_launcher_are_refused():
    with pytest.raises(ConfigurationError, match=r"srun.*torchrun --nnodes=2 --nproc-per-node=4"):
        start_processes(4, 2)
