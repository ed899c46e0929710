"""What a run shows while it runs: a live line on a terminal, whole plain lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from tqdm.auto import tqdm


class TrainingProgress(ProgressBar):
    """Step, reward, KL, images/s and time left.

    On a terminal: one line that is redrawn; in a notebook, tqdm's bar. Elsewhere (a file, a pipe, ``nohup``, Slurm):
    whole lines without carriage returns or colours; every step if the run is short, else the first, the last, and one
    per ``seconds_between_lines``.
    Results of validations are lines of their own in both.

    Reads ``module.last_metrics`` and ``module.last_validation`` as :class:`MetricsCSV` does. Being Lightning's
    ``ProgressBar``, it takes the place of Lightning's own.

    Args:
        seconds_between_lines: least time between two lines in a log file.
        short_run: runs of up to this many steps get a line for every step.
        stream: where to write; standard output by default.
        live: redraw one line; by default whether ``stream`` is a terminal, or this a notebook.
        silent: show nothing.
    """

    def __init__(
        self,
        seconds_between_lines: float = 10.0,
        short_run: int = 200,
        stream: TextIO | None = None,
        live: bool | None = None,
        silent: bool = False,
    ) -> None:
        super().__init__()
        self.seconds_between_lines = seconds_between_lines
        self.short_run = short_run
        self._given_stream = stream
        self._live = live
        self._enabled = not silent
        self._bar: Any = None
        self._step = 0
        self._first_step = 0
        self._total: int | None = None
        self._started = 0.0
        self._last_line = float("-inf")

    @property
    def stream(self) -> TextIO:
        return self._given_stream if self._given_stream is not None else sys.stdout

    @property
    def live(self) -> bool:
        return self.stream.isatty() or _in_notebook() if self._live is None else self._live

    def disable(self) -> None:  # Lightning calls this on every rank but 0
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Write a line of its own (``module.print`` comes here)."""
        if not self._enabled:
            return
        text = kwargs.get("sep", " ").join(str(arg) for arg in args)
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        else:
            self.stream.write(text + "\n")
            self.stream.flush()

    def describe(self, figures: Mapping[str, Any]) -> str:
        """The figures of a training step, as the line shows them."""
        return _describe(figures)

    def describe_validation(self, figures: Mapping[str, Any]) -> str:
        return _describe_validation(figures)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = self._first_step = trainer.global_step
        self._total = total_steps(trainer)
        self._started = time.monotonic()
        if self._enabled and self.live:
            self._bar = tqdm(
                total=self._total,
                initial=self._step,
                desc="training",
                unit="step",
                dynamic_ncols=True,
                file=self.stream,
                bar_format="{desc} {n_fmt}/{total_fmt} |{bar:10}|{postfix} [{elapsed}<{remaining}]",
            )
        elif self._enabled and self._step:
            self.print(f"resuming at step {self._step}" + (f" of {self._total}" if self._total else ""))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if not self._enabled:
            return
        figures = self.describe(getattr(pl_module, "last_metrics", {}))
        if self._bar is not None:
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update(self._step - self._bar.n)
            return
        now = time.monotonic()
        short = self._total is not None and self._total <= self.short_run
        edge = self._step in (self._first_step + 1, self._total) or trainer.should_stop
        if short or edge or now - self._last_line >= self.seconds_between_lines:
            self._last_line = now
            self.print(f"step {self._count()}  {figures}{self._time_left(now)}")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        figures = getattr(pl_module, "last_validation", None)
        if trainer.sanity_checking or not self._enabled or not figures:
            return
        self.print(f"validation at step {trainer.global_step}: {self.describe_validation(figures)}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _count(self) -> str:
        if self._total is None:
            return str(self._step)
        return f"{self._step:>{len(str(self._total))}}/{self._total}"

    def _time_left(self, now: float) -> str:
        if self._total is None:
            return ""
        done = self._step - self._first_step
        left = (now - self._started) / done * (self._total - self._step)
        return f"  {clock(left)} left" if left > 0 else f"  took {clock(now - self._started)}"


def _in_notebook() -> bool:
    return any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)


def total_steps(trainer: pl.Trainer) -> int | None:
    """Optimizer steps of the whole run, or None if neither steps nor data bound it."""
    bounds = [float(trainer.max_steps)] if trainer.max_steps is not None and trainer.max_steps >= 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        batches = trainer.num_training_batches
        if batches != float("inf"):
            bounds.append(trainer.max_epochs * -(-batches // trainer.accumulate_grad_batches))
    return int(min(bounds)) if bounds else None


def clock(seconds: float) -> str:
    """``45 s``, ``2:05``, ``1:02:05``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, second = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{second:02d}" if hours else f"{minutes}:{second:02d}"


def _describe(figures: Any) -> str:
    parts = []
    if "reward" in figures:
        parts.append(f"reward {float(figures['reward']):.4f}")
    if "kl_penalty" in figures:
        parts.append(f"KL {float(figures['kl_penalty']):.3g}")
    if figures.get("images") and figures.get("seconds"):
        parts.append(f"{float(figures['images']) / float(figures['seconds']):.2f} images/s")
    return "  ".join(parts)


def _describe_validation(figures: Any) -> str:
    text = f"reward {float(figures['reward']):.4f}" if "reward" in figures else ""
    if "reward" in figures and "base_reward" in figures:
        gain = float(figures["reward"]) - float(figures["base_reward"])
        text += f", base {float(figures['base_reward']):.4f} ({gain:+.4f})"
    others = [
        f"{name} {float(value):.4g}"
        for name, value in figures.items()
        if name not in ("step", "reward", "base_reward") and isinstance(value, (int, float))
    ]
    return ", ".join([part for part in (text, *others) if part])
