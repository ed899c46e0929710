"""Marks a fit's way for the watch over ranks (runtime/watch.py)."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
import torch

from nemo_aligner_diffusion.runtime.health.progress import waited_seconds
from nemo_aligner_diffusion.runtime.watch import RunWatch, explained


class HealthCallback(pl.Callback):
    """Tells the :class:`RunWatch` what the main thread comes to, and times the rank's own work in each optimizer step.

    Own work is the forward and backward passes, without the collective calls that say so
    (:func:`~nemo_aligner_diffusion.runtime.health.progress.waiting`). Under tensor parallelism and FSDP the passes
    themselves keep the ranks in step, so that all look equally slow.
    """

    def __init__(self, watch: RunWatch) -> None:
        assert watch.progress is not None
        self.watch = watch
        self.progress = watch.progress
        self._step = 0
        self._seconds = 0.0  # of this step's passes so far
        self._started = 0.0
        self._events: list[tuple[Any, Any]] = []  # around each pass, on a GPU

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.progress.mark("setting up")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        self.progress.mark("data", self._step, in_training=True)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.progress.mark("forward pass", in_training=True)
        self._started = time.perf_counter() - waited_seconds()
        if pl_module.device.type == "cuda":
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        self.progress.mark("backward pass", in_training=True)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.progress.mark("optimizer step", in_training=True)
        if self._events:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - waited_seconds() - self._started

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            if self._events:
                self._events[-1][1].synchronize()  # the gradient norm has been read since: the device is past it
                self._seconds = sum(start.elapsed_time(end) for start, end in self._events) / 1000
                self._events = []
            self.progress.add_work(self._seconds)
            self._seconds = 0.0
        self.progress.mark("data", self._step, in_training=True)

    def on_save_checkpoint(self, *args: Any) -> None:
        self.progress.mark("saving a checkpoint")

    def on_validation_start(self, *args: Any) -> None:
        self.progress.mark("validation")

    def on_validation_batch_end(self, *args: Any) -> None:
        self.progress.mark("validation")

    def on_validation_end(self, *args: Any) -> None:
        self.progress.mark("data", in_training=True)

    def on_train_end(self, *args: Any) -> None:
        self.progress.mark("ending the training")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Exception):  # before Lightning's own teardown, which may wait for the other ranks
            self.watch.failed(explained(exception, self.watch.directory))
