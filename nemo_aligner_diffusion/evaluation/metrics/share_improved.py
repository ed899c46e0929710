"""On how many of the validation pictures the tuned model scores higher than the base model."""

from __future__ import annotations

from nemo_aligner_diffusion.evaluation.metrics.base import Finding, Pictures, Tile, ValidationMetric
from nemo_aligner_diffusion.evaluation.metrics.validation_reward import ValidationReward
from nemo_aligner_diffusion.evaluation.run_files import RunFiles


class ShareImproved(ValidationMetric):
    name, title, direction, order = "share_improved", "Pictures improved", "higher", 30
    unit = "share of all"
    from_zero = True
    main = False
    of_rewards = True
    caption = "Validation pictures that score higher than the base model's of the same prompt and seed."

    def measure(self, base: Pictures, tuned: Pictures) -> dict[str, float | None]:
        better = sum(after > before for before, after in zip(base.rewards, tuned.rewards, strict=True))
        return {self.name: better / len(base.rewards)}

    def tile(self, run: RunFiles) -> Tile | None:
        share, _ = self.ends(run)
        return None if share is None else Tile("Tuned beats base on", f"{share:.0%}", "of the validation pictures")

    def findings(self, run: RunFiles) -> list[Finding]:
        share, _ = self.ends(run)
        tuned, base = ValidationReward().ends(run)
        if share is None or share >= 0.5 or tuned is None or base is None or tuned <= base:
            return []
        text = "A mean that rises on few prompts is a gain in these alone: see the list of prompts below."
        return [Finding("warning", f"Only {share:.0%} of the validation pictures improved", text)]
