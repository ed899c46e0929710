"""How long it takes from the start of the process to the first optimizer step, by phase. Imports no torch.

A phase lasts until the next one is entered, so that the phases add up to the whole; time that nobody claims counts to
the phase before it. ``startup.json`` in the run directory holds them, and one line on the screen at the first step.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

STARTUP_FILE = "startup.json"
_SHOWN_FROM = 0.05  # seconds; shorter phases are left out of the line on the screen
_LONGEST_AGE = 24 * 3600.0  # a process that claims to be older was not started for this run, or clocks disagree


class Startup:
    """Times phases.

    Attributes:
        seconds: of each phase so far, in the order in which they were first entered. ``python`` is what passed between
            the start of the process, as the operating system knows it, and the making of this object.

    Args:
        clock: seconds, monotonic.
        age: of this process in seconds; ``None``: asked from the operating system.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, age: float | None = None) -> None:
        age = process_age() if age is None else age
        self.seconds: dict[str, float] = {"python": age} if age else {}
        self._clock = clock
        self._phase = "python" if age else "start"
        self._since = clock()
        self._finished = False

    @property
    def total(self) -> float:
        """Seconds in all phases that are over."""
        return sum(self.seconds.values())

    def enter(self, phase: str) -> None:
        """The phase so far is over; ``phase`` begins, or goes on where it was left before."""
        if self._finished:
            return
        now = self._clock()
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._since
        self.seconds.setdefault(phase, 0.0)
        self._phase, self._since = phase, now

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within, ``name``; afterwards what was before."""
        before = self._phase
        self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def finish(self) -> None:
        """The first step is done; what comes later is not counted."""
        self.enter(self._phase)
        self._finished = True

    def line(self) -> str:
        """``first step after 12.3 s: imports 4.1, reading weights 2.0, …``; phases too short to matter are left out."""
        return _line(self.seconds)


_begun: Startup | None = None


def begin() -> Startup:
    """Called by a command line at its first line; :func:`take` then gives the same object."""
    global _begun
    _begun = Startup()
    return _begun


def take() -> Startup:
    """What :func:`begin` made, once; where a run does not begin with the program, a new one without the time before."""
    global _begun
    startup, _begun = _begun or Startup(age=0.0), None
    return startup


def _line(seconds: dict[str, float]) -> str:
    parts = [f"{name} {spent:.1f}" for name, spent in seconds.items() if spent >= _SHOWN_FROM]
    return f"first step after {sum(seconds.values()):.1f} s: {', '.join(parts)}"


def summary(by_rank: list[dict[str, float]]) -> dict[str, Any]:
    """What ``startup.json`` holds, from every rank's :attr:`Startup.seconds`, rank 0 first."""
    names = dict.fromkeys(name for seconds in by_rank for name in seconds)
    first = by_rank[0]
    result: dict[str, Any] = {
        "line": _line(first),
        "first_step_seconds": round(sum(first.values()), 3),
        "phases": {name: round(spent, 3) for name, spent in first.items()},
    }
    if len(by_rank) > 1:
        result["processes"] = len(by_rank)
        slowest = {name: max((seconds.get(name, 0.0), -rank) for rank, seconds in enumerate(by_rank)) for name in names}
        result["slowest"] = {name: {"seconds": round(s, 3), "rank": -rank} for name, (s, rank) in slowest.items()}
    return result


def process_age() -> float:
    """Seconds since this process was started, to a hundredth; 0 where the operating system does not tell."""
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()  # the name may hold anything
        started = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5): ticks after boot
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
    return age if 0 < age < _LONGEST_AGE else 0.0
