"""What a run shows while it runs: a live line on a terminal, whole plain lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from tqdm.auto import tqdm

SECONDS_BETWEEN_LINES = 10.0  # in a log file, at least
REWARD = {"reward": "reward", "kl_penalty": "KL"}
SHORT_RUN = 200  # steps of a run that gets a line for each


class TrainingProgress(ProgressBar):
    """Step, reward, KL, images/s and time left.

    On a terminal: one line that is redrawn; in a notebook, tqdm's bar. Elsewhere (a file, a pipe, ``nohup``, Slurm):
    whole lines without carriage returns or colours; every step if the run is short, else the first, the last, and one
    every ten seconds. Results of validations are lines of their own in both.

    Reads ``module.last_metrics`` and ``module.last_validation`` as :class:`MetricsCSV` does. Being Lightning's
    ``ProgressBar``, it takes the place of Lightning's own.

    Args:
        shown: figures of a step that the line shows, and the words for them.
        stream: where to write; standard output by default.
        silent: show nothing.
    """

    def __init__(self, shown: Mapping[str, str] = REWARD, stream: TextIO | None = None, silent: bool = False) -> None:
        super().__init__()
        self.shown = shown
        self._given_stream = stream
        self._enabled = not silent
        self._bar: Any = None
        self._step = 0
        self._first_step = 0
        self._total = 0
        self._started = 0.0
        self._last_line = float("-inf")

    @property
    def stream(self) -> TextIO:
        return self._given_stream if self._given_stream is not None else sys.stdout

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
            print(text, file=self.stream, flush=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = self._first_step = trainer.global_step
        self._total = int(trainer.estimated_stepping_batches)
        self._started = time.monotonic()
        in_notebook = any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)
        if self._enabled and (in_notebook or self.stream.isatty()):
            self._bar = tqdm(
                total=self._total,
                initial=self._step,
                desc="training",
                unit="step",
                dynamic_ncols=True,
                file=self.stream,
                bar_format="{desc} {n_fmt}/{total_fmt} |{bar:10}|{postfix} [{elapsed}<{remaining}]",
            )
        elif self._step:
            self.print(f"resuming at step {self._step} of {self._total}")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if not self._enabled:
            return
        figures = self._figures(getattr(pl_module, "last_metrics", {}))
        if self._bar is not None:
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update(self._step - self._bar.n)
            return
        now = time.monotonic()
        edge = self._step in (self._first_step + 1, self._total) or trainer.should_stop
        if self._total <= SHORT_RUN or edge or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            count = f"{self._step:>{len(str(self._total))}}/{self._total}"
            self.print(f"step {count}  {figures}  {self._time_left(now - self._started)}")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        figures = getattr(pl_module, "last_validation", None)
        if figures:
            said = _validated(figures, getattr(pl_module, "reward_is", "reward"))
            self.print(f"validation at step {trainer.global_step}: {said}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _time_left(self, spent: float) -> str:
        left = spent / (self._step - self._first_step) * (self._total - self._step)
        return f"{tqdm.format_interval(left)} left" if left > 0 else f"took {tqdm.format_interval(spent)}"

    def _figures(self, figures: Mapping[str, Any]) -> str:
        parts = [f"{word} {float(figures[name]):.5g}" for name, word in self.shown.items() if name in figures]
        for count in ("images", "pairs"):
            if figures.get(count) and figures.get("seconds"):
                parts.append(f"{float(figures[count]) / float(figures['seconds']):.2f} {count}/s")
        return "  ".join(parts)


def _validated(figures: Mapping[str, Any], reward: str) -> str:
    """The figures of a validation; a reward comes first, with the base model's beside it."""
    parts = []
    if "reward" in figures:
        parts.append(f"{reward} {float(figures['reward']):.4f}")
    if "reward" in figures and "base_reward" in figures:
        gain = float(figures["reward"]) - float(figures["base_reward"])
        parts.append(f"base {float(figures['base_reward']):.4f} ({gain:+.4f})")
    for name, value in figures.items():
        if name not in ("step", "reward", "base_reward") and isinstance(value, (int, float)):
            parts.append(f"{name} {float(value):.4g}")
    return ", ".join(parts)
