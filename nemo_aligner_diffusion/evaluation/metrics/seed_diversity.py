"""How far apart the pictures of one prompt are: a model that gives one picture for all seeds has lost something."""

from __future__ import annotations

from nemo_aligner_diffusion.evaluation.metrics.base import Finding, Pictures, Tile, ValidationMetric
from nemo_aligner_diffusion.evaluation.run_files import RunFiles

KEPT = 0.8  # share of the base model's below which a run is said to have lost it


class SeedDiversity(ValidationMetric):
    name, title, direction, order = "diversity", "Diversity", "higher", 32
    from_zero = True
    caption = "Mean distance between pictures of one prompt with different seeds, in CLIP's image space."

    def of(self, pictures: Pictures) -> float | None:
        if pictures.embeddings is None or len(set(pictures.prompts)) == len(pictures.prompts):
            return None  # one seed
        from nemo_aligner_diffusion.evaluation.diversity import diversity

        return diversity(pictures.embeddings, pictures.prompts)

    def kept(self, run: RunFiles) -> float | None:
        """At the last validation, tuned divided by base; ``None`` where it was not measured."""
        tuned, base = self.ends(run)
        return tuned / base if tuned is not None and base else None

    def tile(self, run: RunFiles) -> Tile | None:
        kept = self.kept(run)
        return None if kept is None else Tile("Diversity kept", f"{kept:.0%}", "distance between seeds, tuned / base")

    def findings(self, run: RunFiles) -> list[Finding]:
        kept = self.kept(run)
        if kept is None or kept >= KEPT:
            return []
        text = (
            f"Pictures of one prompt with different seeds look more alike than before (the mark is {KEPT:.0%}). That "
            "is how a reward is hacked. Raise model.kl_coeff, stop earlier, or use the LoRA at a scale below 1."
        )
        return [Finding("warning", f"Diversity fell to {kept:.0%} of the base model's", text)]
