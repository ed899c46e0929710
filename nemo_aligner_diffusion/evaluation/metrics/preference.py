"""Learning from pairs: what users of DPO look at."""

from __future__ import annotations

import math

from nemo_aligner_diffusion.algorithms.preference.watch import WINDOW, both_rise
from nemo_aligner_diffusion.evaluation.curves import Curve
from nemo_aligner_diffusion.evaluation.metrics.base import Chart, Finding, Tile, TrainingMetric
from nemo_aligner_diffusion.evaluation.metrics.images_per_second import ImagesPerSecond
from nemo_aligner_diffusion.evaluation.run_files import RunFiles
from nemo_aligner_diffusion.evaluation.text import format_number


class ImplicitAccuracy(TrainingMetric):
    name, title, direction, order = "implicit_accuracy", "Implicit accuracy", "higher", 22
    unit = "share of a step's pairs"
    caption = "Pairs whose winner the tuned model has come closer to than their loser (a tie counts half)."

    def tile(self, run: RunFiles) -> Tile | None:
        return self.ends_tile(run, "{:.0%}".format)


class ImplicitMargin(TrainingMetric):
    name, title, direction, order = "implicit_margin", "Implicit margin", "higher", 24
    colour = "second"
    caption = "Mean argument of σ in the loss, 0 for the base model."


class WinnerError(TrainingMetric):
    name, title, direction, order = "winner_error", "Denoising error against the base model's", "lower", 26
    caption = (
        "Of winners and of losers apart; below 0: the tuned model denoises them better. The winners' should be below "
        "the losers'; if both rise, it forgets them alike."
    )

    def charts(self, run: RunFiles) -> list[Chart]:
        steps = run.metrics.get("step", [])
        curves = [
            Curve(label, steps, run.metrics.get(name, []), colour, smooth=True)
            for label, name, colour in (("winners", self.name, "tuned"), ("losers", "loser_error", "second"))
        ]
        return [Chart(self.title, curves, self.caption)]

    def findings(self, run: RunFiles) -> list[Finding]:
        pairs = zip(self.values(run), run.metrics.get("loser_error", []), strict=False)
        rows = [row for row in pairs if all(map(math.isfinite, row))]
        if not rows or not both_rise(*zip(*rows, strict=True)):
            return []
        winner, loser = (sum(values[-WINDOW:]) / WINDOW for values in zip(*rows, strict=True))
        text = (
            f"Over the last {WINDOW} steps the tuned model's denoising errors are above the base model's by "
            f"{format_number(winner)} (winners) and {format_number(loser)} (losers), both more than over the {WINDOW} "
            "steps before: the known disease of learning from preferences. A smaller model.optim.lr, a larger β, or an "
            "earlier checkpoint may help; look at the pictures."
        )
        return [Finding("warning", "Winners and losers are denoised worse and worse", text)]


class LoserError(TrainingMetric):
    name, title, order = "loser_error", "Denoising error of losers against the base model's", 27

    def charts(self, run: RunFiles) -> list[Chart]:
        return []  # in that of the winners


class GradientWeight(TrainingMetric):
    name, title, order = "gradient_weight", "Gradient weight", 42
    colour = "third"
    from_zero = True
    main = False
    caption = "Mean of |∂loss/∂(Δ winner − Δ loser)|: how much a pair's errors count."

    def charts(self, run: RunFiles) -> list[Chart]:
        levels = run.levels
        seen = [
            row for row in zip(*(levels.get(name, []) for name in ("t", "pairs", self.name)), strict=False) if row[1]
        ]
        by_level = [
            Curve(self.title, [t for t, *_ in seen], [weight for *_, weight in seen], self.colour, markers=True)
        ]
        caption = "Mean over the run's pairs, by the noise level t that they were trained at; noise grows to the right."
        return [
            *super().charts(run),
            Chart("Gradient weight by noise level", by_level, caption, from_zero=True, x_label="noise level t"),
        ]


class PairsPerSecond(ImagesPerSecond):
    name, title, order = "pairs_per_second", "Pairs per second", 81
    needs = "pairs"
