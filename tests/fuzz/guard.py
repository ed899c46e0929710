"""Watching a piece of code: what it runs, writes, takes in memory and in time."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

MIB = 1 << 20
MEMORY_LIMIT_MIB = 1024  # of address space beyond what the process had when the guard was made: asking for more fails
HANG_SECONDS = 20.0  # of processor time, after which a case is interrupted

# https://docs.python.org/3/library/audit_events.html; opening a file is looked at apart.
CODE_EVENTS = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.startfile", "pty.spawn"),
    *("subprocess.Popen", "socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request", "ctypes.dlopen"),
    *("pickle.find_class", "compile"),
)
WRITE_EVENTS = (
    *("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown"),
    *(
        "os.mkfifo",
        "os.mknod",
        "os.setxattr",
        "os.utime",
        "shutil.copyfile",
        "shutil.move",
        "shutil.rmtree",
        "shutil.unpack_archive",
    ),
    *("tempfile.mkstemp", "tempfile.mkdtemp"),
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Interrupted(BaseException):
    """The guarded code took :data:`HANG_SECONDS`; no ``except Exception`` may swallow this."""


@dataclass
class Watch:
    """What one guarded piece of code did."""

    seconds: float = 0.0
    peak_mib: float = 0.0
    ran: list[str] = field(default_factory=list)
    wrote: list[str] = field(default_factory=list)


class Guard:
    """One per process: audit hooks cannot be taken away, and memory limits only lowered."""

    def __init__(self) -> None:
        self._watch: Watch | None = None
        sys.addaudithook(self._audit)
        signal.signal(signal.SIGPROF, self._interrupt)
        limit = _status_kib("VmSize") * 1024 + MEMORY_LIMIT_MIB * MIB
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    @contextmanager
    def watching(self) -> Iterator[Watch]:
        watch = Watch()
        _reset_peak()
        before = _status_kib("VmRSS")
        signal.setitimer(signal.ITIMER_PROF, HANG_SECONDS)
        started = time.process_time()
        self._watch = watch
        try:
            yield watch
        finally:
            self._watch = None
            watch.seconds = time.process_time() - started
            signal.setitimer(signal.ITIMER_PROF, 0)
            watch.peak_mib = (_status_kib("VmHWM") - before) / 1024

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        watch = self._watch
        if watch is None:
            return
        if event in CODE_EVENTS or (event == "exec" and not _is_installed_module(arguments[0])):
            watch.ran.append(f"{event}{_shown(arguments)}")
        elif event == "import" and arguments[0].partition(".")[0] == "canary":
            watch.ran.append("import canary")
        elif event in WRITE_EVENTS:
            watch.wrote.append(f"{event}{_shown(arguments)}")
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
            watch.wrote.append(f"open{_shown(arguments)}")

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        raise Interrupted(f"after {HANG_SECONDS:.0f} s of processor time")


def _is_installed_module(code: Any) -> bool:
    """Importing a module of an installed library runs it; that is no code of the archive's."""
    ours = (sys.prefix, sys.base_prefix, str(Path(__file__).parents[2]))
    return getattr(code, "co_name", "") == "<module>" and code.co_filename.startswith(ours)


def _shown(arguments: tuple[Any, ...]) -> str:
    return str(tuple(str(argument)[:80] for argument in arguments))


def _status_kib(field_name: str) -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field_name + ":"))


def _reset_peak() -> None:
    with open("/proc/self/clear_refs", "w", encoding="ascii") as clear:
        clear.write("5")  # VmHWM := VmRSS, see proc(5)
