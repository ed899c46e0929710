"""What each program of ``benchmarks.bench`` is made a worker by, in whichever environment.

A worker takes commands from standard input, one a line, and answers each by a line of JSON. ``step``: a training step,
``{"seconds": …, "phases": {phase: seconds}, "processor": seconds of all its threads, "peak": bytes}``; ``count``: one
in which nothing is computed twice, and ``{…, "operations": floating-point operations}``; ``validate``: ``{"reward":
mean of fixed pictures, "trained": number of parameters}``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# of this project only what an environment with other versions of diffusers and transformers can import
from nemo_aligner_diffusion.evaluation.metrics.peak_memory import peak_memory_bytes
from nemo_aligner_diffusion.planner.ledger import Ledger

PHASES = ("rollout", "decode + reward", "backward", "optimizer")


class Worker:
    """Waits for its turn; times what it does then. A phase ends where the next one begins."""

    def __init__(self, commands: Iterable[str], answer: Callable[[dict[str, Any]], None]) -> None:
        self._commands, self._answer = map(str.strip, commands), answer
        self._phase, self._since = "", 0.0  # none: no step is under way
        self._seconds: dict[str, float] = {}
        self._processor = 0.0
        self._ledger: Ledger | None = None

    @classmethod
    def on_standard_streams(cls) -> Worker:
        answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # what libraries print is no answer
        return cls(sys.stdin, lambda answer: print(json.dumps(answer), file=answers))

    def next_step(self, validate: Callable[[], dict[str, Any]]) -> bool:
        """End the step under way, and return where the next one begins: whether its operations are counted.

        Raises:
            SystemExit: there is none.
        """
        if self._phase:
            self.enter("")
            answer = {"seconds": sum(self._seconds.values()), "phases": self._seconds, "peak": peak_memory_bytes(),
                      "processor": time.process_time() - self._processor}  # fmt: skip
            if self._ledger is not None:
                self._ledger.__exit__(None, None, None)
                answer["operations"] = self._ledger.current.flops
            self._answer(answer)
        while (command := next(self._commands, None)) == "validate":
            self._answer(validate())
        if command is None:
            raise SystemExit
        self._ledger = Ledger() if command == "count" else None
        if self._ledger is not None:
            self._ledger.__enter__()
        self._seconds, self._processor = dict.fromkeys(PHASES, 0.0), time.process_time()
        self._phase, self._since = PHASES[0], time.perf_counter()
        return self._ledger is not None

    def enter(self, phase: str) -> None:
        """``phase``, of :data:`PHASES`, begins; outside of a step nothing does."""
        if self._phase:
            now = time.perf_counter()
            self._seconds[self._phase] += now - self._since
            self._phase, self._since = phase, now

    def watch(self, decoder: torch.nn.Module) -> None:
        """Tell from the VAE's decoder where decoding begins, and where the latent's gradient is there."""

        def begins(module: Any, args: tuple[Tensor, ...]) -> None:
            self.enter("decode + reward")
            if args[0].requires_grad:
                args[0].register_hook(lambda gradient: self.enter("backward"))

        decoder.register_forward_pre_hook(begins)


@torch.no_grad()
def mean_reward(
    prompts: list[str],
    pictures: Callable[[list[str], list[torch.Generator]], Tensor],
    reward: Callable[[Tensor, list[str]], Tensor],
) -> float:
    """Of a picture of each prompt, whose seed is its number."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return float(reward(pictures(prompts, generators), prompts).mean())
