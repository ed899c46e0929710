"""Reward on fixed prompts and seeds, base against tuned."""

from __future__ import annotations

import math

from nemo_aligner_diffusion.evaluation.metrics.base import Finding, Pictures, Tile, ValidationMetric
from nemo_aligner_diffusion.evaluation.run_files import RunFiles, column
from nemo_aligner_diffusion.evaluation.text import format_gain, format_number


class ValidationReward(ValidationMetric):
    name, title, direction, order = "reward", "Validation reward", "higher", 10
    of_rewards = True
    caption = "Fixed prompts and seeds: the same noise for both models."

    def of(self, pictures: Pictures) -> float:
        return sum(pictures.rewards) / len(pictures.rewards)

    def describe(self, run: RunFiles) -> str:
        return self.caption

    def tile(self, run: RunFiles) -> Tile | None:
        tuned, base = self.ends(run)
        if tuned is None or base is None:
            return None
        kind = "gain" if tuned > base else "loss" if tuned < base else "quiet"
        value = f"{format_number(base)} → {format_number(tuned)}"
        return Tile(self.title, value, "on fixed prompts and seeds", format_gain(tuned - base, tuned), kind)

    def findings(self, run: RunFiles) -> list[Finding]:
        found = []
        end, start = self.ends(run)
        if end is None or start is None:
            return []
        if end < start:
            made_of = "pairs" if "pairs" in run.metrics else "pictures"
            text = (
                f"Validation reward {format_number(end)}, by {format_number(start - end)} below the base model's. A "
                f"smaller learning rate, or more {made_of} a step (model.global_batch_size), usually helps."
            )
            found.append(Finding("warning", "The tuned model scores below the base model", text))
        tuned = column(run.validation, self.name)
        finite = [value for value in tuned if math.isfinite(value)]
        best = max(finite)
        if len(finite) >= 3 and best > start and best - end > 0.25 * (best - start):
            step = run.validation["step"][tuned.index(best)] if "step" in run.validation else math.nan
            text = (
                f"It was {format_number(best)} at step {step:.0f} and is {format_number(end)} now: more than a "
                "quarter of the gain is lost. Take an earlier checkpoint, or a smaller learning rate."
            )
            found.append(Finding("warning", "The reward has fallen from its best value", text))
        return found
