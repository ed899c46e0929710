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

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nemo_aligner_diffusion.errors import RewardError
from nemo_aligner_diffusion.rewards.base import Reward, wide
from nemo_aligner_diffusion.rewards.support.micro_batches import in_micro_batches, own_precision
from nemo_aligner_diffusion.rewards.support.preprocessing import Preprocessing
from nemo_aligner_diffusion.rewards.support.text_rows import TruncationCounter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of the published model, as written in its source (ImageReward/ImageReward.py, Apache-2.0).
PUBLISHED_MEAN = 0.16717362830052426
PUBLISHED_STD = 1.0333394966054072
MAX_LENGTH = 35

# Places of the linear layers in the published ``mlp.layers``; the others are dropouts, which hold no weights.
HEAD_PLACES = (0, 2, 4, 6, 7)
VISION_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"),
)
TEXT_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "max_position_embeddings",
)


class ImageRewardNetwork(nn.Module):
    """BLIP's two encoders and the head, with random weights.

    Args:
        vision: the fields ``VISION_KEYS`` of :class:`transformers.BlipVisionConfig`.
        text: the fields ``TEXT_KEYS`` of :class:`transformers.BlipTextConfig`.
        head: widths of the head's four hidden layers; published: 1024, 128, 64, 16.

    Raises:
        ValueError, TypeError: no such network can be built.
    """

    def __init__(self, vision: Mapping[str, int], text: Mapping[str, int], head: Sequence[int]) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        if len(head) != len(HEAD_PLACES) - 1:
            raise ValueError(f"the head has {len(head)} hidden widths; expected {len(HEAD_PLACES) - 1}")
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
        self.head = nn.ModuleDict(
            OrderedDict((str(place), layer) for place, layer in zip(HEAD_PLACES, layers, strict=True))
        )

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


class ImageReward(Reward):
    """A frozen :class:`ImageRewardNetwork` as a reward.

    Args:
        network: frozen in place.
        tokenizer: BLIP's, see :mod:`.image_reward_tokenizer`.
        mean, std: subtracted from the raw score, and then divided by.
        max_length: tokens a prompt may have, both ends included; longer ones are truncated.
        micro_batch_size: pictures per forward pass; all at once when left out.
        activation_checkpointing: recompute the network in the backward pass, one micro-batch at a time, so that its
            memory doesn't grow with the number of pictures.
        token_cache_size: prompts whose tokens are kept.

    Raises:
        RewardError: ``std``, ``max_length`` or ``micro_batch_size`` is impossible.
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
        micro_batch_size: int | None = None,
        activation_checkpointing: bool = False,
        token_cache_size: int = 4096,
    ) -> None:
        super().__init__()
        if not std > 0:
            raise RewardError(f"ImageReward divides by a deviation of {std}; expected a number above 0.")
        most_tokens = network.text_options["max_position_embeddings"]
        if not 2 <= max_length <= most_tokens:
            raise RewardError(f"ImageReward's max_length is {max_length}; expected 2 to {most_tokens} tokens.")
        self.network = network
        self.tokenizer = tokenizer
        self.preprocessing = Preprocessing(network.vision_options["image_size"])
        self.mean, self.std = mean, std
        self.max_length = max_length
        self.micro_batch_size = micro_batch_size
        self.activation_checkpointing = activation_checkpointing
        self.token_cache_size = token_cache_size
        self.truncated = TruncationCounter(max_length)
        self._token_cache: OrderedDict[str, tuple[list[int], list[int]]] = OrderedDict()
        self.freeze()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the encoders compute in."""
        return next(self.network.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        with own_precision(self.device.type):
            pixels = self.preprocessing(images.to(self.device)).to(self.dtype)
            raw = in_micro_batches(
                self.network,
                pixels,
                *self.tokenize(prompts),
                micro_batch_size=self.micro_batch_size,
                activation_checkpointing=self.activation_checkpointing,
            )
        return (raw - self.mean) / self.std

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, each ``(B, max_length)``, padded at the end; cached per prompt."""
        rows = [self._token_cache.get(prompt) or self._tokenize(prompt) for prompt in prompts]
        for prompt, row in zip(prompts, rows, strict=True):
            self._token_cache[prompt] = row
            self._token_cache.move_to_end(prompt)
        while len(self._token_cache) > self.token_cache_size:
            self._token_cache.popitem(last=False)
        # Lists are cached, not tensors: nothing stays behind when the reward moves to another device.
        both = torch.tensor(rows, dtype=torch.long, device=self.device).view(len(rows), 2, self.max_length)
        return both[:, 0], both[:, 1]

    def _tokenize(self, prompt: str) -> tuple[list[int], list[int]]:
        encoded: Any = self.tokenizer(prompt, padding="max_length", truncation=True, max_length=self.max_length)
        if all(encoded.attention_mask) and len(self.tokenizer(prompt).input_ids) > self.max_length:
            self.truncated.count(prompt)
        return encoded.input_ids, encoded.attention_mask
