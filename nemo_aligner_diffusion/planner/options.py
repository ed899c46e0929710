"""What a plan is asked for beside the configuration; ``nad-plan --help`` says what each means."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Options:
    model: str | None = None
    reward: str | None = None
    gpu: str = "h100-80gb"
    gpus_per_node: int | None = None
    layouts: bool = False
    tensor_sizes: tuple[int, ...] = (1, 2, 4, 8)
    sharding: bool = True
    attention: str = "auto"
    json: bool = False
