"""Marks a fit's way for the watch over ranks (runtime/watch.py)."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
import torch

from nemo_aligner_diffusion.parallel.strategy import layout_of
from nemo_aligner_diffusion.runtime.health.progress import waited_seconds
from nemo_aligner_diffusion.runtime.watch import RunWatch, explained


class HealthCallback(pl.Callback):
    """Marks a fit's way for the :class:`RunWatch`, and times the rank's own work in each optimizer step.

    Own work is reading data, forward and backward passes; what follows waits for the other ranks, and collective
    calls that say so (:func:`~nemo_aligner_diffusion.runtime.health.progress.waiting`) are taken out. Under tensor
    parallelism and FSDP the passes themselves keep the ranks in step: there a fixed piece of computing, now and then,
    is timed.
    """

    def __init__(self, watch: RunWatch) -> None:
        assert watch.progress is not None
        self.watch = watch
        self.probe_interval = watch.settings.straggler_detection_params.report_time_interval / 4
        self._in_step = False
        self._probed = 0.0
        self.progress = watch.progress
        self._step = 0
        self._seconds = 0.0
        self._started = 0.0
        self._waited = 0.0
        self._previous_end: float | None = None
        self._cuda: list[tuple[Any, Any]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.progress.mark("setting up")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        self.progress.mark("data", self._step, in_training=True)
        layout = layout_of(trainer)
        self._in_step = layout.tensor > 1 or layout.fsdp
        self._probed = time.monotonic()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.progress.mark("forward pass", in_training=True)
        self._started = time.perf_counter()
        self._waited = waited_seconds()
        if self._previous_end is not None:
            self._seconds += self._started - self._previous_end
            self._previous_end = None
        if pl_module.device.type == "cuda":
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
            self._cuda.append(pair)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        self.progress.mark("backward pass", in_training=True)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.progress.mark("optimizer step", in_training=True)
        if self._cuda:
            self._cuda[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._started - (waited_seconds() - self._waited)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            if self._cuda:  # the gradient norm has been read since: the device is past both events
                self._cuda[-1][1].synchronize()
                self._seconds += sum(start.elapsed_time(end) for start, end in self._cuda) / 1000
                self._cuda = []
            if not self._in_step:
                self.progress.add_work(self._seconds)
            elif time.monotonic() - self._probed > self.probe_interval:
                self.progress.add_work(probe(pl_module.device))
                self._probed = time.monotonic()
            self._seconds = 0.0
        self.progress.mark("data", self._step, in_training=True)
        self._previous_end = time.perf_counter()

    def on_save_checkpoint(self, *args: Any) -> None:
        self.progress.mark("saving a checkpoint")
        self._previous_end = None

    def on_validation_start(self, *args: Any) -> None:
        self.progress.mark("validation")
        self._previous_end = None

    def on_validation_batch_end(self, *args: Any) -> None:
        self.progress.mark("validation")

    def on_validation_end(self, *args: Any) -> None:
        self.progress.mark("data", in_training=True)

    def on_train_end(self, *args: Any) -> None:
        self.progress.mark("ending the training")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Exception):  # before Lightning's own teardown, which may wait for the other ranks
            self.watch.failed(explained(exception, self.watch.directory))


def probe(device: torch.device) -> float:
    """Seconds that this rank's device takes for a fixed piece of computing (some milliseconds)."""
    cuda = device.type == "cuda"
    side = 4096 if cuda else 384
    matrix = torch.ones(side, side, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    product = torch.empty_like(matrix)
    seconds = 0.0
    for timed in (False, True):  # the first one finds caches and kernels
        if cuda:
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(8):
            torch.mm(matrix, matrix, out=product)
        if cuda:
            torch.cuda.synchronize(device)
        if timed:
            seconds = time.perf_counter() - started
    return seconds
