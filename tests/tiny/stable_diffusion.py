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


def to_ldm_unet(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """diffusers → LDM names for a UNet of two levels with one layer each, written out by hand from LDM's layout."""
    rules = [
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("conv_in", "input_blocks.0.0"),
        ("down_blocks.0.resnets.0", "input_blocks.1.0"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.2.0.op"),
        ("down_blocks.1.resnets.0", "input_blocks.3.0"),
        ("down_blocks.1.attentions.0", "input_blocks.3.1"),
        ("mid_block.resnets.0", "middle_block.0"),
        ("mid_block.attentions.0", "middle_block.1"),
        ("mid_block.resnets.1", "middle_block.2"),
        ("up_blocks.0.resnets.0", "output_blocks.0.0"),
        ("up_blocks.0.attentions.0", "output_blocks.0.1"),
        ("up_blocks.0.resnets.1", "output_blocks.1.0"),
        ("up_blocks.0.attentions.1", "output_blocks.1.1"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.1.2.conv"),
        ("up_blocks.1.resnets.0", "output_blocks.2.0"),
        ("up_blocks.1.resnets.1", "output_blocks.3.0"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
    ]
    inner = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    renamed = {}
    for key, value in unet.state_dict().items():
        old, new = next((old, new) for old, new in rules if key.startswith(old + "."))
        rest = key[len(old) + 1 :]
        if ".resnets." in f".{old}." or ".resnets." in key.split(rest)[0]:
            first, _, tail = rest.partition(".")
            rest = f"{inner.get(first, first)}.{tail}"
        renamed[f"{new}.{rest}"] = value
    return renamed
