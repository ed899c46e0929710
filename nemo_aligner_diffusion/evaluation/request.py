"""What :mod:`.generation` is asked for. No torch here: the command line makes it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nemo_aligner_diffusion.diffusion.settings import SamplingSettings
from nemo_aligner_diffusion.errors import ConfigurationError


@dataclass(frozen=True)
class Adapter:
    """``--lora PATH[:weight]``."""

    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class Request:
    """The command line, checked. None: not given, so the run's own setting holds, without a run ``usual``."""

    prompts: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    model: Path | None = None
    unet: Path | None = None
    vae: Path | None = None
    text: Path | None = None
    adapters: list[Adapter] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    compare: bool = False
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    eta: float | None = None
    height: int | None = None
    width: int | None = None
    batch_size: int = 16
    device: str | None = None
    precision: str = "32"
    reward: str | None = None
    output: Path = Path("generated")
    overwrite: bool = False
    usual: SamplingSettings = field(default_factory=SamplingSettings)  # of the model's family


@dataclass(frozen=True)
class EvaluationRequest(Request):
    """What :mod:`.comparison` is asked for: each adapter is a model of its own, at each of the scales.

    Attributes:
        rewards: what ``--reward`` names, each a column.
        clip: whose embeddings diversity, CLIPScore and distances are of; None: the embedded reward's.
        real: folder of pictures that the Fréchet and kernel distances are taken to.
        shard: (number from 1, of how many): the pictures that this process makes; None: all, and the tables.
    """

    rewards: list[str] = field(default_factory=list)
    clip: Path | None = None
    real: Path | None = None
    shard: tuple[int, int] | None = None

    @property
    def pairs(self) -> Iterator[tuple[int, int]]:
        """(number of the prompt, seed), prompt by prompt."""
        return ((prompt, seed) for prompt in range(len(self.prompts)) for seed in self.seeds)


def annealed_weights(kind: str, steps: int) -> list[float]:
    """Annealed importance guidance (design notes 3.4): ``w_0 … w_{T−1}`` of ``w_i·e^tuned + (1−w_i)·e^base``.

    Args:
        kind: ``base`` (0), ``draft`` (1), ``linear`` (``i/T``), ``power_p`` (``(i/T)^p``, p > 0), or a number.
        steps: ``T``, the number of network calls.

    Raises:
        ConfigurationError: any other ``kind``.

    Example::

        annealed_weights("power_2", 4)  # [0.0, 0.0625, 0.25, 0.5625]
    """
    name = kind.strip().lower()
    name = {"base": "0", "draft": "1", "linear": "power_1"}.get(name, name)
    is_power = name.startswith("power_")
    try:
        value = float(name.removeprefix("power_"))
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (is_power and value <= 0):
        raise ConfigurationError(
            f"the guidance weight {kind!r} is unknown; expected base, draft, linear, power_P (a positive P, as in "
            "power_2) or a number"
        )
    return [(i / steps) ** value if is_power else value for i in range(steps)]
