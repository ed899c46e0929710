"""This machine's processors, planned for as a GPU is: ``nad-plan --gpu cpu``."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable

import torch

from nemo_aligner_diffusion.evaluation.metrics.peak_memory import peak_memory_bytes
from nemo_aligner_diffusion.planner.estimate import ASSUMED
from nemo_aligner_diffusion.planner.gpus import GPU
from nemo_aligner_diffusion.runtime.memory import free_memory

_SIDE = 1024  # of the matrices of the trial


def this_machine() -> GPU:
    """With the memory that is free now, and the rates of a trial of a second: those of its load now.

    What a training process holds beside its tensors is what this one holds once it has imported the same.
    """
    import nemo_aligner_diffusion.training.run  # noqa: F401

    flops = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        matrix = torch.ones(_SIDE, _SIDE, dtype=dtype)
        flops[name] = 2 * _SIDE**3 / _seconds(matrix.mm, matrix) / ASSUMED.matmul
    flops |= {"tf32": flops["fp32"], "fp64": flops["fp32"] / 2}
    block = torch.ones(16 * _SIDE**2)
    rate = 2 * block.nbytes / _seconds(block.clone) / ASSUMED.bandwidth
    return GPU("this machine's CPU", flops, free_memory() or math.inf, rate, rate, rate, peak_memory_bytes(), True)


def _seconds(work: Callable[..., object], *given: object) -> float:
    """The shortest of some calls."""
    times = [(time.perf_counter(), work(*given))[0] for _ in range(5)]
    return min(after - before for before, after in itertools.pairwise(times))
