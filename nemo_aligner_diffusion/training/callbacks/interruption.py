"""Ending a run early and well: what signals and a limit on the time of one run do to a Lightning fit."""

from __future__ import annotations

import logging
import re
import signal
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Timer

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.runtime.signals import Interrupted, Interruption, run_then_close
from nemo_aligner_diffusion.training.callbacks.settings import TimeLimitSettings

__all__ = ["Interrupted", "Interruption", "InterruptionCallback", "RunTimer", "parse_duration", "run_then_close"]

log = logging.getLogger(__name__)


class InterruptionCallback(pl.Callback):
    """Ends the fit after the optimizer step in which an :class:`Interruption` was requested on any rank."""

    def __init__(self, interruption: Interruption) -> None:
        self.interruption = interruption
        self._stop = _StopAfterStep()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop.begin(trainer)
        self.interruption.training_starts()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Trainer.validate has put Lightning's SIGTERM handler in front, which makes a collective call wherever it is
        # called, and ends the program at the next batch
        self.interruption.install()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._stop.at_step_end(trainer):
            return
        # one rank may see the signal a step before another, or alone: all must stop at the same one
        mine = torch.tensor(int(self.interruption.requested or 0), device=pl_module.device)
        if number := int(trainer.strategy.reduce(mine, reduce_op="max")):
            self.interruption.note_signal_elsewhere(signal.Signals(number))
            self.interruption.stopped_training = True
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
    def from_settings(cls, settings: TimeLimitSettings) -> RunTimer | None:
        """The timer for ``exp_manager.max_time_per_run``, or None if it is not set."""
        return None if settings.max_time_per_run is None else cls(settings.max_time_per_run)

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
