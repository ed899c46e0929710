"""Whether a picture shows something, by an open-vocabulary detector: to add an object, or to remove one.

OWL-ViT (Minderer et al. 2022, arXiv 2205.06230) and OWLv2 (Minderer et al. 2023, arXiv 2306.09683) give each field of
the picture a logit of its box showing the queried thing. DRaFT (Clark et al. 2024, arXiv 2309.17400) raises or lowers
such a detector's score.

The score here is ``log σ(m)`` to add, ``log σ(−m)`` to remove, with ``m = τ·log Σ_box exp(logit_box / τ)``, a maximum
over the boxes that is smooth:

- The maximum itself would tell one box alone; when removing, each step would push the box that is ahead and let the
  next one through. With τ > 0 boxes that are close to the best share the gradient.
- The probability itself, ``σ(m)``, has no slope where the object is surely absent, which is where adding begins. Its
  logarithm has slope 1 there, and levels off once the detector is sure: there is nothing to be gained from pushing on.
- To remove, the logarithm of the probability that the object is *absent*, not the negative of the former, which would
  grow without bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from nemo_aligner_diffusion.errors import RewardError
from nemo_aligner_diffusion.rewards.settings import HuggingFaceSettings
from nemo_aligner_diffusion.settings import BOOL, Kind, number, setting

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Detection(HuggingFaceSettings):
    """See the module; at most 0. A temperature of 0 is the plain maximum."""

    name = "detection"
    auto_class = "AutoModelForZeroShotObjectDetection"
    what = "an open-vocabulary detector"
    model_types = ("owlvit", "owlv2")
    reads_prompts = True
    needs: ClassVar = {"from_pretrained": "google/owlv2-base-patch16-ensemble"}

    query: str | None = setting(
        None, Kind("text", nullable=True), 'what to look for, such as "a cat"; text, null: each picture\'s prompt'
    )
    remove: bool = setting(False, BOOL, "reward its absence; true or false")
    temperature: float = setting(
        0.1, number(0), "of the maximum over boxes, in logits: boxes this close to the best count too; >= 0"
    )

    def describe(self) -> str:
        return f"{'the absence of ' if self.remove else ''}{self.query or 'what the prompt names'}, by a detector"

    def setup(self, network: Any) -> None:
        if self.query is not None and not self.query.strip():
            raise RewardError("A detector's query is empty; expected what to look for, or null for each prompt.")
        network.towers = getattr(network.model, network.model.config.model_type)

    def texts(self, prompts: Sequence[str]) -> Sequence[str]:
        return prompts if self.query is None else [self.query] * len(prompts)

    def embed(self, network: Any, prompt: str) -> Tensor:
        import torch

        text = network.towers.text_projection(network.towers.text_model(**network.tokens(prompt)).pooler_output)
        row: Tensor = (text / torch.linalg.norm(text, dim=-1, keepdim=True))[0]
        return row

    def box_logits(self, network: Any, images: Tensor, rows: Tensor) -> Tensor:
        """The logit of each box ``(B, boxes)``, as the model's own forward pass gives it."""
        from nemo_aligner_diffusion.rewards.base import wide

        features = network.model.image_embedder(pixel_values=network.pixels(images))[0]
        return wide(network.model.class_predictor(features.flatten(1, 2), rows.unsqueeze(1))[0].squeeze(-1))

    def score(self, network: Any, images: Tensor, *rows: Tensor) -> Tensor:
        from torch.nn import functional

        logits = self.box_logits(network, images, *rows)
        if self.temperature:
            best = self.temperature * (logits / self.temperature).logsumexp(dim=1)
        else:
            best = logits.amax(dim=1)
        return functional.logsigmoid(-best if self.remove else best)
