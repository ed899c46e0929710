"""Architectures of published models, so that a plan needs no download: what their public ``config.json`` files say.

No torch here. Parameter counts are compared with the published ones in ``tests/test_planner.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.formats.files import read_json

DEFAULT_SCHEDULER: tuple[str, dict[str, Any]] = ("DDIMScheduler", {"clip_sample": False})


@dataclass(frozen=True)
class ModelSpec:
    """What a model is made of.

    Attributes:
        name: as printed.
        pipeline: name of its ``diffusers`` pipeline class.
        components: its networks by the pipeline's names: (class of ``diffusers`` or ``transformers``, what its
            constructor or its configuration is given).
        reward: the reward preset a plan takes when the recipe names no reward file; ``None``: the embedded one.
        scheduler: class of ``diffusers`` and its configuration: how many steps it makes, on which noise levels.
        options: further arguments of the pipeline's constructor.
    """

    name: str
    pipeline: str
    components: dict[str, tuple[str, dict[str, Any]]]
    reward: str | None
    scheduler: tuple[str, dict[str, Any]] = DEFAULT_SCHEDULER
    options: dict[str, Any] = field(default_factory=dict)


_SD_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}
_SD_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
}
_CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768, "vocab_size": 49408, "max_position_embeddings": 77,
}  # fmt: skip
_CLIP_H = {**_CLIP_L, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
           "num_attention_heads": 16, "projection_dim": 1024, "hidden_act": "gelu"}  # fmt: skip
_CLIP_G = {**_CLIP_L, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
           "num_attention_heads": 20, "projection_dim": 1280, "hidden_act": "gelu"}  # fmt: skip
_T5_XXL = {
    "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip

_NO_CHECKER = {"requires_safety_checker": False}
MODELS: dict[str, ModelSpec] = {
    "sd15": ModelSpec(
        "Stable Diffusion 1.5",
        "StableDiffusionPipeline",
        {
            "unet": (
                "UNet2DConditionModel",
                {**_SD_UNET, "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
            ),
            "vae": ("AutoencoderKL", {**_SD_VAE, "sample_size": 512, "scaling_factor": 0.18215}),
            "text_encoder": ("CLIPTextModel", _CLIP_L),
        },
        reward="clip-h",
        options=_NO_CHECKER,
    ),
    "sd21": ModelSpec(
        "Stable Diffusion 2.1 (768)",
        "StableDiffusionPipeline",
        {
            "unet": (
                "UNet2DConditionModel",
                {
                    **_SD_UNET,
                    "sample_size": 96,
                    "cross_attention_dim": 1024,
                    "attention_head_dim": (5, 10, 20, 20),
                    "use_linear_projection": True,
                },
            ),
            "vae": ("AutoencoderKL", {**_SD_VAE, "sample_size": 768, "scaling_factor": 0.18215}),
            "text_encoder": ("CLIPTextModel", {**_CLIP_H, "num_hidden_layers": 23}),
        },
        reward="clip-h",
        options=_NO_CHECKER,
    ),
    "sdxl": ModelSpec(
        "SDXL 1.0",
        "StableDiffusionXLPipeline",
        {
            "unet": (
                "UNet2DConditionModel",
                {
                    "in_channels": 4,
                    "out_channels": 4,
                    "sample_size": 128,
                    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                    "block_out_channels": (320, 640, 1280),
                    "layers_per_block": 2,
                    "cross_attention_dim": 2048,
                    "attention_head_dim": (5, 10, 20),
                    "transformer_layers_per_block": (1, 2, 10),
                    "use_linear_projection": True,
                    "addition_embed_type": "text_time",
                    "addition_time_embed_dim": 256,
                    "projection_class_embeddings_input_dim": 2816,
                },
            ),
            "vae": ("AutoencoderKL", {**_SD_VAE, "sample_size": 1024, "scaling_factor": 0.13025}),
            "text_encoder": ("CLIPTextModel", _CLIP_L),
            "text_encoder_2": ("CLIPTextModelWithProjection", _CLIP_G),
        },
        reward="clip-h",
        options={"add_watermarker": False},
    ),
    "dit-12b": ModelSpec(
        "12-billion DiT (FLUX.1-dev's shape)",
        "FluxPipeline",
        {
            "transformer": (
                "FluxTransformer2DModel",
                {
                    "patch_size": 1,
                    "in_channels": 64,
                    "num_layers": 19,
                    "num_single_layers": 38,
                    "attention_head_dim": 128,
                    "num_attention_heads": 24,
                    "joint_attention_dim": 4096,
                    "pooled_projection_dim": 768,
                    "guidance_embeds": True,
                    "axes_dims_rope": (16, 56, 56),
                },
            ),
            "vae": (
                "AutoencoderKL",
                {
                    **_SD_VAE,
                    "latent_channels": 16,
                    "sample_size": 1024,
                    "scaling_factor": 0.3611,
                    "shift_factor": 0.1159,
                    "use_quant_conv": False,
                    "use_post_quant_conv": False,
                },
            ),
            "text_encoder": ("CLIPTextModel", _CLIP_L),
            "text_encoder_2": ("T5EncoderModel", _T5_XXL),
        },
        reward="clip-h",
        scheduler=("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ),
}

# CLIP models that judge: (text fields, vision fields)
REWARDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip-l": (
        _CLIP_L,
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
         "projection_dim": 768, "image_size": 224, "patch_size": 14},
    ),
    "clip-h": (  # PickScore, HPSv2
        _CLIP_H,
        {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
         "projection_dim": 1024, "image_size": 224, "patch_size": 14, "hidden_act": "gelu"},
    ),
}  # fmt: skip


def model_spec(name: str) -> ModelSpec:
    """A preset by its name, or what a ``diffusers`` folder's configuration files say (no weight is read).

    Raises:
        ConfigurationError: neither a preset nor such a folder.
    """
    if name in MODELS:
        return MODELS[name]
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ConfigurationError(
            f"--model {name!r}: neither a preset ({', '.join(MODELS)}) nor a diffusers folder on this machine"
        )
    return _from_folder(folder)


_LEFT_OUT = ("safety_checker", "image_encoder", "feature_extractor")  # no part of a picture from a prompt


def _from_folder(folder: Path) -> ModelSpec:
    index = read_json(folder / "model_index.json", ConfigurationError)
    components: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, value in index.items():
        is_network = isinstance(value, list) and (folder / name / "config.json").is_file()
        if is_network and name not in _LEFT_OUT:
            config = read_json(folder / name / "config.json", ConfigurationError)
            components[name] = (value[1], {key: v for key, v in config.items() if not key.startswith("_")})
    if "vae" not in components:
        raise ConfigurationError(
            f"{folder}: a plan needs a vae/config.json; there are networks in {', '.join(components) or 'no folder'}"
        )
    options = {key: v for key, v in index.items() if not key.startswith("_") and not isinstance(v, list)}
    scheduler = DEFAULT_SCHEDULER
    if "scheduler" in index:
        scheduler = index["scheduler"][1], read_json(folder / "scheduler" / "scheduler_config.json", ConfigurationError)
    return ModelSpec(folder.name, str(index["_class_name"]), components, None, scheduler, options)
