"""What a process's main thread tells its health thread: which phase it is in, and how long that may take."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator

from nemo_aligner_diffusion.runtime.health.messages import Position
from nemo_aligner_diffusion.runtime.health.processes import main_thread_stack
from nemo_aligner_diffusion.runtime.settings import FaultToleranceSettings

_waiting = 0  # how many collective calls that say so the main thread is inside of
_waited = 0.0  # seconds in such calls so far


class Progress:
    """Marks that the main thread passes; the health thread reads them. Costs about a microsecond a mark."""

    def __init__(self, limits: FaultToleranceSettings) -> None:
        self.limits = limits
        self.phase = "starting"
        self.step = 0
        self.in_training = False
        self.events = 0
        self._since = time.monotonic()
        self._longest: dict[str, float] = {}
        self._timed = 0
        self._worked = 0.0
        self._lock = threading.Lock()

    def mark(self, phase: str, step: int | None = None, *, in_training: bool = False) -> None:
        """The main thread is alive, and now in ``phase``.

        Args:
            step: optimizer steps done; None: as many as before.
            in_training: the phase belongs to the step after these.
        """
        now = time.monotonic()
        with self._lock:
            passed = now - self._since
            if passed > self._longest.get(self.phase, -1.0):
                self._longest[self.phase] = passed
            self._since = now
            self.events += 1
            self.phase = phase
            self.in_training = in_training
            if step is not None:
                self.step = step

    def add_work(self, seconds: float) -> None:
        """An optimizer step took ``seconds`` of this rank's own work."""
        with self._lock:
            self._timed += 1
            self._worked += seconds

    def slept(self, seconds: float) -> None:
        """This whole process was stopped so long (a batch system may suspend a job): nobody could pass a mark."""
        with self._lock:
            self._since += seconds

    def position(self) -> Position:
        """Where the main thread is; with its stack once it is past its limit."""
        with self._lock:
            position = Position(
                phase=self.phase,
                step=self.step,
                events=self.events,
                idle=time.monotonic() - self._since,
                limit=self.limits.longest_pause(self._longest.get(self.phase)),
                waiting=_waiting > 0,
                in_training=self.in_training,
                timed=self._timed,
                worked=self._worked,
            )
        if position.idle > position.limit:
            return dataclasses.replace(position, stack=main_thread_stack())
        return position


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Around a blocking collective call: the time in it is not this rank's own work, and it is not who hangs."""
    global _waiting, _waited
    started = time.perf_counter()
    _waiting += 1
    try:
        yield
    finally:
        _waiting -= 1
        _waited += time.perf_counter() - started


def waited_seconds() -> float:
    """Spent inside :func:`waiting` so far."""
    return _waited
