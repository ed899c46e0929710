"""How long it takes from the program's first line to the first optimizer step, by phase. Imports no torch.

A phase lasts until the next one is entered, so that the phases add up to the whole; time that nobody claims counts to
the phase before it. ``startup.json`` in the run directory holds them, and one line on the screen at the first step.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

STARTUP_FILE = "startup.json"
_SHOWN_FROM = 0.05  # seconds; shorter phases are left out of the line on the screen


class Startup:
    """Times phases, from its making on.

    Attributes:
        seconds: of each phase so far, in the order in which they were first entered.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = clock
        self._phase = "start"
        self._since = clock()
        self._finished = False

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
        parts = [f"{name} {spent:.1f}" for name, spent in self.seconds.items() if spent >= _SHOWN_FROM]
        return f"first step after {sum(self.seconds.values()):.1f} s: {', '.join(parts)}"

    def summary(self) -> dict[str, Any]:
        """What ``startup.json`` holds."""
        return {
            "line": self.line(),
            "first_step_seconds": round(sum(self.seconds.values()), 3),
            "phases": {name: round(spent, 3) for name, spent in self.seconds.items()},
        }
