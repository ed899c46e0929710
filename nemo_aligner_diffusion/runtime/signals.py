"""Signals that end a run early and well: Ctrl-C, SIGTERM, SIGHUP, SIGUSR1. Imports no torch: they are taken at once."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any

log = logging.getLogger(__name__)

# SIGUSR1 is how Slurm (sbatch --signal=USR1@120) says that the time limit is near; by default it kills the process.
# SIGHUP comes when a terminal is closed; nohup has it ignored, and then it stays so.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Interrupted(BaseException):
    """Stop at once. Not an ``Exception``, so that no handler on the way mistakes it for an error to recover from."""


class Interruption:
    """Turns Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 into a clean end of the run. A context; may be entered again inside.

    Before training begins a signal stops at once, by raising :class:`Interrupted`: there is nothing to save. During
    training the first one lets the optimizer step under way complete, with a checkpoint after it; a second one, later
    than :attr:`again_after` seconds, stops at once. After training (export, report) the first is noted and only the
    second stops. A launcher such as torchrun passes a Ctrl-C on to workers that the terminal has already told, hence
    :attr:`again_after`: signals in quick succession count as one.

    Attributes:
        requested: the first signal that came.
        patient: only a second Ctrl-C stops at once. For a batch system, which repeats its SIGTERM and ends with SIGKILL
            on its own: between the two there may be time for the checkpoint.
        speaks: whether this process says that it was told; one of several is enough.
        training_began: the weights of a checkpoint, if there is one to resume from, are in their place.
        stopped_training: training ended before its time because of the signal.
        at_once: it ended in the middle of a step, and other processes may stand elsewhere.

    Args:
        signals: those that are taken.
        then: what follows the step under way, for the line on the screen.
    """

    again_after = 1.0  # seconds

    def __init__(self, signals: Sequence[signal.Signals] = SIGNALS, then: str = ", then export and report") -> None:
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        self._signals = tuple(number for number in signals if number != signal.SIGHUP or not ignored)
        self._then = then
        self.requested: signal.Signals | None = None
        self.patient = False
        self.speaks = True
        self.training_began = False
        self.stopped_training = False
        self.at_once = False
        self._requested_at = 0.0
        self._was_elsewhere = False
        self._graceful = False
        self._closing = False
        self._dismissed = False
        self._process = os.getpid()
        self._previous: list[dict[signal.Signals, Any]] = []

    @property
    def exit_code(self) -> int:
        """0, or 128 + the signal's number, as shells count: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP."""
        return 0 if self.requested is None else 128 + int(self.requested)

    @property
    def reason(self) -> str:
        """The signal's name, such as SIGUSR1; empty if none has come."""
        return "" if self.requested is None else self.requested.name

    def __enter__(self) -> Interruption:
        here = threading.current_thread() is threading.main_thread()
        self._previous.append({number: signal.getsignal(number) for number in self._signals} if here else {})
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.pop().items():
            if not self._dismissed:
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def install(self) -> None:
        """Take the signals; again after Lightning has put its own SIGTERM handler in front, which would raise."""
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                signal.signal(number, self._handle)

    def training_starts(self) -> None:
        """From here on a signal waits for the end of the optimizer step."""
        self.training_began = self._graceful = True
        self.install()

    def note_signal_elsewhere(self, number: signal.Signals) -> None:
        """Another process got it; a signal that this one gets later is still its first."""
        if self.requested is None:
            self.requested = number
            self._was_elsewhere = True
            if self.speaks:
                log.warning("another process got %s: stopping", number.name)

    def after_training(self) -> None:
        """The closing work (export, report) is under way: a first signal lets it finish, too."""
        self._graceful = self._closing = True
        self.install()  # Lightning has put the handlers back that it found

    def dismiss(self) -> None:
        """Take no notice of further signals, to the end of the process, which is near: all is saved.

        ``srun --kill-on-bad-exit`` sends SIGTERM when another process has ended with the status that asks for a new
        start; a process that died of it would turn that status into its own.
        """
        self._dismissed = True
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                signal.signal(number, signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._dismissed or os.getpid() != self._process:  # a forked data worker: its parent says when it ends
            return
        now = time.monotonic()
        if self.requested is not None:
            if self._was_elsewhere:
                self._was_elsewhere, self._requested_at = False, now
            if now - self._requested_at < self.again_after or (self.patient and number != signal.SIGINT):
                return
            log.warning("second signal: stopping at once")
            self._stop_at_once()
        self.requested = signal.Signals(number)
        self._requested_at = now
        name = "Ctrl-C" if number == signal.SIGINT else self.requested.name
        if not self._graceful:
            self._stop_at_once()
        if not self.speaks:
            return
        if self.patient and number != signal.SIGINT and not self._closing:
            log.warning("%s: stopping after the step under way, with a checkpoint", name)
        elif self._closing:
            log.warning("%s: export and report are completed first; again to stop at once", name)
        else:
            log.warning("%s: stopping after the step under way%s; again to stop at once", name, self._then)

    def stopped_at_once(self) -> None:
        """Something ends in the middle: a second signal, or a Ctrl-C that Python raised in the user's own code."""
        self.requested = self.requested or signal.SIGINT
        self.at_once = True
        self.stopped_training = self.stopped_training or not self._closing

    def _stop_at_once(self) -> None:
        self.stopped_at_once()
        raise Interrupted


def run_then_close(
    interruption: Interruption,
    train: Callable[[], None],
    closing: list[Callable[[], None]],
    leave: Callable[[], bool] = lambda: False,
) -> int:
    """Train, then run every closing step (export, report, …) even after an interruption, and give the exit code.

    A closing step that fails does not keep the later ones from running; the first failure is raised at the end.
    An error in ``train`` itself is raised at once, and so is a signal that came before training began: what is in
    memory then are not the weights of the run that is to be resumed.

    Args:
        leave: asked after training; True: the run goes on at another time, and the closing steps are left to then.
    """
    failure: Exception | None = None
    with interruption:
        try:
            train()
        except Interrupted:
            interruption.stopped_at_once()
            if not interruption.training_began:
                raise
        interruption.after_training()
        try:
            for step in [] if leave() else closing:
                try:
                    step()
                except Exception as error:
                    log.error("%s failed: %s", getattr(step, "__name__", "a closing step"), error)
                    failure = failure or error
        except Interrupted:
            log.warning("stopped before export and report were complete")
    if failure is not None:
        raise failure
    return interruption.exit_code
