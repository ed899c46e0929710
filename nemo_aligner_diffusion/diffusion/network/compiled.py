"""A network's calls through ``torch.compile``."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from nemo_aligner_diffusion.errors import ConfigurationError, first_line

log = logging.getLogger(__name__)


class Compiled:
    """``network``, compiled when it is first called; what else calls it is not.

    A graph is for one shape of batch, with gradient or without.

    Args:
        mode: of ``torch.compile``.
        key: by which it was asked for.

    Raises:
        ConfigurationError: no compiler here.
    """

    def __init__(self, network: torch.nn.Module, mode: str, key: str) -> None:
        _check_compiler(next(network.parameters()).device, key)
        self.key, self.has_cuda_graphs = key, mode in ("reduce-overhead", "max-autotune")
        self.network: Any = torch.compile(network, mode=mode, dynamic=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.timed():
            out = self.network(*args, **kwargs)
        if self.has_cuda_graphs:  # which write every call's output into the same memory
            out = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, out)
        return out

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Says how long a call took in which something was compiled."""
        from torch._dynamo.utils import counters

        before, started = counters["stats"]["unique_graphs"], time.perf_counter()
        yield
        if counters["stats"]["unique_graphs"] != before:
            log.info("%s: compiled in %.1f s", self.key, time.perf_counter() - started)


def _check_compiler(device: torch.device, key: str) -> None:
    if device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigurationError(
            f"{key} on a CPU needs a C++ compiler ({first_line(error)}); expected g++ to be installed, CXX to name "
            "another, or null"
        ) from error
