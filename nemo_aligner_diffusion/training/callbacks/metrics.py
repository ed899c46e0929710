"""What a run writes down about itself: ``metrics.csv``, ``validation.csv``, and the loggers chosen by key."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import os
import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.runtime.directory import write_text_atomically
from nemo_aligner_diffusion.training.callbacks.settings import LoggerSettings

METRIC_COLUMNS = (
    "step",
    "reward",
    "kl_penalty",
    "loss",
    "grad_norm",
    "lr",
    "images_per_second",
    "peak_memory_bytes",
)
VALIDATION_COLUMNS = ("step", "reward", "base_reward")


class CSVTable:
    """A CSV file that grows by a row at a time; a process that is killed loses none of them.

    Floats are written with ``repr``: reading them back gives the same bits. A column that first appears later is added
    on the right, and empty in the rows before.

    Args:
        path: the file; its folder exists.
        columns: the first columns, in this order, always there.
    """

    def __init__(self, path: Path, columns: Iterable[str]) -> None:
        self.path = Path(path)
        self.columns = list(columns)
        existing = self._read()
        if existing:
            self.columns += [name for name in existing[0] if name not in self.columns]

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; keys not seen before become columns."""
        new = [name for name in row if name not in self.columns]
        self.columns += new
        if new or not self.path.exists():
            self._rewrite(self._read())
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            file.write(self._format([row.get(name) for name in self.columns]))

    def drop(self, unwanted: Any) -> int:
        """Remove the rows for whose step ``unwanted(step)`` is true, and any half-written one; returns how many."""
        rows, torn = self._read_all()
        kept = [row for row in rows if _step_of(row) is not None and not unwanted(_step_of(row))]
        if torn or len(kept) != len(rows):
            self._rewrite(kept)
        return len(rows) + torn - len(kept)

    def steps(self) -> set[int]:
        """The steps that have a row."""
        return {step for step in map(_step_of, self._read()) if step is not None}

    def sync(self) -> None:
        """Have every row on disk, so that a checkpoint which comes after them cannot outlive them."""
        with contextlib.suppress(OSError), open(self.path, "rb+") as file:  # not there yet; or it cannot be synced
            os.fsync(file.fileno())

    def _read(self) -> list[dict[str, str]]:
        return self._read_all()[0]

    def _read_all(self) -> tuple[list[dict[str, str]], int]:
        """The complete rows, and the number of others: a power failure may have kept the beginning of a row only."""
        try:
            with open(self.path, encoding="utf-8", newline="") as file:
                lines = file.read().splitlines(keepends=True)
        except OSError:
            return [], 0
        whole = [line for line in lines if line.endswith("\n")]
        rows = list(csv.DictReader(whole))
        complete = [row for row in rows if None not in row and None not in row.values()]
        return complete, len(lines) - len(whole) + len(rows) - len(complete)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        lines = [self._format(self.columns)] + [self._format([row.get(n, "") for n in self.columns]) for row in rows]
        write_text_atomically(self.path, "".join(lines))

    @staticmethod
    def _format(values: Iterable[Any]) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow([_cell(value) for value in values])
        return text.getvalue()


class MetricsCSV(pl.Callback):
    """Writes a row of ``metrics.csv`` per optimizer step and of ``validation.csv`` per validation, on rank 0.

    The figures come from the LightningModule: ``module.last_metrics`` (set before the batch that completes an
    optimizer step ends; ``images`` and ``seconds`` give ``images_per_second``) and ``module.last_validation`` (set no
    later than its ``on_validation_epoch_end``). Keys beyond the fixed columns become columns of their own. The same
    figures go to the Trainer's loggers as ``train/...`` (every ``log_every_n_steps``) and ``validation/...``.

    A resumed run appends, after removing the rows past the step that it resumes from.

    Args:
        columns, validation_columns: the fixed columns of the two files.
    """

    def __init__(
        self,
        run_dir: Path,
        columns: Sequence[str] = METRIC_COLUMNS,
        validation_columns: Sequence[str] = VALIDATION_COLUMNS,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.columns = columns
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
        figures = _floats(getattr(pl_module, "last_metrics", {}))
        images, used = figures.get("images"), figures.get("seconds", seconds)
        row: dict[str, Any] = {
            "step": self._step,
            "lr": self._lr,
            "images_per_second": images / used if images is not None and used > 0 else None,
            "peak_memory_bytes": peak_memory_bytes(pl_module.device),
        }
        row |= {name: value for name, value in figures.items() if name != "step"}
        self._metrics.append({name: row.get(name) for name in (*self.columns, *row)})
        if self._step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # set by its connector
            _log(trainer, "train", row, self._step)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        figures = _floats(getattr(pl_module, "last_validation", {}))
        if trainer.sanity_checking or self._validation is None or not figures:
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
        ConfigurationError: the package of a requested logger is not installed, or W&B was given no project or name.
    """
    loggers: list[Logger] = []
    if settings.create_tensorboard_logger:
        _require("tensorboard", "exp_manager.create_tensorboard_logger")
        from pytorch_lightning.loggers import TensorBoardLogger

        purge: dict[str, Any] = {"purge_step": resumed_step + 1} if resumed_step else {}
        loggers.append(TensorBoardLogger(save_dir=str(run_dir), name="", version="tensorboard", **purge))
    if settings.create_wandb_logger:
        _require("wandb", "exp_manager.create_wandb_logger")
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


def peak_memory_bytes(device: torch.device | str = "cpu") -> int:
    """Most memory held so far: allocated by torch on a CUDA device, else resident in this process."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _require(package: str, key: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigurationError(
            f"{key}=True needs the package {package!r}, which is not installed: pip install {package}, or set "
            f"{key}=False"
        )


def _log(trainer: pl.Trainer, prefix: str, figures: Mapping[str, Any], step: int) -> None:
    values = {
        f"{prefix}/{name}": float(value) for name, value in figures.items() if value is not None and name != "step"
    }
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


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return repr(float(value)) if isinstance(value, float) else str(value)


def _step_of(row: Mapping[str, str]) -> int | None:
    try:
        return int(row.get("step", ""))
    except ValueError:
        return None
