"""Small things every stage of the rebuild shares."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
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


class Training:
    """What the loops of all stages share: resuming, the optimizer's step, averaged weights, the log and checkpoints.

    Args:
        module: the module that learns; every parameter that requires a gradient does.
        optimizer: over these parameters; :meth:`update` sets its learning rate.
        average: the averaged weights of ``module``.
        checkpoint: resumable state; read here if it exists.
        log: where the mean loss goes, every 50 steps.
        steps: of the whole run.
        save_every: steps between two checkpoints; the last step saves too.
        clip: largest gradient norm.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        average: AveragedWeights,
        checkpoint: Path,
        log: Log,
        *,
        steps: int,
        save_every: int,
        clip: float = 1.0,
    ) -> None:
        self.module, self.optimizer, self.average = module, optimizer, average
        self.checkpoint, self.log, self.steps, self.save_every, self.clip = checkpoint, log, steps, save_every, clip
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.first = 0
        self.running = 0.0
        if checkpoint.is_file():
            state = torch.load(checkpoint, weights_only=True)
            module.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            average.load_state_dict(state["average"])
            self.first = state["step"]
        log(parameters=sum(p.numel() for p in module.parameters()), steps=steps, first=self.first)

    def generators(self, seed: int) -> Iterator[tuple[int, torch.Generator]]:
        """Every step still to do, with a generator that depends on nothing but ``seed`` and the step."""
        for step in range(self.first, self.steps):
            yield step, torch.Generator().manual_seed(seed * 1_000_003 + step)

    def update(self, step: int, rate: float, loss: torch.Tensor, penalty: torch.Tensor | float = 0.0) -> float:
        """One optimizer step down the gradient of ``loss + penalty``; gives the gradient's norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        (loss + penalty).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.clip)
        self.optimizer.step()
        self.running += loss.item()
        return norm.item()

    def record(self, step: int, **figures: float) -> None:
        """At the end of a step: average the weights, log and save where one is due."""
        self.average.update(self.module)
        if (step + 1) % 50 == 0:
            self.log(step=step + 1, loss=self.running / 50, **figures)
            self.running = 0.0
        if (step + 1) % self.save_every == 0 or step + 1 == self.steps:
            state = {"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict(), "step": step + 1}
            save_atomically({**state, "average": self.average.state_dict()}, self.checkpoint)


def warm_up_and_cosine(step: int, steps: int, warm_up: int, floor: float = 0.0) -> float:
    """Factor of the learning rate: a linear warm-up, half a cosine from 1 to 0 over ``steps``, plus ``floor``."""
    return min(1.0, (step + 1) / warm_up) * (0.5 * (1 + math.cos(math.pi * step / steps)) + floor)


def listed(text: str) -> tuple[str, ...]:
    """The entries of a comma-separated list that may run over several lines."""
    return tuple(" ".join(entry.split()) for entry in text.split(",") if entry.strip())
