"""A user's reward that, on one rank and at one of its calls, does what the word says; else the pictures' mean."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import torch


class FaultyReward:
    """Args:
    what: ``raise``, ``kill``, ``stop``, ``exit``, ``loop`` or nothing.
    rank, at: where, and at which of its calls.
    once: a file that is made with the fault, holds its moment (monotonic seconds), and prevents a second one.
    """

    def __init__(self, what: str = "", rank: int = 1, at: int = 1, once: str | None = None) -> None:
        self.what, self.at, self.once, self.calls = what, at, Path(once) if once else None, 0
        self.here = int(os.environ.get("RANK", 0)) == rank

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        self.calls += 1
        if self.what and self.here and self.calls == self.at and not (self.once and self.once.exists()):
            if self.once:
                self.once.write_text(str(time.monotonic()))
            self.fault()
        return images.mean(dim=(1, 2, 3)) - images[..., ::4].mean(dim=(1, 2, 3)) ** 2

    def fault(self) -> None:
        if self.what == "raise":
            raise ValueError("this reward has had enough")
        if self.what == "exit":
            os._exit(7)
        if self.what in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if self.what == "kill" else signal.SIGSTOP)
        while self.what == "loop":
            time.sleep(0.01)
