"""How sharp and how saturated the pictures are: what a reward's gradient trades away first, and what it buys with."""

from __future__ import annotations

from nemo_aligner_diffusion.evaluation.metrics.base import Finding, Pictures, ValidationMetric
from nemo_aligner_diffusion.evaluation.run_files import RunFiles

KEPT = 0.9  # share of the base model's below which a run is said to blur
MOST = 1.3  # of the base model's, above which a run is said to shout


class Sharpness(ValidationMetric):
    name, title, direction, order = "sharpness", "Sharpness", "higher", 40
    unit = "mean |Laplacian| of lightness"
    from_zero = True
    main = False
    caption = (
        "How much neighbouring pixels differ. Blurred pictures have little of it; so do pictures of little detail."
    )

    def of(self, pictures: Pictures) -> float | None:
        from torch.nn.functional import pad

        grey = pictures.images.float().mean(-3)
        wide = pad(grey.flatten(0, -3).unsqueeze(1), (1, 1, 1, 1), mode="replicate").squeeze(1)
        neighbours = wide[:, :-2, 1:-1] + wide[:, 2:, 1:-1] + wide[:, 1:-1, :-2] + wide[:, 1:-1, 2:]
        return float((neighbours - 4 * wide[:, 1:-1, 1:-1]).abs().mean())

    def findings(self, run: RunFiles) -> list[Finding]:
        tuned, base = self.ends(run)
        if not base or tuned is None or tuned >= KEPT * base:
            return []
        text = f"Many rewards like soft pictures (the mark is {KEPT:.0%}). Stop earlier, or raise model.kl_coeff."
        return [Finding("warning", f"Sharpness fell to {tuned / base:.0%} of the base model's", text)]


class Saturation(ValidationMetric):
    name, title, order = "saturation", "Saturation", 41
    unit = "0 grey to 1"
    from_zero = True
    main = False
    caption = "Mean over pixels of the difference between their largest and smallest channel."

    def of(self, pictures: Pictures) -> float | None:
        images = pictures.images.float()
        return float((images.amax(-3) - images.amin(-3)).mean())

    def findings(self, run: RunFiles) -> list[Finding]:
        tuned, base = self.ends(run)
        if not base or tuned is None or tuned <= MOST * base:
            return []
        text = f"A reward may be buying its score with colour (the mark is {MOST:.0%}): look at the pictures."
        return [Finding("note", f"Saturation rose to {tuned / base:.0%} of the base model's", text)]
