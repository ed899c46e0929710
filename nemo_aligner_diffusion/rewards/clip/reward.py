"""CLIP-family rewards: how well a picture fits its prompt, in the space of a contrastive model.

Scores (``cos`` is the cosine between the image and the text embedding): ``pickscore`` ``exp(logit_scale)·cos``
(Kirstain et al., 2023, arXiv 2305.01569), ``hps`` ``cos`` (HPSv2, Wu et al., 2023, arXiv 2306.09341), ``clipscore``
``2.5·max(cos, 0)`` (Hessel et al., 2021, arXiv 2104.08718).

Example::

    reward = restore_reward("reward.nemo", device="cuda")           # or CLIPReward(clip_model, tokenizer)
    reward(images, ["a red apple", "a blue car"]).mean().backward()  # images (2, 3, H, W) in [0, 1]
    reward.score_matrix(images, captions).argmax(dim=1)              # retrieval: the nearest caption of each picture
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_aligner_diffusion.errors import RewardError
from nemo_aligner_diffusion.rewards.base import ModelReward, unit_length
from nemo_aligner_diffusion.rewards.restore import SCORES
from nemo_aligner_diffusion.rewards.support.preprocessing import Preprocessing

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase


class CLIPReward(ModelReward):
    """A frozen :class:`transformers.CLIPModel` as a reward.

    Args:
        model: the CLIP model; frozen in place.
        tokenizer: gives token ids that end with the id at which the model pools its text.
        score: one of ``pickscore``, ``hps``, ``clipscore``.
        preprocessing: of pictures; OpenAI's for the model's size when left out.
        prompt_prefix: put before every prompt, e.g. ``"A photo depicts "``, the words CLIPScore was published with.
        max_length: tokens a prompt may have, both ends included; the model's own when left out.
        micro_batch_size, activation_checkpointing: of the vision tower, see :class:`.ModelReward`.
    """

    name = "clip"

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        score: str = "pickscore",
        preprocessing: Preprocessing | None = None,
        prompt_prefix: str = "",
        max_length: int | None = None,
        micro_batch_size: int | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        if score not in SCORES:
            raise RewardError(f"A CLIP reward scores by one of {', '.join(SCORES)}, not {score!r}.")
        config: Any = model.config
        most_tokens: int = config.text_config.max_position_embeddings
        super().__init__(
            model,
            tokenizer,
            max_length=min(max_length or most_tokens, most_tokens),
            micro_batch_size=micro_batch_size,
            activation_checkpointing=activation_checkpointing,
        )
        self.score_type = score
        self.preprocessing = preprocessing or Preprocessing(config.vision_config.image_size)
        self.prompt_prefix = prompt_prefix

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        image_embeddings = self.embed_images(images)
        cosine = (image_embeddings * self.embed_texts(prompts).to(image_embeddings.dtype)).sum(dim=-1)
        return self._from_cosine(cosine)

    def score_matrix(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The score of every image with every prompt, ``(images, prompts)``."""
        image_embeddings = self.embed_images(images)
        return self._from_cosine(image_embeddings @ self.embed_texts(prompts).to(image_embeddings.dtype).T)

    def embed_images(self, images: Tensor) -> Tensor:
        """Embeddings ``(B, D)`` of length 1 of images ``(B, 3, H, W)`` in ``[0, 1]``; differentiable."""
        return self.in_micro_batches(self._embed_pixels, self.preprocessing(images.to(self.device)))

    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings ``(B, D)`` of length 1, without gradient; cached per prompt, prompts over the limit truncated."""
        if not prompts:
            return torch.empty(0, self.model.visual_projection.out_features, device=self.device)
        return self.text_rows(self._embed_text, prompts, self.device)

    def _embed_pixels(self, pixels: Tensor) -> Tensor:
        pooled = self.model.vision_model(pixel_values=pixels.to(self.dtype)).pooler_output
        return unit_length(self.model.visual_projection(pooled))

    def _embed_text(self, prompt: str) -> Tensor:
        # Neither padding nor a mask: the text tower is causal and pools at the first end-of-text token.
        ids = torch.tensor([self.tokenize(prompt)], device=self.device)
        return unit_length(self.model.text_projection(self.model.text_model(input_ids=ids).pooler_output))[0]

    def tokenize(self, prompt: str) -> list[int]:
        """The ids of ``prompt_prefix`` and prompt, at most ``max_length`` of them."""
        ids: list[int] = self.tokenized(self.prompt_prefix + prompt).input_ids
        return ids

    def _from_cosine(self, cosine: Tensor) -> Tensor:
        if self.score_type == "pickscore":
            scale: Tensor = self.model.logit_scale.to(cosine.dtype).exp()
            return scale * cosine
        return cosine if self.score_type == "hps" else 2.5 * cosine.clamp(min=0)
