"""The validation that a run was ended before, made up for by the run that resumes it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytorch_lightning as pl

from nemo_aligner_diffusion.runtime.csv_table import CSVTable

log = logging.getLogger(__name__)


class MissedValidation(pl.Callback):
    """Validates before the first step of a resumed run, if the run before ended between a step and its validation.

    A checkpoint is written before the validation of the same step, and a run that is told to stop leaves it out; with
    this, ``validation.csv`` has the rows of a run that was never interrupted. Put it behind the callbacks that have to
    be ready for a validation.

    Args:
        run_dir: has ``validation.csv``.
        interval: optimizer steps between validations; 0: there are none.
        always: validate again even if the row is there: for callbacks that learn from a validation (early stopping,
            the best weights), whose state in the checkpoint is the one before it.
    """

    def __init__(self, run_dir: Path, interval: int, always: bool = False) -> None:
        self.run_dir = Path(run_dir)
        self.interval = interval
        self.always = always

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        if self.interval <= 0 or step == 0 or step % self.interval != 0:
            return
        if not self.always:
            known = CSVTable(self.run_dir / "validation.csv", ("step",)).steps() if trainer.is_global_zero else ()
            if not trainer.strategy.broadcast(step not in known):
                return
        if trainer.is_global_zero:
            log.info("validating at step %d, which the run before this one did not, or may not have", step)
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.restarting = False
        trainer.validating = True
        try:
            loop.run()
        finally:
            trainer.training = True
