"""What :mod:`.generation` is asked for. No torch here: the command line makes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Adapter:
    """``--lora PATH[:weight]``."""

    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class Request:
    """The command line, checked. None: not given, so the run's own setting or the default holds."""

    prompts: list[str]
    seeds: list[int]
    model: Path | None
    unet: Path | None
    vae: Path | None
    adapters: list[Adapter]
    scales: list[float]
    weights: list[str]
    compare: bool
    steps: int | None
    guidance: float | None
    sampler: str | None
    eta: float | None
    height: int | None
    width: int | None
    batch_size: int
    device: str | None
    precision: str
    reward: str | None
    output: Path
    overwrite: bool
