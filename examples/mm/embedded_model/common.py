"""Small things every stage of the rebuild shares."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch


def save_atomically(value: Any, path: Path) -> None:
    """``torch.save`` to a neighbour file, then rename: a reader or a killed run never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    torch.save(value, temporary)
    os.replace(temporary, path)


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 pictures to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """Pictures in [-1, 1] to uint8, clipped and rounded."""
    return ((images.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


class Log:
    """Appends one JSON object a line to ``path`` and prints it; ``seconds`` counts from this process's start."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.start = time.monotonic()

    def __call__(self, **values: Any) -> None:
        values = {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}
        line = json.dumps({**values, "seconds": round(time.monotonic() - self.start, 1)})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)


class AveragedWeights:
    """Exponential moving average of a module's parameters, with a warm-up so that early snapshots are usable.

    After ``n`` updates the decay is ``min(decay, (1 + n) / (10 + n))``.
    """

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.values = {name: value.detach().clone().float() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = module.state_dict()
        torch._foreach_lerp_(list(self.values.values()), [current[name].float() for name in self.values], 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        self.values = state["values"]


def listed(text: str) -> tuple[str, ...]:
    """The entries of a comma-separated list that may run over several lines."""
    return tuple(" ".join(entry.split()) for entry in text.split(",") if entry.strip())
