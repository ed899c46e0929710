"""What a run writes down about itself: ``metrics.csv``, ``validation.csv``, and the loggers chosen by key."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.evaluation.metrics.base import Step, training_columns, training_figures
from nemo_aligner_diffusion.runtime.csv_table import CSVTable
from nemo_aligner_diffusion.training.callbacks.settings import LoggerSettings


class MetricsCSV(pl.Callback):
    """Writes a row of ``metrics.csv`` per optimizer step and of ``validation.csv`` per validation, on rank 0.

    The figures come from the LightningModule: what it reports of a step is ``module.last_metrics`` (set before the
    batch that completes an optimizer step ends), from which the metrics of ``evaluation/metrics`` are measured; those
    of a validation are ``module.last_validation`` (set no later than its ``on_validation_epoch_end``). Names that are
    no metric's become columns, too. The same figures go to the Trainer's loggers as ``train/...`` (every
    ``log_every_n_steps``) and ``validation/...``.

    A resumed run appends, after removing the rows past the step that it resumes from.

    Args:
        columns, validation_columns: those that the two files begin with; ``None``: all metrics of a step.
    """

    def __init__(
        self,
        run_dir: Path,
        columns: Sequence[str] | None = None,
        validation_columns: Sequence[str] = ("step",),
    ) -> None:
        self.run_dir = Path(run_dir)
        self.columns = training_columns() if columns is None else columns
        self.validation_columns = validation_columns
        self._metrics: CSVTable | None = None
        self._validation: CSVTable | None = None
        self._step = 0
        self._lr = float("nan")
        self._started = time.monotonic()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.is_global_zero and self._metrics is None:
            self._metrics = CSVTable(self.run_dir / "metrics.csv", self.columns)
            self._validation = CSVTable(self.run_dir / "validation.csv", self.validation_columns)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        self._started = time.monotonic()
        for table in self._tables:
            table.drop(lambda step: step > self._step)

    @property
    def _tables(self) -> list[CSVTable]:
        return [table for table in (self._metrics, self._validation) if table is not None]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        for table in self._tables:
            table.sync()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        # Lightning has already stepped the schedule when on_train_batch_end comes: the rate used is known only here
        self._lr = float(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        now = time.monotonic()
        seconds, self._started = now - self._started, now
        if self._metrics is None:
            return
        step = Step(_floats(getattr(pl_module, "last_metrics", {})), self._lr, seconds, pl_module.device)
        measured = {**training_figures(step), "step": self._step}
        row = {name: value for name, value in measured.items() if value is not None}
        self._metrics.append({**dict.fromkeys(self.columns), **row})
        if self._step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # set by its connector
            _log(trainer, "train", row, self._step)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        figures = _floats(getattr(pl_module, "last_validation", {}))
        if self._validation is None or not figures:
            return
        step = trainer.global_step
        self._validation.drop(lambda other: other == step)
        self._validation.append({"step": step, **{k: v for k, v in figures.items() if k != "step"}})
        _log(trainer, "validation", figures, step)
        self._started = time.monotonic()  # so that validation does not count as training time


def build_loggers(settings: LoggerSettings, name: str, run_dir: Path, resumed_step: int = 0) -> list[Logger]:
    """The Lightning loggers that ``exp_manager`` asks for; ``metrics.csv`` needs none of them.

    Args:
        name: of the run.
        run_dir: TensorBoard files go to ``run_dir/tensorboard``, Weights & Biases to ``run_dir/wandb``.
        resumed_step: what TensorBoard holds past this step is hidden (it cannot be deleted there).

    Raises:
        ConfigurationError: W&B is not installed, or was given no project or name.
    """
    loggers: list[Logger] = []
    if settings.create_tensorboard_logger:
        from pytorch_lightning.loggers import TensorBoardLogger

        purge: dict[str, Any] = {"purge_step": resumed_step + 1} if resumed_step else {}
        loggers.append(TensorBoardLogger(save_dir=str(run_dir), name="", version="tensorboard", **purge))
    if settings.create_wandb_logger:
        if importlib.util.find_spec("wandb") is None:
            raise ConfigurationError(
                "exp_manager.create_wandb_logger=True needs the package 'wandb', which is not installed: pip install "
                "wandb, or set exp_manager.create_wandb_logger=False"
            )
        from pytorch_lightning.loggers import WandbLogger

        loggers.append(WandbLogger(**wandb_arguments(settings, name, run_dir)))
    return loggers


def wandb_arguments(settings: LoggerSettings, name: str, run_dir: Path) -> dict[str, Any]:
    """For Lightning's WandbLogger: what the configuration gives, and else the run's name and directory.

    Args, Raises: as for :func:`build_loggers`.
    """
    kwargs = {str(key): value for key, value in settings.wandb_logger_kwargs.items() if value is not None}
    if "name" not in kwargs and "project" not in kwargs:
        raise ConfigurationError(
            "exp_manager.create_wandb_logger=True needs exp_manager.wandb_logger_kwargs.project or .name"
        )
    return {"save_dir": str(run_dir), "name": name, **kwargs}


def _log(trainer: pl.Trainer, prefix: str, figures: Mapping[str, Any], step: int) -> None:
    values = {f"{prefix}/{name}": float(value) for name, value in figures.items() if name != "step"}
    for logger in trainer.loggers:
        logger.log_metrics(values, step=step)


def _floats(figures: Mapping[str, Any]) -> dict[str, float]:
    """The entries that are numbers (tensors of one element included); others are not for a table of numbers."""
    numbers: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            numbers[name] = value.item()
        elif isinstance(value, (int, float)):
            numbers[name] = value
    return numbers
