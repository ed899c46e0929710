"""Starting the processes of a run on one machine, where no launcher has: ``trainer.devices=N``. Imports no torch.

This process starts N others like itself and looks after them; it is none of the run's own.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from nemo_aligner_diffusion.errors import ConfigurationError, RankLostError, printable
from nemo_aligner_diffusion.runtime.ending import CLAIMS_VARIABLE
from nemo_aligner_diffusion.runtime.health.processes import signal_name
from nemo_aligner_diffusion.runtime.process import LAUNCHER_VARIABLE, this_process

STORE_VARIABLE = "NAD_STORE"  # rank 0's number of the bound socket at which it is to serve the others

# Exit codes of a process that ended as it should: finished, or closed after a signal (signals.py).
ENDED_WELL = (0, 129, 130, 138, 143)
# After an error of its own (exit codes of errors.py) a process may be exporting; after a crash nobody can go on.
SECONDS_TO_CLOSE = {2: 300.0, 3: 300.0}
SECONDS_AFTER_A_CRASH = 10.0  # then SIGTERM, and as long again until SIGKILL
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG, linux/prctl.h


def start_processes(devices: int, nodes: int, command: Sequence[str] | None = None) -> int | None:
    """Start the processes of a run on one machine where nobody else has, and wait for them.

    Args:
        devices: processes a machine (``trainer.devices``).
        nodes: machines; several need a launcher.
        command: what each process runs; by default what this one was started with.

    Returns:
        ``None`` where this process is itself one of the run's (or the only one); else, after all have ended, the exit
        code for this process: 0, or that of the first that failed.

    Raises:
        ConfigurationError: several machines, and no launcher that knows them.
    """
    if devices * nodes == 1 or this_process().launcher:
        return None
    if nodes > 1:
        raise ConfigurationError(
            f"trainer.num_nodes={nodes}: nothing says where the other machines are. Start the program with srun, or on "
            f"each machine with torchrun --nnodes={nodes} --nproc-per-node={devices} --rdzv-backend=c10d "
            "--rdzv-endpoint=HOST:PORT"
        )
    processes: list[subprocess.Popen[bytes]] = []
    words = list(command) if command is not None else [sys.executable, *sys.orig_argv[1:]]
    with (
        tempfile.TemporaryDirectory(prefix="nad-") as claims,
        _forwarding(processes),
        socket.socket() as listener,  # bound and not listening: who calls before rank 0 serves is turned away
    ):
        listener.bind(("127.0.0.1", 0))
        address, port = listener.getsockname()
        for name in ("MASTER_ADDR", "NODE_RANK"):  # another launcher has left them behind
            if os.environ.get(name, "0") not in ("0", "localhost", address):
                said = f"{name}={printable(repr(os.environ[name]), 100)} is not used"
                print(f"{said}: all processes are on this machine", file=sys.stderr)
        shared = {
            LAUNCHER_VARIABLE: str(os.getpid()),
            CLAIMS_VARIABLE: claims,
            STORE_VARIABLE: str(listener.fileno()),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "NODE_RANK": "0",
            "WORLD_SIZE": str(devices),
            "LOCAL_WORLD_SIZE": str(devices),
        }
        if "OMP_NUM_THREADS" not in os.environ:  # each would take every core, and all would wait for one another
            shared["OMP_NUM_THREADS"] = str(max(1, cores() // devices))
            print(f"{devices} processes of {shared['OMP_NUM_THREADS']} threads each (OMP_NUM_THREADS)", file=sys.stderr)
        for rank in range(devices):
            processes.append(
                subprocess.Popen(
                    words,
                    env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    start_new_session=True,  # Ctrl-C comes to this process alone, which hands it on once
                    preexec_fn=_die_with_parent(),
                    pass_fds=[listener.fileno()] if rank == 0 else [],
                )
            )
        listener.close()
        return _wait(processes)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_cores(seconds: float = 0.3) -> int:
    """How many of them other programs leave, at least 1: looked at for ``seconds``; all of them where nothing says it.

    Threads of one operator wait for the slowest, spinning: one too many beside a busy process makes a step of two
    threads four times as long, where one thread alone would take half as long again (``benchmarks/busy_neighbour.py``).
    """
    before, own, began = _busy_seconds(), time.process_time(), time.monotonic()
    if before is None:
        return cores()
    time.sleep(seconds)
    others = (_busy_seconds() or 0.0) - before - (time.process_time() - own)
    return max(1, cores() - round(others / (time.monotonic() - began)))


def _busy_seconds() -> float | None:
    """That these cores have worked since the machine started, but for programs of a lowered priority; Linux only."""
    try:
        rows = [line.split() for line in Path("/proc/stat").read_text("ascii").splitlines()]
        mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        # user, system, interrupts of both kinds, other machines' on the same host: man 5 proc_stat
        ticks = [int(row[column]) for row in rows if row and row[0] in mine for column in (1, 3, 6, 7, 8)]
        return sum(ticks) / os.sysconf("SC_CLK_TCK") if ticks else None
    except (OSError, AttributeError, ValueError, IndexError):
        return None


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    """Until all have ended; when one fails, the others get a while and are then ended."""
    result, failed_at, allowed, terminated, lost = 0, 0.0, 0.0, False, False
    running = dict(enumerate(processes))
    while running:
        for number, process in list(running.items()):
            code = _exit_code(process)
            if code is None:
                continue
            del running[number]
            lost = lost or code == RankLostError.exit_code
            result = result or code
            if code not in ENDED_WELL and not failed_at:
                result, failed_at = code, time.monotonic()
                allowed = SECONDS_TO_CLOSE.get(code, SECONDS_AFTER_A_CRASH)
                if code not in SECONDS_TO_CLOSE and code != RankLostError.exit_code:
                    print(f"process {number} of {len(processes)} {_how(code)}; ending the others", file=sys.stderr)
        if failed_at and time.monotonic() - failed_at > allowed:
            for process in running.values():
                process.send_signal(signal.SIGKILL if terminated else signal.SIGTERM)
            terminated, allowed = True, allowed + SECONDS_AFTER_A_CRASH
        time.sleep(0.05)
    for process in processes:
        process.wait()
    return RankLostError.exit_code if lost else result  # what the others say of a rank that was killed: try again


def _exit_code(process: subprocess.Popen[bytes]) -> int | None:
    """Of a child that has ended, as shells count; None while it runs.

    It stays a zombie, so that the other processes can read in /proc how it ended (health/processes.py).
    """
    code = process.returncode
    if code is None and hasattr(os, "waitid"):
        with contextlib.suppress(ChildProcessError):
            ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                return None
            return ended.si_status if ended.si_code == os.CLD_EXITED else 128 + ended.si_status
    code = process.poll()
    return 128 - code if code is not None and code < 0 else code


def _how(code: int) -> str:
    return f"was ended by {signal_name(code - 128)}" if code > 128 else f"failed with exit code {code}"


@contextlib.contextmanager
def _forwarding(processes: list[subprocess.Popen[bytes]]) -> Any:
    """Within, signals to this process go to ``processes`` instead."""

    def forward(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    # under nohup SIGHUP is ignored, and is to be
    taken = [number for number in FORWARDED if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGHUP]
    before = {number: signal.signal(number, forward) for number in taken}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _die_with_parent() -> Callable[[], None] | None:
    """For a child between fork and exec: it is killed when this process is, which could then not hand on signals."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)  # loaded here: little may be done after a fork
    return lambda: libc.prctl(_PARENT_DEATH_SIGNAL, int(signal.SIGKILL))
