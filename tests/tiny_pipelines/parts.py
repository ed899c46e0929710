"""Tokenizers, text encoders and VAEs that several tiny pipelines share."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from tiny.stable_diffusion import tiny_tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WIDTH = 16  # of every text encoder
CHAT_TEMPLATE = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}{{ part.text }}\
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def clip(projection: bool = False, length: int = 8) -> tuple[Any, Any]:
    """CLIP's text encoder and tokenizer."""
    tokenizer = tiny_tokenizer(length)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config), tokenizer


def t5_tokenizer() -> T5Tokenizer:
    letters = "▁abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"-_()<>|"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -2.0) for letter in letters)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=16)


def t5_config(tokenizer: Any, width: int = WIDTH) -> T5Config:
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
    )


def t5(width: int = WIDTH) -> tuple[Any, Any]:
    """T5's encoder and tokenizer."""
    tokenizer = t5_tokenizer()
    return T5EncoderModel(t5_config(tokenizer, width)), tokenizer


def qwen_tokenizer() -> Qwen2Tokenizer:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
               "<|video_pad|>"]  # fmt: skip
    tokens = [*sorted(ByteLevel.alphabet()), *special]
    return Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[],
        extra_special_tokens=special[1:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
    )


def language_model_config(vocabulary: int, layers: int = 2) -> dict[str, Any]:
    """What the configurations of Qwen, Llama, Gemma, Mistral and others name alike."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def qwen3(model: type, layers: int = 2) -> tuple[Any, Any]:
    """Qwen3 as ``model``, and its tokenizer."""
    tokenizer = qwen_tokenizer()
    return model(Qwen3Config(**language_model_config(len(tokenizer), layers))), tokenizer


def qwen_vl_config(tokenizer: Any) -> Qwen2_5_VLConfig:
    text = language_model_config(len(tokenizer))
    del text["head_dim"]
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in
           ("vision_start", "vision_end", "image_pad", "video_pad")}  # fmt: skip
    return Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        vision_config={
            "depth": 1,
            "hidden_size": WIDTH,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [0],
        },
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
    )


def qwen_vl() -> tuple[Any, Any]:
    """Qwen2.5-VL and its tokenizer."""
    tokenizer = qwen_tokenizer()
    return Qwen2_5_VLForConditionalGeneration(qwen_vl_config(tokenizer)), tokenizer


def kl_vae(latent_channels: int = 4, blocks: int = 3, **config: Any) -> AutoencoderKL:
    """A VAE of factor ``2 ** (blocks - 1)`` with a small latent scale."""
    return AutoencoderKL(
        **{
            "down_block_types": ("DownEncoderBlock2D",) * blocks,
            "up_block_types": ("UpDecoderBlock2D",) * blocks,
            "block_out_channels": (8,) * blocks,
            "norm_num_groups": 4,
            "latent_channels": latent_channels,
            "sample_size": 16,
            "scaling_factor": 1.5,
            **config,
        }
    )


def flow_euler(**config: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **config})


DYNAMIC_SHIFT = {
    "use_dynamic_shifting": True,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
}


def pictures(batch: int) -> Tensor:
    """``(B, 3, 16, 16)`` in [0, 1]: to begin from, to edit, or as a control."""
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(7))


def masks(batch: int) -> Tensor:
    """``(B, 1, 16, 16)``: 1 (the left half) is painted anew."""
    mask = torch.zeros(batch, 1, 16, 16)
    mask[..., :8] = 1
    return mask
