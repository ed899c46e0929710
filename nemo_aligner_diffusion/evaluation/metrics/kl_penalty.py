"""Distance of the tuned model's predictions from the base model's."""

from __future__ import annotations

import math

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
        """KL bought per unit of reward, last third of the run against the first two."""
        pairs = [
            (reward, kl)
            for reward, kl in zip(column(run.metrics, "reward"), self.values(run), strict=False)
            if math.isfinite(reward) and math.isfinite(kl)
        ]
        if len(pairs) < ENOUGH_ROWS or max(kl for _, kl in pairs) <= 0:
            return []
        sixth = max(2, len(pairs) // 6)

        def mean(part: list[tuple[float, float]], which: int) -> float:
            return sum(pair[which] for pair in part) / len(part)

        middle = len(pairs) * 2 // 3
        start, knee, end = pairs[:sixth], pairs[middle - sixth // 2 : middle - sixth // 2 + sixth], pairs[-sixth:]
        gains = mean(knee, 0) - mean(start, 0), mean(end, 0) - mean(knee, 0)
        costs = mean(knee, 1) - mean(start, 1), mean(end, 1) - mean(knee, 1)
        if costs[1] <= 0 or costs[0] <= 0 or gains[0] <= 0 or costs[1] < 0.3 * costs[0]:
            return []
        if gains[1] > 0:
            factor = (costs[1] / gains[1]) / (costs[0] / gains[0])
            bought = f"cost {factor:.0f} times as much distance from the base model (KL) as before"
        else:
            factor, bought = math.inf, "brought no reward while the distance from the base model (KL) still grew"
        if factor < 4:
            return []
        text = (
            f"A further gain in reward {bought}. Look at the pictures: the model may be leaving what the reward "
            "measures well. An earlier checkpoint or a larger model.kl_coeff may serve you better."
        )
        return [Finding("warning", "The last third of the run is bought dearly", text)]
