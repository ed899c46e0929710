"""How much of the base model's picture is left: the other end of what the reward gains."""

from __future__ import annotations

from nemo_aligner_diffusion.evaluation.metrics.base import Pictures, ValidationMetric


class SimilarityToBase(ValidationMetric):
    name, title, order = "similarity_to_base", "Similarity to the base model's pictures", 34
    caption = "Mean cosine in CLIP's image space, same prompt and seed. 1: nothing has changed."

    def measure(self, base: Pictures, tuned: Pictures) -> dict[str, float | None]:
        if base.embeddings is None or tuned.embeddings is None:
            return {}
        return {self.name: float((base.embeddings * tuned.embeddings).sum(-1).mean())}
