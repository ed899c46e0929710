"""Most memory held so far."""

from __future__ import annotations

import contextlib
import math
import resource
import sys
from pathlib import Path
from typing import Any

from nemo_aligner_diffusion.evaluation.metrics.base import Step, Tile, TrainingMetric
from nemo_aligner_diffusion.evaluation.run_files import RunFiles


class PeakMemory(TrainingMetric):
    name, title, unit, direction, order = "peak_memory_bytes", "Peak memory", "GiB", "lower", 90
    colour = "second"
    from_zero = True
    noisy = False
    main = False
    caption = "Of the first process: allocated by torch on a GPU, resident on a CPU."

    def measure(self, step: Step) -> float:
        return peak_memory_bytes(step.device)

    def values(self, run: RunFiles) -> list[float]:
        return [value / 2**30 for value in super().values(run)]

    def tile(self, run: RunFiles) -> Tile | None:
        peak = max((value for value in self.values(run) if math.isfinite(value)), default=None)
        return None if peak is None else Tile(self.title, f"{peak:.2f} GiB")


def peak_memory_bytes(device: Any = "cpu") -> int:
    """Most memory held so far: allocated by torch on a CUDA device, else resident in this process."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError):  # of this program alone; Linux's ru_maxrss is also that of who started it
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
