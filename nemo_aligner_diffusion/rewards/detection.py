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

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from nemo_aligner_diffusion.errors import RewardError
from nemo_aligner_diffusion.rewards.base import Reward
from nemo_aligner_diffusion.rewards.image_processor import ImageProcessor
from nemo_aligner_diffusion.rewards.micro_batches import check_micro_batch_size, in_micro_batches, own_precision
from nemo_aligner_diffusion.rewards.pretrained import existing_source, load_model, load_processor
from nemo_aligner_diffusion.rewards.truncation import TruncationCounter

MODEL_TYPES = ("owlvit", "owlv2")
_TEXT_CACHE_SIZE = 4096
_Self = TypeVar("_Self", bound="DetectionReward")


class DetectionReward(Reward):
    """See the module; at most 0.

    Args:
        model: transformers' ``OwlViTForObjectDetection`` or ``Owlv2ForObjectDetection``; frozen in place.
        tokenizer: the model's.
        processor: what the model does to a picture first.
        query: what to look for, such as ``a cat``; ``None``: each picture's own prompt.
        remove: reward its absence.
        temperature: τ, in logits, ≥ 0; 0 is the plain maximum.
        micro_batch_size, activation_checkpointing: see :mod:`.micro_batches`.
    """

    name = "detection"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        processor: ImageProcessor,
        query: str | None = None,
        *,
        remove: bool = False,
        temperature: float = 0.1,
        micro_batch_size: int | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_micro_batch_size(micro_batch_size)
        if not temperature >= 0:
            raise RewardError(f"A detector's temperature is {temperature}; expected a number >= 0.")
        if query is not None and not query.strip():
            raise RewardError("A detector's query is empty; expected what to look for, or null for each prompt.")
        self.model = model
        self.tokenizer = tokenizer
        self.processor = processor
        self.query = query
        self.remove = remove
        self.temperature = float(temperature)
        self.max_length: int = model.config.text_config.max_position_embeddings
        self.micro_batch_size = micro_batch_size
        self.activation_checkpointing = activation_checkpointing
        self.truncated = TruncationCounter(self.max_length)
        self._query_cache: dict[str, Tensor] = {}
        self.freeze()

    @classmethod
    def from_pretrained(
        cls, source: str | Path, query: str | None = None, where: str = "rm.model.from_pretrained", **settings: Any
    ) -> DetectionReward:
        """From a folder or hub id such as ``google/owlv2-base-patch16-ensemble``; ``settings`` are the constructor's.

        Raises:
            RewardError: there is no such detector, or it is of another kind.
        """
        from transformers import AutoConfig, AutoModelForZeroShotObjectDetection, AutoTokenizer

        source = existing_source(source, where)
        config = load_processor(AutoConfig, source, where, "a detector's configuration")
        if config.model_type not in MODEL_TYPES:
            raise RewardError(
                f"{where} = {source!r} is a model of type {config.model_type!r}; expected one of "
                f"{', '.join(MODEL_TYPES)}, such as google/owlv2-base-patch16-ensemble."
            )
        model = load_model(AutoModelForZeroShotObjectDetection, source, where, "an open-vocabulary detector")
        tokenizer = load_processor(AutoTokenizer, source, where, "its tokenizer")
        return cls(model, tokenizer, ImageProcessor.from_pretrained(source, where), query, **settings)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        logits = self.box_logits(images, prompts)
        if self.temperature:
            best = self.temperature * torch.logsumexp(logits / self.temperature, dim=1)
        else:
            best = logits.amax(dim=1)
        return functional.logsigmoid(-best if self.remove else best)

    def box_logits(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The logit of each box ``(B, boxes)``, as the model's own forward pass gives it."""
        first = next(self.model.parameters())
        with own_precision(first.device.type):
            return in_micro_batches(
                self._box_logits,
                images.to(first.device),
                self._embed_queries([self.query] * len(prompts) if self.query is not None else prompts),
                micro_batch_size=self.micro_batch_size,
                activation_checkpointing=self.activation_checkpointing,
            )

    def _box_logits(self, images: Tensor, queries: Tensor) -> Tensor:
        features = self.model.image_embedder(pixel_values=self.processor(images).to(queries.dtype))[0]
        logits = self.model.class_predictor(features.flatten(1, 2), queries.unsqueeze(1))[0].squeeze(-1)
        return logits if logits.dtype == torch.float64 else logits.float()

    def _embed_queries(self, queries: Sequence[str]) -> Tensor:
        """``(B, D)``, without gradient, of length 1; kept, and embedded one at a time so that a query's last digits do
        not depend on its neighbours."""
        device = next(self.model.parameters()).device
        rows: dict[str, Tensor] = {}
        with torch.inference_mode(False), torch.no_grad():
            for query in dict.fromkeys(queries):
                if query in self._query_cache:
                    rows[query] = self._query_cache[query]
                    continue
                tokens = self._tokenize(query).to(device)
                text = self._towers.text_projection(self._towers.text_model(**tokens).pooler_output)
                rows[query] = (text / torch.linalg.norm(text, dim=-1, keepdim=True))[0]
        if len(self._query_cache) + len(rows) > _TEXT_CACHE_SIZE:
            self._query_cache.clear()
        self._query_cache.update(rows)
        return torch.stack([rows[query] for query in queries])

    def _tokenize(self, query: str) -> Any:
        tokens = self.tokenizer(
            query, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        if bool(tokens.attention_mask.all()) and len(self.tokenizer(query).input_ids) > self.max_length:
            self.truncated.count(query)
        return tokens

    @property
    def _towers(self) -> Any:
        return self.model.owlv2 if self.model.config.model_type == "owlv2" else self.model.owlvit

    def _apply(self: _Self, fn: Callable[..., Any], recurse: bool = True) -> _Self:
        self._query_cache.clear()  # the rows stay behind on the old device, in the old dtype
        return super()._apply(fn, recurse)
