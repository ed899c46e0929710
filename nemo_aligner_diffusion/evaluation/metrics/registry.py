"""Finds the metrics: every module of this package is looked through, so that a new one is a new file. No torch."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from nemo_aligner_diffusion.evaluation.metrics.base import (
    Metric,
    Pictures,
    Step,
    TrainingMetric,
    ValidationMetric,
)

if TYPE_CHECKING:
    from nemo_aligner_diffusion.algorithms.picture_validation import ValidationPictures

_PACKAGE = "nemo_aligner_diffusion.evaluation.metrics"
_Kind = TypeVar("_Kind", bound=Metric)


@functools.cache
def metrics() -> tuple[Metric, ...]:
    """One of each, by :attr:`.Metric.order`, then by name."""
    found = []
    for module in pkgutil.iter_modules(importlib.import_module(_PACKAGE).__path__):
        path = f"{_PACKAGE}.{module.name}"
        for entry in vars(importlib.import_module(path)).values():
            if isinstance(entry, type) and issubclass(entry, Metric) and entry.__module__ == path and entry.name:
                found.append(entry())
    return tuple(sorted(found, key=lambda metric: (metric.order, metric.name)))


def of_kind(kind: type[_Kind]) -> list[_Kind]:
    return [metric for metric in metrics() if isinstance(metric, kind)]


def training_columns() -> list[str]:
    """The columns that ``metrics.csv`` has in every run."""
    return ["step", *(metric.name for metric in of_kind(TrainingMetric))]


def training_figures(step: Step) -> dict[str, Any]:
    """A row of ``metrics.csv``: the metrics, then what else the training step reported."""
    measured = {metric.name: metric.measure(step) for metric in of_kind(TrainingMetric)}
    return {**measured, **{name: value for name, value in step.reported.items() if name not in measured}}


def validation_figures(pictures: ValidationPictures, embedder: Any = None) -> dict[str, float]:
    """A row of ``validation.csv``; what cannot be measured is left out."""
    base = Pictures(pictures.base, pictures.prompts, pictures.seeds, pictures.base_rewards, embedder)
    tuned = Pictures(pictures.tuned, pictures.prompts, pictures.seeds, pictures.tuned_rewards, embedder)
    rows: list[Mapping[str, float | None]] = [metric.measure(base, tuned) for metric in of_kind(ValidationMetric)]
    return {name: value for row in rows for name, value in row.items() if value is not None}
