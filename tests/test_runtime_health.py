"""A rank that dies, hangs, throws or is slow: real processes, real signals, the real watching; no torch, so seconds."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nemo_aligner_diffusion.errors import RankLostError
from nemo_aligner_diffusion.runtime.health.client import HealthClient
from nemo_aligner_diffusion.runtime.health.lines import call
from nemo_aligner_diffusion.runtime.health.messages import Fault, Position
from nemo_aligner_diffusion.runtime.health.progress import Progress
from nemo_aligner_diffusion.runtime.health.server import HealthServer
from nemo_aligner_diffusion.runtime.health.verdict import Watch
from nemo_aligner_diffusion.runtime.process import Process
from nemo_aligner_diffusion.runtime.settings import FaultToleranceSettings

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "nemo_aligner_diffusion"
EXIT_CODE = RankLostError.exit_code
PATIENCE = 180.0  # seconds until a test gives up: many times what a busy machine takes, less than the toy's own limits


class Run:
    """The processes of a toy run, whose screen is one file."""

    def __init__(self, what: str, folder: Path, size: int = 3, started: int | None = None, **environment: str) -> None:
        self.folder = folder
        self.screen = folder / "screen"
        environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment}
        with open(self.screen, "wb") as screen:
            self.processes = [
                subprocess.Popen(
                    [sys.executable, str(HERE / "tiny" / "watched_rank.py"), what, str(rank), str(size), str(folder)],
                    stdout=screen,
                    stderr=screen,
                    env=environment,
                )
                for rank in range(size if started is None else started)
            ]

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def wait_for(self, *names: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < deadline, (names, self.text())
            time.sleep(0.01)

    def all_work(self) -> None:
        self.wait_for(*(f"working_{rank}" for rank in range(len(self.processes))))

    def codes(self, victim: int = 1) -> list[int]:
        """Exit codes.

        The victim is asked last: how a process ended can be seen by others only until its parent has asked.
        """
        deadline = time.monotonic() + PATIENCE
        for process in sorted(self.processes, key=lambda process: process is self.processes[victim]):
            process.wait(max(deadline - time.monotonic(), 0.1))
        return [process.returncode for process in self.processes]

    def text(self) -> str:
        return self.screen.read_text(errors="replace")

    def fault(self) -> list[str]:
        return (self.folder / "fault").read_text().splitlines()


def test_a_run_without_faults_ends_in_silence(tmp_path: Path) -> None:
    with Run("nothing", tmp_path) as run:
        assert run.codes() == [0, 0, 0]
        assert run.text() == ""
        assert not (tmp_path / "fault").exists()


@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_rank_is_named_and_the_others_come_down(tmp_path: Path, victim: int) -> None:
    """At once, although its data workers live on, who would hold its connection open."""
    with Run("fork", tmp_path) as run:
        try:
            run.all_work()
            run.processes[victim].send_signal(signal.SIGKILL)
            codes = run.codes(victim)
        finally:
            for file in tmp_path.glob("worker_*"):
                os.kill(int(file.read_text()), signal.SIGKILL)
        pid = run.processes[victim].pid
    assert codes.pop(victim) == -signal.SIGKILL
    assert codes == [EXIT_CODE] * 2
    first, *others = run.text().splitlines()
    host = socket.gethostname()
    assert first.startswith(f"error on rank {victim} (host {host}, pid {pid}), ")
    assert "of step " in first
    assert "the process is gone" in first
    assert "killed by SIGKILL" in first
    assert others == [f"  ending all 3 processes with exit code {EXIT_CODE}"]  # once, and no error of lost connections
    writer, headline, *places = run.fault()
    assert writer == ("1" if victim == 0 else "0")
    assert headline.startswith(first.partition(";")[0])
    assert victim == 0 or len(places) == 3


def test_a_rank_that_leaves_without_a_word_is_named(tmp_path: Path) -> None:
    with Run("exit", tmp_path) as run:
        assert run.codes() == [EXIT_CODE, 7, EXIT_CODE]
    assert "error on rank 1 " in run.text().splitlines()[0]
    assert "it exited with code 7" in run.text()


@pytest.mark.alone
@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_stopped_rank_is_told_from_a_dead_one_and_does_not_stay(tmp_path: Path, victim: int) -> None:
    with Run("stop", tmp_path) as run:
        run.all_work()
        run.processes[victim].send_signal(signal.SIGSTOP)
        codes = run.codes(victim)
    assert codes.pop(victim) == -signal.SIGKILL
    assert codes == [EXIT_CODE] * 2
    first, *others = run.text().splitlines()
    assert first.startswith(f"error on rank {victim} ")
    assert "no sign of life for" in first
    assert "it is stopped, as by SIGSTOP" in first
    assert others == [f"  ending all 3 processes with exit code {EXIT_CODE}"]


@pytest.mark.alone
def test_a_rank_that_hangs_is_named_with_the_line_it_hangs_in(tmp_path: Path) -> None:
    with Run("loop", tmp_path) as run:
        assert run.codes() == [EXIT_CODE] * 3
    first, *others = run.text().splitlines()
    assert first.startswith("error on rank 1 ")
    assert "forward pass of step 31: no progress for" in first
    assert "2 others wait for it" in first
    assert any("watched_rank.py" in line and "in endless_loop" in line for line in others)
    assert run.text().count("error on") == 1
    assert sum("in a collective call" in line for line in run.fault()) == 2


@pytest.mark.slow
@pytest.mark.alone
def test_a_rank_that_holds_the_interpreter_shows_its_stack_all_the_same(tmp_path: Path) -> None:
    with Run("hold", tmp_path) as run:
        codes = run.codes()
    assert codes == [EXIT_CODE, -signal.SIGKILL, EXIT_CODE]
    assert run.text().startswith("error on rank 1 ")
    assert "no sign of life" in run.text()
    assert "in hold_the_interpreter" in run.text()


def test_an_exception_is_told_by_its_own_rank_first_and_once(tmp_path: Path) -> None:
    with Run("raise", tmp_path) as run:
        assert run.codes() == [1, 1, 1]
    assert run.text() == "first: rank 1: ValueError: the reward is broken\n"
    writer, headline, *_ = run.fault()
    assert writer == "0"
    assert headline.endswith("forward pass of step 31: ValueError: the reward is broken")


@pytest.mark.alone
def test_an_error_of_every_rank_is_told_once_and_rank_0_may_export(tmp_path: Path) -> None:
    with Run("raise everywhere", tmp_path) as run:
        assert run.codes() == [3, 3, 3]
    lines = run.text().splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("NumericalError: the reward is NaN")
    assert (tmp_path / "exported").exists()


@pytest.mark.alone
def test_an_error_handed_on_is_told_by_the_rank_that_met_it_although_others_report_it_first(tmp_path: Path) -> None:
    with Run("hand on", tmp_path) as run:
        assert run.codes() == [3] * 3
    assert run.text() == "first: rank 1: NumericalError: the reward is NaN\n"
    assert run.fault()[1].startswith("error on rank 1 ")


@pytest.mark.alone
def test_a_straggler_is_named(tmp_path: Path) -> None:
    with Run("straggler", tmp_path) as run:
        run.all_work()
        deadline = time.monotonic() + PATIENCE
        slow = run.processes[2]
        while "rank 2 (host " not in run.text():
            assert time.monotonic() < deadline, run.text()
            slow.send_signal(signal.SIGSTOP)  # as a throttled or shared processor does
            time.sleep(0.2)
            slow.send_signal(signal.SIGCONT)
            time.sleep(0.02)
        assert [process.poll() for process in run.processes] == [None] * 3  # a warning, no fault
    assert re.search(r"rank 2 \(.*\) is slow: .* s of its own work a step, .* × the median", run.text())


SHIFTED_CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
static long shift(void) {  /* a day back or forth at every look */
    static int calls = 0;
    return ++calls % 2 ? 86400 : -86400;
}
int clock_gettime(clockid_t id, struct timespec *t) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(id, t);
    if (id == CLOCK_REALTIME) t->tv_sec += shift();
    return code;
}
int gettimeofday(struct timeval *t, void *zone) {
    int (*real)(struct timeval *, void *) = dlsym(RTLD_NEXT, "gettimeofday");
    int code = real(t, zone);
    t->tv_sec += shift();
    return code;
}
time_t time(time_t *t) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (t) *t = now.tv_sec;
    return now.tv_sec;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="shifting the clock needs a C compiler")
def test_a_clock_that_jumps_by_days_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "clock.c").write_text(SHIFTED_CLOCK)
    library = tmp_path / "clock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "clock.c", "-ldl"], check=True)
    look = "import time; a, b = time.time(), time.time(); print(abs(a - b) > 86400)"
    seen = subprocess.run(
        [sys.executable, "-c", look], env={**os.environ, "LD_PRELOAD": str(library)}, capture_output=True, text=True
    )
    assert seen.stdout == "True\n"  # it does jump
    for name in ("calm", "killed"):
        (tmp_path / name).mkdir()
    with Run("nothing", tmp_path / "calm", LD_PRELOAD=str(library)) as run:
        assert run.codes() == [0, 0, 0]
        assert run.text() == ""
    with Run("wait", tmp_path / "killed", LD_PRELOAD=str(library)) as run:
        run.all_work()
        run.processes[1].kill()
        assert run.codes() == [EXIT_CODE, -signal.SIGKILL, EXIT_CODE]


# Names and records of a run may hold the time of day; decisions may not.
TIME_OF_DAY_IS_A_RECORD = {
    "runtime/directory.py": 2,  # the name of a run's folder; started and finished in run.json
    "training/run_frame.py": 1,  # the same name, agreed on by all ranks
    "runtime/ending.py": 1,  # torchrun's own file format
}


def test_no_decision_looks_at_the_time_of_day() -> None:
    found: dict[str, int] = {}
    for folder in ("runtime", "training", "parallel", "data"):
        for file in sorted((PACKAGE / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
                    ("time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "date.today")
                ):
                    name = str(file.relative_to(PACKAGE))
                    found[name] = found.get(name, 0) + 1
    unexpected = {name: n for name, n in found.items() if n > TIME_OF_DAY_IS_A_RECORD.get(name, 0)}
    assert not unexpected, f"use time.monotonic() where something depends on it: {unexpected}"


def test_nothing_stays_open() -> None:
    """A program may train more than once: descriptors and threads are given back at the end of each run."""

    def watched_run() -> None:
        server = HealthServer(True, Watch(1, 60.0), 0.05)
        server.start()
        client = HealthClient(Process(), server.address, "", Progress(FaultToleranceSettings()), 0.05, 60.0)
        client.start()
        assert client._settled.wait(PATIENCE)
        client.close()
        server.close()
        for thread in (client, server):
            thread.join(PATIENCE)  # close() waits for seconds only
            assert not thread.is_alive()

    def open_now() -> set[str]:
        found = set()
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # that of this list itself
                found.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
        return found

    watched_run()
    before = open_now()
    watched_run()
    assert open_now() - before == set()  # what other tests left behind may be closed meanwhile


def test_a_goodbye_counts_although_a_heartbeat_met_the_closed_connection_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answered = threading.Event(), threading.Event()

    class Busy(Progress):
        def position(self) -> Position:
            asked.set()
            assert answered.wait(PATIENCE)
            return super().position()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"tcp {listener.getsockname()[1]} secret"
        client = HealthClient(Process(1, 2, 1, 2), address, "127.0.0.1", Busy(FaultToleranceSettings()), 0.05, 60.0)
        faults: list[Fault] = []
        monkeypatch.setattr(client, "_come_down", faults.append)  # it would end this process
        client.start()
        connection, _ = listener.accept()
        assert asked.wait(PATIENCE)
        connection.sendall(b'{"kind": "bye"}\n')
        connection.close()  # with the hello unread: the kernel then refuses what the client sends
        answered.set()
        client.join(PATIENCE)
    assert not client.is_alive()
    assert faults == []


def test_the_server_outlives_a_rank_that_leaves_before_its_error_is_answered() -> None:
    server = HealthServer(True, Watch(2, 60.0), 0.05)
    server.start()
    try:
        lines = [call(server.address, "")[0] for _ in range(2)]
        for rank, line in enumerate(lines):
            member = {"rank": rank, "host": "here", "pid": os.getpid(), "local_rank": rank}
            line.send("hello", secret="", member=member)
        error = {"position": vars(Position()), "reason": "no", "details": "", "exit_code": 2, "said": False}
        lines[1].send("error", **error)
        lines[1].close()
        lines[0].send("error", **error)
        heard: list[str] = []
        while "answer" not in heard and server.is_alive():
            heard += [message["kind"] for message in lines[0].receive() or []]
        assert "answer" in heard
        lines[0].close()
    finally:
        server.close()
