"""What can be learnt of a process from outside it (Linux's /proc) and of this one from inside."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

_STATES = {
    "T": "it is stopped, as by SIGSTOP or Ctrl-Z (kill -CONT goes on)",
    "t": "it is stopped by a debugger",
    "D": "it waits for a disk or a network file system, which cannot be interrupted",
}


def state_of(pid: int) -> str:
    """In words what holds up a process of this machine; empty where there is nothing special to say."""
    fields = _stat(pid)
    return _STATES.get(fields[0], "") if fields else ""


def death_of(pid: int, patience: float = 2.0) -> str:
    """How a process of this machine ended, if its parent has not asked yet; empty where that cannot be told.

    Args:
        patience: seconds; its connections close before it has ended, which takes long where many want the processor.
    """
    end = time.monotonic() + patience
    while (fields := _stat(pid)) and time.monotonic() < end:
        if fields[0] == "Z":
            status = int(fields[49])
            if status & 0x7F:
                return f"killed by {signal_name(status & 0x7F)}"
            return f"it exited with code {status >> 8}" if status >> 8 else ""
        time.sleep(0.005)
    return ""


def is_running(pid: int) -> bool:
    """Whether a process of this machine is there and has not ended."""
    fields = _stat(pid)
    return fields is not None and fields[0] not in "ZX"


def out_of_memory_kills() -> int:
    """Processes that this machine's kernel has killed for want of memory since it started; 0 where it won't say."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
    except (OSError, ValueError):
        return 0


def main_thread_stack() -> tuple[str, ...]:
    """``file:line in function`` of this process's main thread, outermost first."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    lines = []
    while frame is not None:
        lines.append(f"{_short(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}")
        frame = frame.f_back
    return tuple(reversed(lines))


def is_waiting(stack: Sequence[str]) -> bool:
    """Whether a stack ends in a call that waits for other ranks (or in autograd's engine, whose hooks may)."""
    innermost = stack[-3:]
    return any("torch/distributed/" in line or "_engine_run_backward" in line for line in innermost)


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on (field 3 of proc(5) is index 0)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return text.rpartition(")")[2].split()  # the command, in brackets, may hold anything


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _short(filename: str) -> str:
    parts = Path(filename).parts
    for marker in ("site-packages", "dist-packages"):
        if marker in parts:
            parts = parts[parts.index(marker) + 1 :]
    return "/".join(parts[-4:])
