"""A trace of some optimizer steps, for Perfetto or Nsight Systems; how to read it: docs/performance.md."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.autograd.profiler import emit_nvtx
from torch.profiler import ProfilerActivity, profile, record_function

from nemo_aligner_diffusion.errors import first_line
from nemo_aligner_diffusion.runtime.files import atomic_folder
from nemo_aligner_diffusion.training.callbacks.settings import ProfileSettings

log = logging.getLogger(__name__)


class Profile(pl.Callback):
    """Traces optimizer steps: ``run_dir/profile/steps_3_to_3_rank_0/`` with ``trace.json.gz`` (Chrome's format) and
    ``operators.txt``, whole or not at all; or, for Nsight Systems, only marks them.

    Ranges in either: ``backward`` and ``optimizer``, of this callback; ``rollout``, ``decode`` … of the code.
    """

    def __init__(self, settings: ProfileSettings, run_dir: Path) -> None:
        self.settings = settings
        self.folder = run_dir / "profile"
        self._first: int | None = None  # optimizer step, while tracing
        self._profiler: profile | None = None
        self._tracing = contextlib.ExitStack()
        self._range = contextlib.ExitStack()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        asked, step = self.settings, trainer.global_step + 1
        if self._first is None and asked.start_step <= step <= asked.end_step and trainer.global_rank in asked.ranks:
            self._first = step
            self._begin(trainer, pl_module.device.type == "cuda")

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Any) -> None:
        self._enter("backward")

    def on_after_backward(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._range.close()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self._enter("optimizer")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step >= self.settings.end_step:
            self._finish(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._finish(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._stop()

    def _begin(self, trainer: pl.Trainer, cuda: bool) -> None:
        for optimizer in trainer.optimizers:  # its step() has all of training_step inside, as a closure
            self._tracing.callback(optimizer.register_step_post_hook(lambda *_: self._range.close()).remove)
        asked = self.settings
        if asked.nsys and cuda:
            log.info("marked up to step %d for nsys profile -c cudaProfilerApi -t cuda,nvtx", asked.end_step)
            self._tracing.enter_context(torch.cuda.profiler.profile())
            self._tracing.enter_context(emit_nvtx(record_shapes=asked.shapes))
            return
        if asked.nsys:
            log.info("%s: there is no CUDA here; torch's profiler traces instead", asked.given("nsys"))
        on = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        traced = profile(activities=on, record_shapes=asked.shapes, profile_memory=asked.memory)
        self._profiler = self._tracing.enter_context(traced)

    def _enter(self, phase: str) -> None:
        if self._first is not None:
            self._range.enter_context(record_function(phase))

    def _stop(self) -> None:
        self._range.close()
        self._tracing.close()
        self._first = None

    def _finish(self, trainer: pl.Trainer) -> None:
        first, profiler, self._profiler = self._first, self._profiler, None
        if first is None:
            return
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # what was launched in these steps belongs to them
        self._stop()
        if profiler is None:
            return
        path = self.folder / f"steps_{first}_to_{max(first, trainer.global_step)}_rank_{trainer.global_rank}"
        try:
            with atomic_folder(path) as folder:
                folder.mkdir()
                profiler.export_chrome_trace(str(folder / "trace.json.gz"))
                (folder / "operators.txt").write_text(_operators(profiler), encoding="utf-8")
        except OSError as error:
            log.error("training goes on, but the trace %s could not be written: %s", path, first_line(error))
        else:
            log.info("trace: %s (open trace.json.gz in https://ui.perfetto.dev)", path)


def _operators(profiler: profile) -> str:
    """The ranges with their seconds, and the operators that take most time themselves."""
    averages = profiler.key_averages()
    lines = [f"{'range':40}{'calls':>8}{'host s':>10}{'device s':>10}"]
    for each in sorted(averages, key=lambda each: -each.cpu_time_total):
        if each.is_user_annotation:
            host, device = each.cpu_time_total / 1e6, each.device_time_total / 1e6
            lines.append(f"{each.key[:39]:40}{each.count:8d}{host:10.3f}{device:10.3f}")
    by = "self_device_time_total" if any(each.self_device_time_total for each in averages) else "self_cpu_time_total"
    return "\n".join(lines) + "\n\n" + averages.table(sort_by=by, row_limit=50)
