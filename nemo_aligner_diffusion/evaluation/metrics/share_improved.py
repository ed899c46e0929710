"""On how many of the validation pictures the tuned model scores higher than the base model."""

from __future__ import annotations

from nemo_aligner_diffusion.evaluation.curves import Curve
from nemo_aligner_diffusion.evaluation.metrics.base import Finding, Pictures, Tile, ValidationMetric
from nemo_aligner_diffusion.evaluation.run_files import RunFiles, Table, column, last


class ShareImproved(ValidationMetric):
    name, title, direction, order = "share_improved", "Pictures improved", "higher", 30
    unit = "share of all"
    from_zero = True
    main = False
    caption = "Validation pictures that score higher than the base model's of the same prompt and seed."

    def measure(self, base: Pictures, tuned: Pictures) -> dict[str, float | None]:
        better = sum(after > before for before, after in zip(base.rewards, tuned.rewards, strict=True))
        return {self.name: better / len(base.rewards)}

    def columns(self, table: Table) -> list[str]:
        return [self.name]

    def curves(self, run: RunFiles) -> list[Curve]:
        return [Curve("share", run.validation.get("step", []), column(run.validation, self.name), markers=True)]

    def tile(self, run: RunFiles) -> Tile | None:
        label, rows = "Tuned beats base on", run.prompt_rewards
        if not rows:
            share = last(column(run.validation, self.name))
            return None if share is None else Tile(label, f"{share:.0%}", "of the validation pictures")
        better = sum(row["reward"] > row["base_reward"] for row in rows)
        under = f"{better} of {len(rows)} validation pictures"
        gains: dict[str, list[float]] = {}
        for row in rows:
            gains.setdefault(row["prompt"], []).append(row["reward"] - row["base_reward"])
        if len(gains) < len(rows):  # several seeds a prompt
            under += f"; {sum(sum(gain) > 0 for gain in gains.values())} of {len(gains)} prompts on average"
        return Tile(label, f"{better / len(rows):.0%}", under)

    def findings(self, run: RunFiles) -> list[Finding]:
        rows = run.prompt_rewards
        end, start = last(column(run.validation, "reward")), last(column(run.validation, "base_reward"))
        if not rows or (end is not None and start is not None and end <= start):
            return []
        share = sum(row["reward"] > row["base_reward"] for row in rows) / len(rows)
        if share >= 0.5:
            return []
        text = "A mean that rises on few prompts is a gain in these alone: see the list of prompts below."
        return [Finding("warning", f"Only {share:.0%} of the validation pictures improved", text)]
