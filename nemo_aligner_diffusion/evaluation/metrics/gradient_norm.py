"""Norm of the gradient of all trained parameters, before it is clipped."""

from __future__ import annotations

import math
from statistics import median

from nemo_aligner_diffusion.evaluation.metrics.base import ENOUGH_ROWS, Finding, TrainingMetric
from nemo_aligner_diffusion.evaluation.run_files import RunFiles
from nemo_aligner_diffusion.evaluation.text import format_number


class GradientNorm(TrainingMetric):
    name, title, order = "grad_norm", "Gradient norm", 50
    colour = "third"
    log = from_zero = True
    caption = "Before clipping."

    def findings(self, run: RunFiles) -> list[Finding]:
        norms = [value for value in self.values(run) if math.isfinite(value)]
        if len(norms) < ENOUGH_ROWS:
            return []
        tail = median(norms[-max(3, len(norms) // 10) :])
        usual = median(norms[: len(norms) * 2 // 3])
        if usual <= 0 or tail < 10 * usual:
            return []
        text = (
            f"Their norm is now {format_number(tail)}, {tail / usual:.0f} times what was usual before: training is "
            "about to become unstable. Use a smaller learning rate, fewer active steps, or a lower gradient_clip_val."
        )
        return [Finding("warning", "Gradients are growing", text)]
