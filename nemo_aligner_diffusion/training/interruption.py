"""Ending a run early and well: Ctrl-C, SIGTERM, and a limit on the time of one run."""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Timer

from nemo_aligner_diffusion.errors import ConfigurationError

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """Stop at once. Not an ``Exception``, so that no handler on the way mistakes it for an error to recover from."""


class Interruption:
    """Turns Ctrl-C and SIGTERM into a clean end of the run.

    Before training begins a signal stops at once: there is nothing to save. During training the first one lets the
    optimizer step under way complete, with a checkpoint after it; a second one, later than :attr:`again_after`
    seconds, stops at once. After training (export, report) the first is noted and only the second stops. Whatever
    runs after ``trainer.fit`` then runs as always::

        interruption = Interruption()
        with interruption:
            try:
                trainer.fit(module, datamodule, ckpt_path=...)  # its callbacks hold InterruptionCallback(interruption)
            except Interrupted:
                pass
            interruption.after_training()
            export(); report()
        run_directory.finish("interrupted" if interruption.requested else "finished")
        return interruption.exit_code

    A launcher such as torchrun passes a Ctrl-C on to workers that the terminal has already told, hence
    :attr:`again_after`: signals in quick succession count as one.
    """

    again_after = 1.0  # seconds

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._requested_at = 0.0
        self._graceful = False
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """0, or 130 after Ctrl-C, 143 after SIGTERM (128 + the number of the signal, as shells count)."""
        return 0 if self.requested is None else 128 + int(self.requested)

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.getsignal(number) for number in _SIGNALS}
            self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous = {}

    def install(self) -> None:
        """Take the signals; again after Lightning has put its own SIGTERM handler in front, which would raise."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, self._handle)

    def training_starts(self) -> None:
        """From here on a signal waits for the end of the optimizer step."""
        self._graceful = True
        self.install()

    def after_training(self) -> None:
        """The closing work (export, report) is under way: a first signal lets it finish, too."""
        self._graceful = True
        self.install()  # Lightning has put the handlers back that it found

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested is not None:
            if now - self._requested_at < self.again_after:
                return
            log.warning("second signal: stopping at once")
            raise Interrupted
        self.requested = signal.Signals(number)
        self._requested_at = now
        name = "Ctrl-C" if number == signal.SIGINT else self.requested.name
        if not self._graceful:
            raise Interrupted
        log.warning("%s: stopping after the step under way, then export and report; again to stop at once", name)


class InterruptionCallback(pl.Callback):
    """Ends the fit after the optimizer step in which an :class:`Interruption` was requested on any rank."""

    def __init__(self, interruption: Interruption) -> None:
        self.interruption = interruption
        self._stop = _StopAfterStep()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop.begin(trainer)
        self.interruption.training_starts()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._stop.at_step_end(trainer):
            return
        # one rank may see the signal a step before another: all must stop at the same one
        if trainer.strategy.reduce_boolean_decision(self.interruption.requested is not None, all=False):
            self._stop.stop(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop.end(trainer)


class RunTimer(Timer):
    """``exp_manager.max_time_per_run``: ends *this* run after so long, saving, so that the next one can resume.

    As NeMo's ``StatelessTimer`` the time already spent is not kept in checkpoints: the limit is per run. It is looked
    at after each optimizer step, so a run may exceed it by one step and the closing work.

    Args:
        duration: ``DD:HH:MM:SS``.
    """

    def __init__(self, duration: str) -> None:
        super().__init__(duration=parse_duration(duration), verbose=False)
        self.reached = False
        self._stop = _StopAfterStep()

    @classmethod
    def from_config(cls, exp_manager: Any) -> RunTimer | None:
        """The timer for ``exp_manager.max_time_per_run``, or None if it is not set."""
        duration = exp_manager.get("max_time_per_run")
        return None if duration in (None, "") else cls(str(duration))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        return

    def on_fit_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        return  # the limit is per run, so it cannot be used up before training starts

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._stop.begin(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if not self._stop.at_step_end(trainer) or self._duration is None:
            return
        if trainer.strategy.broadcast(self.time_elapsed() >= self._duration):
            self.reached = True
            if trainer.is_global_zero:
                log.info("exp_manager.max_time_per_run reached at step %d: saving and stopping", trainer.global_step)
            self._stop.stop(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._stop.end(trainer)


class _StopAfterStep:
    """Stops a Trainer at the end of an optimizer step: mid-accumulation, half a batch of gradients would be lost.

    Lightning validates before it stops early. Who ends a run wants it ended (a cluster gives half a minute between
    SIGTERM and SIGKILL), so validation is switched off for the rest of this fit.
    """

    def __init__(self) -> None:
        self._step = 0
        self._limit_val_batches: int | float | None = None

    def begin(self, trainer: pl.Trainer) -> None:
        self._step = trainer.global_step

    def at_step_end(self, trainer: pl.Trainer) -> bool:
        stepped = trainer.global_step != self._step
        self._step = trainer.global_step
        return stepped

    def stop(self, trainer: pl.Trainer) -> None:
        trainer.should_stop = True
        if self._limit_val_batches is None and trainer.limit_val_batches != 0:
            self._limit_val_batches = trainer.limit_val_batches
            trainer.limit_val_batches = 0

    def end(self, trainer: pl.Trainer) -> None:
        if self._limit_val_batches is not None:
            trainer.limit_val_batches = self._limit_val_batches
            self._limit_val_batches = None


def parse_duration(text: str) -> timedelta:
    """``DD:HH:MM:SS`` as NeMo and Lightning write it.

    Raises:
        ConfigurationError: anything else, naming the form.
    """
    match = re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", text.strip())
    if not match:
        raise ConfigurationError(
            f"exp_manager.max_time_per_run={text!r}: expected days:hours:minutes:seconds such as 00:03:55:00"
        )
    days, hours, minutes, seconds = (int(part) for part in match.groups())
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)


def run_then_close(interruption: Interruption, train: Callable[[], None], closing: list[Callable[[], None]]) -> int:
    """Train, then run every closing step (export, report, …) even after an interruption, and give the exit code.

    A closing step that fails does not keep the later ones from running; the first failure is raised at the end.
    An error in ``train`` itself is raised at once.
    """
    failure: Exception | None = None
    with interruption:
        with contextlib.suppress(Interrupted):
            train()
        interruption.after_training()
        try:
            for step in closing:
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
