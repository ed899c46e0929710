"""What a process's main thread tells its health thread: which phase it is in, and how long that may take."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from nemo_aligner_diffusion.runtime.health.messages import Position


@dataclass(frozen=True)
class Limits:
    """How long a process may go without passing a mark. Seconds.

    Attributes:
        first: in a phase that it has not been through before (loading, compiling, the first step or validation).
        later: in a phase it knows; the upper bound where limits are calculated.
        calculate: take ``safety_factor`` times the longest that the phase has taken so far, within
            [``least``, ``later``], instead of ``later``.
        safety_factor: see there.
        least: see there; pauses that have nothing to do with the run (a busy file system) are shorter.
    """

    first: float = 3600.0
    later: float = 2700.0
    calculate: bool = True
    safety_factor: float = 5.0
    least: float = 300.0

    def of(self, longest: float | None) -> float:
        """For a phase whose longest passage so far is given; None: none yet."""
        if longest is None:
            return self.first
        if not self.calculate:
            return self.later
        return min(max(self.safety_factor * longest, self.least), self.later)


class Progress:
    """Marks that the main thread passes; the health thread reads them. Costs about a microsecond a mark."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.phase = "starting"
        self.step = 0
        self.in_training = False
        self.events = 0
        self._since = time.monotonic()
        self._longest: dict[str, float] = {}
        self.timed = 0
        self.worked = 0.0
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
            self.timed += 1
            self.worked += seconds

    def slept(self, seconds: float) -> None:
        """This whole process was stopped so long (a batch system may suspend a job): nobody could pass a mark."""
        with self._lock:
            self._since += seconds

    def position(self) -> Position:
        with self._lock:
            return Position(
                phase=self.phase,
                step=self.step,
                events=self.events,
                idle=time.monotonic() - self._since,
                limit=self.limits.of(self._longest.get(self.phase)),
                waiting=_WAITING.depth > 0,
                in_training=self.in_training,
                timed=self.timed,
                worked=self.worked,
            )


class _Waiting:
    def __init__(self) -> None:
        self.depth = 0
        self.seconds = 0.0


_WAITING = _Waiting()


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Around a blocking collective call: the time in it is not this rank's own work, and it is not who hangs."""
    started = time.perf_counter()
    _WAITING.depth += 1
    try:
        yield
    finally:
        _WAITING.depth -= 1
        if _WAITING.depth == 0:
            _WAITING.seconds += time.perf_counter() - started


def waited_seconds() -> float:
    """Spent inside :func:`waiting` so far."""
    return _WAITING.seconds
