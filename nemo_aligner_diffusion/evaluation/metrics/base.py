"""What a metric is: its name, unit, direction, caption and computation, in one file of this package.

A class in such a file is found by :func:`metrics`, and by that alone stands in ``validation.csv`` or ``metrics.csv``,
TensorBoard, the progress line and the report's charts. Nothing here imports torch, nor may a metric's module do so
outside of its functions: the report needs none.

Example::

    class Brightness(ValidationMetric):
        name, title, unit = "brightness", "Brightness", "0 to 1"
        caption = "Mean value of all pixels."

        def of(self, pictures: Pictures) -> float:
            return float(pictures.images.mean())
"""

from __future__ import annotations

import functools
import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from nemo_aligner_diffusion.evaluation.curves import Curve
from nemo_aligner_diffusion.evaluation.run_files import RunFiles, column, last
from nemo_aligner_diffusion.evaluation.text import ends_of

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_aligner_diffusion.algorithms.picture_validation import ValidationPictures

_PACKAGE = "nemo_aligner_diffusion.evaluation.metrics"
ENOUGH_ROWS = 12  # fewer optimizer steps say nothing about a trend


@dataclass(frozen=True)
class Chart:
    """One figure of the report: the main ones first, the others (``main=False``) behind a click."""

    title: str
    curves: Sequence[Curve]
    caption: str = ""
    log: bool = False
    from_zero: bool = False
    main: bool = True
    x_label: str = "optimizer step"


@dataclass(frozen=True)
class Tile:
    """A figure at the head of the report; ``change`` is drawn in the colour of ``kind``: gain, loss or quiet."""

    label: str
    value: str
    under: str = ""
    change: str = ""
    kind: str = "quiet"


@dataclass(frozen=True)
class Finding:
    """One remark of the report: ``level`` is ``warning`` or ``note``."""

    level: str
    title: str
    text: str


class Metric(ABC):
    """Of a step or of a validation; see the two kinds below.

    Attributes:
        name: the column, and the tag in TensorBoard.
        title: of its chart.
        unit: of the figures as they are shown.
        direction: which is better; ``None``: neither.
        caption: what it measures, in a sentence.
        order: its place among the others in tables and on the page.
        colour, log, from_zero, main: how it is drawn: see :class:`.Curve` and :class:`Chart`.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    unit: ClassVar[str] = ""
    direction: ClassVar[Literal["higher", "lower"] | None] = None
    caption: ClassVar[str] = ""
    order: ClassVar[int] = 100
    colour: ClassVar[str] = "tuned"
    log: ClassVar[bool] = False
    from_zero: ClassVar[bool] = False
    main: ClassVar[bool] = True

    def describe(self, run: RunFiles) -> str:
        """The caption of the chart, with what the run's settings add to it."""
        better = f" {self.direction.capitalize()} is better." if self.direction else ""
        return self.caption + better

    @abstractmethod
    def curves(self, run: RunFiles) -> list[Curve]:
        """What its chart draws."""

    def charts(self, run: RunFiles) -> list[Chart]:
        """The report leaves out charts without a figure, or of zeros only."""
        title = f"{self.title}, {self.unit}" if self.unit else self.title
        return [Chart(title, self.curves(run), self.describe(run), self.log, self.from_zero, self.main)]

    def tile(self, run: RunFiles) -> Tile | None:
        """For the few that a reader wants to see first."""
        return None

    def findings(self, run: RunFiles) -> list[Finding]:
        """What a reader should be told without having to find it in the curve. Every rule is stated in its text."""
        return []


@dataclass(frozen=True)
class Step:
    """What is known when an optimizer step has ended.

    Attributes:
        reported: by the training step, where they arise: name -> mean over micro-batches and ranks.
        learning_rate: the one that the step was made with.
        seconds: since the step before; validation does not count.
        device: of the model.
    """

    reported: Mapping[str, float]
    learning_rate: float
    seconds: float
    device: Any


class TrainingMetric(Metric):
    """Measured at each optimizer step: what the training step reports under this name, or what ``measure`` returns.

    Attributes:
        needs: what of the training step's report it is made of; ``None``: what has its name, or with a ``measure`` of
            its own nothing.
        noisy: from step to step: the chart draws a running mean over it.
    """

    needs: ClassVar[str | None] = None
    noisy = True

    def measure(self, step: Step) -> float | None:
        return step.reported.get(self.name)

    def values(self, run: RunFiles) -> list[float]:
        return column(run.metrics, self.name)

    def ends_tile(self, run: RunFiles, shown: Callable[[float], str]) -> Tile | None:
        """Its mean over the first and over the last steps."""
        values = [value for value in self.values(run) if math.isfinite(value)]
        if not values:
            return None
        window = max(1, min(10, len(values) // 4))
        before, after = sum(values[:window]) / window, sum(values[-window:]) / window
        return Tile(self.title, f"{shown(before)} → {shown(after)}", ends_of(window))

    def curves(self, run: RunFiles) -> list[Curve]:
        return [Curve(self.title, run.metrics.get("step", []), self.values(run), self.colour, smooth=self.noisy)]


@dataclass(frozen=True)
class Pictures:
    """One model's pictures of the validation prompts; those of the other model have the same prompts and seeds.

    Attributes:
        images: ``(N, 3, H, W)`` in [0, 1] on the CPU; of a video ``(N, F, 3, H, W)``.
        prompts, seeds, rewards: of each picture.
        embedder: see :mod:`~nemo_aligner_diffusion.evaluation.diversity`; ``None`` where there is no CLIP.
    """

    images: Tensor
    prompts: Sequence[str]
    seeds: Sequence[int]
    rewards: Sequence[float]
    embedder: Any = None

    @functools.cached_property
    def embeddings(self) -> Tensor | None:
        """Unit length ``(N, D)`` in CLIP's image space; made once for all metrics. ``None`` without an embedder."""
        from nemo_aligner_diffusion.evaluation.diversity import embed_images

        return None if self.embedder is None else embed_images(self.embedder, self.images)


class ValidationMetric(Metric):
    """Measured on the validation pictures, on every rank alike; a subclass has ``of`` or ``measure``.

    Attributes:
        of_rewards: made of the pictures' rewards, so left out where there is no reward.
    """

    of_rewards: ClassVar[bool] = False

    def of(self, pictures: Pictures) -> float | None:
        """The figure of one model's pictures; ``None`` where it cannot be measured."""
        raise NotImplementedError

    def measure(self, base: Pictures, tuned: Pictures) -> dict[str, float | None]:
        """Column -> figure: ``of`` both models, or what compares them."""
        return {self.name: self.of(tuned), f"base_{self.name}": self.of(base)}

    def ends(self, run: RunFiles) -> tuple[float | None, float | None]:
        """The last figure of the tuned model and of the base model."""
        return last(column(run.validation, self.name)), last(column(run.validation, f"base_{self.name}"))

    def curves(self, run: RunFiles) -> list[Curve]:
        steps = run.validation.get("step", [])
        values = {"tuned": column(run.validation, self.name), "base": column(run.validation, f"base_{self.name}")}
        return [Curve(label, steps, of, label, markers=len(steps) <= 40) for label, of in values.items()]


_Kind = TypeVar("_Kind", bound=Metric)


@functools.cache
def metrics() -> tuple[Metric, ...]:
    """One of each, by :attr:`.Metric.order`, then by name: every module of the package is looked through."""
    found = []
    for module in pkgutil.iter_modules(importlib.import_module(_PACKAGE).__path__):
        path = f"{_PACKAGE}.{module.name}"
        for entry in vars(importlib.import_module(path)).values():
            if isinstance(entry, type) and issubclass(entry, Metric) and entry.__module__ == path and entry.name:
                found.append(entry())
    return tuple(sorted(found, key=lambda metric: (metric.order, metric.name)))


def of_kind(kind: type[_Kind]) -> list[_Kind]:
    return [metric for metric in metrics() if isinstance(metric, kind)]


def training_columns(reports: Collection[str] | None = None) -> list[str]:
    """The columns that ``metrics.csv`` begins with.

    Args:
        reports: names of what the training step reports; ``None``: of everything.
    """

    def reported(metric: TrainingMetric) -> bool:
        own = type(metric).measure is not TrainingMetric.measure
        return reports is None or (own and metric.needs is None) or (metric.needs or metric.name) in reports

    return ["step", *(metric.name for metric in of_kind(TrainingMetric) if reported(metric))]


def training_figures(step: Step) -> dict[str, Any]:
    """A row of ``metrics.csv``: the metrics that can be measured, then what else the training step reported."""
    measured = {metric.name: metric.measure(step) for metric in of_kind(TrainingMetric)}
    return {**step.reported, **measured}


def validation_figures(pictures: ValidationPictures, embedder: Any = None, rewarded: bool = True) -> dict[str, float]:
    """A row of ``validation.csv``; what cannot be measured is left out, without a reward what is made of rewards."""
    base = Pictures(pictures.base, pictures.prompts, pictures.seeds, pictures.base_rewards, embedder)
    tuned = Pictures(pictures.tuned, pictures.prompts, pictures.seeds, pictures.tuned_rewards, embedder)
    found = [metric for metric in of_kind(ValidationMetric) if rewarded or not metric.of_rewards]
    rows = [metric.measure(base, tuned) for metric in found]
    return {name: value for row in rows for name, value in row.items() if value is not None}
