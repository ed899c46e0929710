"""A Stable Diffusion model small enough to differentiate whole, built from the real diffusers/transformers classes."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from nemo_aligner_diffusion.diffusion.model import DiffusionModel

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
    "timestep_spacing": "leading",
}


def tiny_tokenizer(max_length: int = 8) -> CLIPTokenizer:
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=max_length)


def tiny_parts(seed: int = 0, channels: tuple[int, int] = (8, 16)) -> dict:
    """unet (16×16 RGB at 4×4×4 latents), vae, text_encoder, tokenizer with random weights from ``seed``."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=channels,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        scaling_factor=3.0,
    )
    return {"unet": unet, "vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}


def tiny_pipeline(
    dtype: torch.dtype = torch.float32, seed: int = 0, channels: tuple[int, int] = (8, 16), **scheduler: object
) -> StableDiffusionPipeline:
    """The pipeline of :func:`tiny_parts`; ``scheduler``: changes to :data:`SCHEDULER`."""
    config = {key: value for key, value in SCHEDULER.items() if not key.startswith("_")}
    pipe = StableDiffusionPipeline(
        **tiny_parts(seed, channels),
        scheduler=DDIMScheduler(**{**config, **scheduler}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype=dtype)


def tiny_stable_diffusion(
    dtype: torch.dtype = torch.float32, seed: int = 0, channels: tuple[int, int] = (8, 16), **scheduler: object
) -> DiffusionModel:
    return DiffusionModel(tiny_pipeline(dtype, seed, channels, **scheduler))


def save_tiny_pipeline(folder: Path, seed: int = 0, channels: tuple[int, int] = (8, 16)) -> Path:
    """The same model as a ``diffusers`` pipeline folder."""
    tiny_pipeline(seed=seed, channels=channels).save_pretrained(folder)
    return folder
