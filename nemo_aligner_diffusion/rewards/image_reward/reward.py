"""ImageReward: how well people would like a picture made for a prompt (Xu et al., 2023, arXiv 2304.05977).

A BLIP vision transformer sees the picture, BLIP's text encoder reads the prompt while attending to it, and its first
token goes through an MLP of linear layers without activations (published so; the dropouts between them act in training
only). The score is standardised with the published mean and deviation over the authors' data: 0 is an average
picture, most lie within ±2. The networks are transformers' own BLIP classes.

Example::

    reward = restore_reward("image_reward.nemo", device="cuda")      # see convert_image_reward_to_nemo
    reward(images, ["a red apple", "a blue car"]).mean().backward()  # images (2, 3, H, W) in [0, 1]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nemo_aligner_diffusion.errors import RewardError
from nemo_aligner_diffusion.rewards.base import ModelReward, wide
from nemo_aligner_diffusion.rewards.support.preprocessing import Preprocessing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of the published model, as written in its source (ImageReward/ImageReward.py, Apache-2.0).
PUBLISHED_MEAN = 0.16717362830052426
PUBLISHED_STD = 1.0333394966054072
MAX_LENGTH = 35

# Places of the linear layers in the published ``mlp.layers``; the others are dropouts, which hold no weights.
HEAD_PLACES = (0, 2, 4, 6, 7)


class ImageRewardNetwork(nn.Module):
    """BLIP's two encoders and the head, with random weights.

    Args:
        vision: sizes, as fields of :class:`transformers.BlipVisionConfig`.
        text: sizes, as fields of :class:`transformers.BlipTextConfig`.
        head: widths of the head's four hidden layers; published: 1024, 128, 64, 16.

    Raises:
        ValueError, TypeError: no such network can be built.
    """

    def __init__(self, vision: Mapping[str, int], text: Mapping[str, int], head: Sequence[int]) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        self.vision_options, self.text_options = dict(vision), dict(text)
        # Epsilon as in BLIP's own vision tower (timm's), which is not transformers' default.
        vision_fields: dict[str, Any] = {**vision, "layer_norm_eps": 1e-6, "attention_dropout": 0.0}
        text_fields: dict[str, Any] = {
            **text,
            "encoder_hidden_size": vision["hidden_size"],
            "layer_norm_eps": 1e-12,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "pad_token_id": 0,
            **dict.fromkeys(("bos_token_id", "eos_token_id", "sep_token_id")),  # nothing is generated
            "is_decoder": True,  # so that it has cross-attention; its self-attention is made bidirectional in the call
            "attn_implementation": "eager",  # adds its mask to the scores: no other kind of mask may reach it
        }
        vision_config = BlipVisionConfig(**vision_fields, hidden_act="gelu")
        text_config = BlipTextConfig(**text_fields, hidden_act="gelu")
        self.vision = BlipVisionModel(vision_config)
        self.text = BlipTextModel(text_config, add_pooling_layer=False)
        widths = (text["hidden_size"], *head, 1)
        layers = [nn.Linear(width, following) for width, following in pairwise(widths)]
        self.head = nn.ModuleDict({str(place): layer for place, layer in zip(HEAD_PLACES, layers, strict=True)})

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Raw scores ``(B,)``, not yet standardised.

        Args:
            pixels: normalised pictures ``(B, 3, image_size, image_size)`` in the network's dtype.
            input_ids, attention_mask: ``(B, L)`` integers; the mask is 1 for tokens and 0 for padding.
        """
        image_tokens = self.vision(pixel_values=pixels).last_hidden_state
        features = self.text(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=image_tokens,  # all of them are seen: no mask, as in the original all ones
            is_decoder=False,
        ).last_hidden_state[:, 0]
        # Five small layers, in float32 whatever the towers compute in, as in the original.
        features = wide(features)
        layer: Any
        for layer in self.head.values():
            weight, bias = (parameter.to(features.dtype) for parameter in (layer.weight, layer.bias))
            features = functional.linear(features, weight, bias)
        return features.squeeze(-1)


class ImageReward(ModelReward):
    """A frozen :class:`ImageRewardNetwork` as a reward.

    Args:
        network: frozen in place.
        tokenizer: BLIP's, see :mod:`.tokenizer`.
        mean, std: subtracted from the raw score, and then divided by.
        max_length: tokens a prompt may have, both ends included; longer ones are truncated.

    Raises:
        RewardError: ``mean``, ``std`` or ``max_length`` is impossible.
    """

    name = "image_reward"

    def __init__(
        self,
        network: ImageRewardNetwork,
        tokenizer: PreTrainedTokenizerBase,
        *,
        mean: float = PUBLISHED_MEAN,
        std: float = PUBLISHED_STD,
        max_length: int = MAX_LENGTH,
    ) -> None:
        if not (math.isfinite(mean) and 0 < std < math.inf):
            raise RewardError(
                f"ImageReward's score.mean is {mean} and score.std {std}; expected a number, and one above 0."
            )
        most_tokens = network.text_options["max_position_embeddings"]
        if not 2 <= max_length <= most_tokens:
            raise RewardError(f"ImageReward's max_length is {max_length}; expected 2 to {most_tokens} tokens.")
        super().__init__(network, tokenizer, max_length=max_length)
        self.preprocessing = Preprocessing(network.vision_options["image_size"])
        self.mean, self.std = mean, std

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = self.preprocessing(images.to(self.device)).to(self.dtype)
        raw = self.in_micro_batches(self.model, pixels, *self.tokenize(prompts))
        return (raw - self.mean) / self.std

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, each ``(B, max_length)``, padded at the end; cached per prompt."""
        both = self.text_rows(self._tokenize, prompts, self.device)
        return both[:, 0], both[:, 1]

    def _tokenize(self, prompt: str) -> Tensor:
        encoded = self.tokenized(prompt, padding="max_length")
        return torch.tensor([encoded.input_ids, encoded.attention_mask], device=self.device)
