"""Distance of the tuned model's predictions from the base model's."""

from __future__ import annotations

import math
from statistics import fmean

from nemo_aligner_diffusion.evaluation.metrics.base import ENOUGH_ROWS, Finding, Tile, TrainingMetric
from nemo_aligner_diffusion.evaluation.run_files import RunFiles, column, last
from nemo_aligner_diffusion.evaluation.text import format_number


class KLPenalty(TrainingMetric):
    name, title, direction, order = "kl_penalty", "KL penalty", "lower", 40
    colour = "second"
    from_zero = True
    caption = "Squared distance of the tuned model's predictions from the base model's"

    def describe(self, run: RunFiles) -> str:
        space = run.setting("model.kl_space") or "epsilon (velocity, where the model is a flow)"
        coefficient = run.setting("model.kl_coeff", "not recorded")
        return f"{self.caption}, measured in {space}, before its coefficient ({coefficient})."

    def tile(self, run: RunFiles) -> Tile | None:
        value = last(self.values(run))
        if not value:  # 0 throughout without the penalty: then it was not measured
            return None
        return Tile(self.title, format_number(value), f"last step, coefficient {run.setting('model.kl_coeff', '–')}")

    def findings(self, run: RunFiles) -> list[Finding]:
        """Reward bought by KL in the last third of the run, against the first two."""
        every = zip(column(run.metrics, "reward"), self.values(run), strict=False)
        rows = [row for row in every if all(map(math.isfinite, row))]
        if len(rows) < ENOUGH_ROWS or max(kl for _, kl in rows) <= 0:
            return []
        sixth = max(2, len(rows) // 6)
        middle = len(rows) * 2 // 3 - sixth // 2
        parts = rows[:sixth], rows[middle : middle + sixth], rows[-sixth:]
        start, knee, end = [[fmean(values) for values in zip(*part, strict=True)] for part in parts]  # reward, KL
        gain, cost = knee[0] - start[0], knee[1] - start[1]
        late_gain, late_cost = end[0] - knee[0], end[1] - knee[1]
        if min(gain, cost) <= 0 or late_cost < 0.3 * cost or late_gain / late_cost > gain / cost / 4:
            return []
        before, after = ((format_number(r), format_number(kl)) for r, kl in ((gain, cost), (late_gain, late_cost)))
        text = (
            f"There the reward rose by {after[0]} for a distance from the base model (KL) of {after[1]}; before, by "
            f"{before[0]} for {before[1]}. Look at the pictures: the model may be leaving what the reward measures "
            "well. An earlier checkpoint or a larger model.kl_coeff may serve you better."
        )
        return [Finding("warning", "The last third of the run is bought dearly", text)]
