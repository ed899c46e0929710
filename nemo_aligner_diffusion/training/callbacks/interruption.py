"""Ending a run early and well: what signals and a limit on the time of one run do to a Lightning fit."""

from __future__ import annotations

import logging
import math
import signal
import time
from typing import Any

import pytorch_lightning as pl
import torch

from nemo_aligner_diffusion.runtime.signals import Interruption

log = logging.getLogger(__name__)


class InterruptionCallback(pl.Callback):
    """Ends the fit after the optimizer step in which a signal came to any rank, or this run's time was up.

    Not in the middle of an accumulation, where half a batch of gradients would be lost. Lightning validates before it
    stops early. Who ends a run wants it ended (a cluster gives half a minute between SIGTERM and SIGKILL), so
    validation is switched off for the rest of this fit.

    Args:
        interruption: takes the signals.
        max_time: ``exp_manager.max_time_per_run``, ``DD:HH:MM:SS``; ``None``: no limit. As NeMo's ``StatelessTimer``
            the time already spent is not kept in checkpoints: the limit is per run. It is looked at after each
            optimizer step, so a run may exceed it by one step and the closing work.

    Attributes:
        out_of_time: the limit has ended the fit.
    """

    def __init__(self, interruption: Interruption, max_time: str | None = None) -> None:
        self.interruption = interruption
        self.out_of_time = False
        self._seconds = math.inf if max_time is None else _seconds(max_time)
        self._started = 0.0
        self._step = 0
        self._limit_val_batches: int | float = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        self._started = time.monotonic()
        self._limit_val_batches = trainer.limit_val_batches
        self.interruption.training_starts()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Trainer.validate has put Lightning's SIGTERM handler in front, which makes a collective call wherever it is
        # called, and ends the program at the next batch
        self.interruption.install()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        # one rank may see the signal a step before another, or alone: all must stop at the same one
        over = time.monotonic() - self._started >= self._seconds
        mine = torch.tensor([int(self.interruption.requested or 0), int(over)], device=pl_module.device)
        number, any_over = trainer.strategy.reduce(mine, reduce_op="max").tolist()
        if number:
            self.interruption.note_signal_elsewhere(signal.Signals(number))
            self.interruption.stopped_training = True
        if any_over:
            self.out_of_time = True
            if trainer.is_global_zero:
                log.info("exp_manager.max_time_per_run reached at step %d: saving and stopping", trainer.global_step)
        if number or any_over:
            trainer.should_stop = True
            trainer.limit_val_batches = 0

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.limit_val_batches = self._limit_val_batches


def _seconds(duration: str) -> float:
    """Of ``DD:HH:MM:SS``."""
    days, hours, minutes, seconds = (int(part) for part in duration.split(":"))
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
