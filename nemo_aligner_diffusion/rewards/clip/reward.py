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

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from nemo_aligner_diffusion.errors import RewardError
from nemo_aligner_diffusion.rewards.base import Reward
from nemo_aligner_diffusion.rewards.micro_batches import check_micro_batch_size, in_micro_batches, own_precision
from nemo_aligner_diffusion.rewards.preprocessing import (
    INTERPOLATIONS,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    RESIZES,
    preprocess,
)

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SCORES = ("pickscore", "hps", "clipscore")
_Self = TypeVar("_Self", bound="CLIPReward")


class CLIPReward(Reward):
    """A frozen :class:`transformers.CLIPModel` as a reward.

    Args:
        model: the CLIP model; frozen in place.
        tokenizer: gives token ids that end with the id at which the model pools its text.
        score: one of ``pickscore``, ``hps``, ``clipscore``.
        image_size: side in pixels that the model sees; the model's own when left out.
        mean, std: statistics of RGB in ``[0, 1]``.
        interpolation: ``bicubic`` or ``bilinear``, antialiased.
        resize: ``crop``, ``crop_down``, ``pad`` or ``squash``, see :func:`.preprocessing.preprocess`.
        prompt_prefix: put before every prompt, e.g. ``"A photo depicts "``, the words CLIPScore was published with.
        max_length: tokens a prompt may have, both ends included; the model's own when left out.
        micro_batch_size: images per forward pass of the vision tower; all at once when left out.
        activation_checkpointing: recompute the vision tower in the backward pass, one micro-batch at a time, so that
            its memory doesn't grow with the number of images.
        text_cache_size: prompts whose embeddings are kept.
    """

    name = "clip"

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        score: str = "pickscore",
        image_size: int | None = None,
        mean: Sequence[float] = OPENAI_CLIP_MEAN,
        std: Sequence[float] = OPENAI_CLIP_STD,
        interpolation: str = "bicubic",
        resize: str = "crop",
        prompt_prefix: str = "",
        max_length: int | None = None,
        micro_batch_size: int | None = None,
        activation_checkpointing: bool = False,
        text_cache_size: int = 4096,
    ) -> None:
        super().__init__()
        if score not in SCORES:
            raise RewardError(f"A CLIP reward scores by one of {', '.join(SCORES)}, not {score!r}.")
        if interpolation not in INTERPOLATIONS or resize not in RESIZES:
            raise RewardError(
                f"A CLIP reward's interpolation is one of {', '.join(INTERPOLATIONS)}, not {interpolation!r}, and its "
                f"resize one of {', '.join(RESIZES)}, not {resize!r}."
            )
        check_micro_batch_size(micro_batch_size)
        clip_config: Any = model.config
        most_tokens: int = clip_config.text_config.max_position_embeddings
        self.model = model
        self.tokenizer = tokenizer
        self.score_type = score
        self.image_size: int = image_size or clip_config.vision_config.image_size
        self.mean, self.std, self.interpolation, self.resize = tuple(mean), tuple(std), interpolation, resize
        self.prompt_prefix = prompt_prefix
        self.max_length = min(max_length or most_tokens, most_tokens)
        self.micro_batch_size = micro_batch_size
        self.activation_checkpointing = activation_checkpointing
        self.text_cache_size = text_cache_size
        self.truncated_prompts = 0
        self._text_cache: OrderedDict[str, Tensor] = OrderedDict()
        self.freeze()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the towers compute in."""
        return self.model.visual_projection.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.visual_projection.weight.device

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
        with own_precision(self.device.type):
            pixels = preprocess(
                images.to(self.device), self.image_size, self.mean, self.std, self.interpolation, self.resize
            )
            return in_micro_batches(
                self._embed_pixels,
                pixels,
                micro_batch_size=self.micro_batch_size,
                activation_checkpointing=self.activation_checkpointing,
            )

    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings ``(B, D)`` of length 1, without gradient; cached per prompt, prompts over the limit truncated."""
        missing = list(dict.fromkeys(prompt for prompt in prompts if prompt not in self._text_cache))
        fresh: dict[str, Tensor] = {}
        # Inference mode is left, not only entered: its tensors, once cached, could never meet autograd again.
        with torch.inference_mode(False), torch.no_grad(), own_precision(self.device.type):
            for prompt in missing:
                # One at a time, which is cheap beside making a picture: in a batch the last digits would depend on the
                # neighbours, so on what happened to be cached, and a resumed run would differ from one that went on.
                fresh[prompt] = self._embed_tokens(self._tokenize(self.prompt_prefix + prompt))[0]
        rows = [fresh[prompt] if prompt in fresh else self._text_cache[prompt] for prompt in prompts]
        for prompt, row in zip(prompts, rows, strict=True):
            self._text_cache[prompt] = row
            self._text_cache.move_to_end(prompt)
        while len(self._text_cache) > self.text_cache_size:
            self._text_cache.popitem(last=False)
        return (
            torch.stack(rows) if rows else torch.empty(0, self.model.visual_projection.out_features, device=self.device)
        )

    def _embed_pixels(self, pixels: Tensor) -> Tensor:
        pooled = self.model.vision_model(pixel_values=pixels.to(self.dtype)).pooler_output
        return _normalise(self.model.visual_projection(pooled))

    def _embed_tokens(self, input_ids: Tensor) -> Tensor:
        # Neither padding nor a mask: the text tower is causal and pools at the first end-of-text token.
        pooled = self.model.text_model(input_ids=input_ids).pooler_output
        return _normalise(self.model.text_projection(pooled))

    def _tokenize(self, prompt: str) -> Tensor:
        ids: list[int] = self.tokenizer(prompt, truncation=True, max_length=self.max_length).input_ids
        if len(ids) == self.max_length and len(self.tokenizer(prompt).input_ids) > self.max_length:
            self._count_truncation(prompt)
        return torch.tensor([ids], device=self.device)

    def _count_truncation(self, prompt: str) -> None:
        self.truncated_prompts += 1
        if str(self.truncated_prompts).rstrip("0") == "1":  # 1, 10, 100, …: a count, not a flood
            logger.warning(
                "%d prompt(s) so far are longer than the reward's %d tokens and were truncated; the latest: %.80r",
                self.truncated_prompts,
                self.max_length,
                prompt,
            )

    def _from_cosine(self, cosine: Tensor) -> Tensor:
        if self.score_type == "pickscore":
            return self.model.logit_scale.to(cosine.dtype).exp() * cosine
        return cosine if self.score_type == "hps" else 2.5 * cosine.clamp(min=0)

    def _apply(self: _Self, fn: Callable[..., Any], recurse: bool = True) -> _Self:
        self._text_cache.clear()  # the cached rows stay behind on the old device, in the old dtype
        return super()._apply(fn, recurse)


def _normalise(embeddings: Tensor) -> Tensor:
    """Rows of length 1, in float32 or float64: a half-precision norm would cost two digits of the score."""
    return functional.normalize(embeddings if embeddings.dtype == torch.float64 else embeddings.float(), dim=-1)
