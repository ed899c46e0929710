"""Reward of the pictures that a step was made of; with its parts, where the reward has some."""

from __future__ import annotations

import re

from nemo_aligner_diffusion.evaluation.curves import Curve
from nemo_aligner_diffusion.evaluation.metrics.base import Chart, Tile, TrainingMetric, metrics
from nemo_aligner_diffusion.evaluation.run_files import RunFiles
from nemo_aligner_diffusion.evaluation.text import format_number

_COLOURS = ("tuned", "second", "third", "fourth", "base")


class TrainingReward(TrainingMetric):
    name, title, direction, order = "reward", "Training reward", "higher", 20
    caption = "Mean of the step's pictures. Pale: each step. Strong: running mean."

    def charts(self, run: RunFiles) -> list[Chart]:
        others = {metric.name for metric in metrics()}  # such as DDPO's reward_std
        parts = [name for name in run.metrics if re.match(r"reward[/_.]", name) and name not in others]
        curves = [
            Curve(name[len("reward") + 1 :], run.metrics["step"], run.metrics[name], colour, smooth=True)
            for name, colour in zip(parts, _COLOURS, strict=False)
        ]
        return [
            Chart(self.title, self.curves(run), self.caption),
            Chart("Parts of the reward", curves, "Before their weights."),
        ]

    def tile(self, run: RunFiles) -> Tile | None:
        return self.ends_tile(run, format_number)
