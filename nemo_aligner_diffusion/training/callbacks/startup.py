"""The part of the start-up that happens inside ``trainer.fit``, up to the first optimizer step."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from nemo_aligner_diffusion.runtime.files import write_atomic
from nemo_aligner_diffusion.runtime.startup import STARTUP_FILE, Startup

log = logging.getLogger(__name__)


class StartupCallback(pl.Callback):
    """Times the phases of the first optimizer step, then says and writes down all phases of ``startup``.

    ``parallelising`` (the model to its device, cut and sharded; the optimizer), ``resume``, ``first batch`` (of the
    data loader), what the module's :attr:`~.DenoiserTuning.starts_with` says and ``first optimizer step``. A GPU is
    waited for between them, this once.

    Args:
        startup: has timed what came before.
        folder: the run directory.
    """

    def __init__(self, startup: Startup, folder: Path) -> None:
        self.startup = startup
        self.folder = folder
        self._at_first = -1
        self._done = False

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self._enter("parallelising")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._enter("resume")

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._enter("first batch")
        self._at_first = trainer.global_step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._enter(pl_module.starts_with[0])

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Any) -> None:
        self._enter(pl_module.starts_with[1])

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self._enter("first optimizer step")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._done or trainer.global_step == self._at_first:
            return
        self.startup.finish()
        self._done = True
        if trainer.is_global_zero:
            log.info("%s", self.startup.line())
            write_atomic(self.folder / STARTUP_FILE, json.dumps(self.startup.summary(), indent=1) + "\n")

    def _enter(self, phase: str) -> None:
        if self._done:
            return
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.startup.enter(phase)
