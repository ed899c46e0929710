"""Architectures of published models, so that a plan needs no download: what their public ``config.json`` files say.

No torch here. Parameter counts are compared with the published ones in ``tests/test_planner.py``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_aligner_diffusion.errors import ConfigurationError


@dataclass(frozen=True)
class ModelSpec:
    """What a model is made of.

    Attributes:
        name: as printed.
        family: ``sd`` (one CLIP text encoder), ``sdxl`` (two of them), ``flux`` (CLIP and T5; not trainable here yet).
        denoiser, vae: keyword arguments of the ``diffusers`` class.
        text_encoders: ``("clip" | "t5", fields of its transformers configuration)``, in the model's order.
        sample_size: side of the latents that the model was made for.
        text_length: tokens the denoiser sees.
        reward: the reward preset a plan takes when the recipe names no reward file; ``None``: the embedded one.
    """

    name: str
    family: str
    denoiser: dict[str, Any]
    vae: dict[str, Any]
    text_encoders: tuple[tuple[str, dict[str, Any]], ...]
    sample_size: int
    text_length: int
    reward: str | None


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

MODELS: dict[str, ModelSpec] = {
    "sd15": ModelSpec(
        "Stable Diffusion 1.5",
        "sd",
        {**_SD_UNET, "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        {**_SD_VAE, "sample_size": 512, "scaling_factor": 0.18215},
        (("clip", _CLIP_L),),
        sample_size=64,
        text_length=77,
        reward="clip-h",
    ),
    "sd21": ModelSpec(
        "Stable Diffusion 2.1 (768)",
        "sd",
        {
            **_SD_UNET,
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        {**_SD_VAE, "sample_size": 768, "scaling_factor": 0.18215},
        (("clip", {**_CLIP_H, "num_hidden_layers": 23}),),
        sample_size=96,
        text_length=77,
        reward="clip-h",
    ),
    "sdxl": ModelSpec(
        "SDXL 1.0",
        "sdxl",
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
        {**_SD_VAE, "sample_size": 1024, "scaling_factor": 0.13025},
        (("clip", _CLIP_L), ("clip", _CLIP_G)),
        sample_size=128,
        text_length=77,
        reward="clip-h",
    ),
    "dit-12b": ModelSpec(
        "12-billion DiT (FLUX.1-dev's shape)",
        "flux",
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
        {
            **_SD_VAE,
            "latent_channels": 16,
            "sample_size": 1024,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        (("clip", _CLIP_L), ("t5", _T5_XXL)),
        sample_size=128,
        text_length=512,
        reward="clip-h",
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


def _from_folder(folder: Path) -> ModelSpec:
    index = _read(folder / "model_index.json")
    if (folder / "transformer").is_dir():
        family, denoiser = "flux", _read(folder / "transformer" / "config.json")
        if denoiser.get("_class_name") != "FluxTransformer2DModel":
            raise ConfigurationError(
                f"{folder}: its denoiser is a {denoiser.get('_class_name')}; the planner knows UNet2DConditionModel "
                "and FluxTransformer2DModel"
            )
    else:
        family = "sdxl" if "text_encoder_2" in index else "sd"
        denoiser = _read(folder / "unet" / "config.json")
    vae = _read(folder / "vae" / "config.json")
    encoders: list[tuple[str, dict[str, Any]]] = []
    for part in ("text_encoder", "text_encoder_2"):
        if (folder / part).is_dir():
            config = _read(folder / part / "config.json")
            encoders.append(("t5" if "t5" in str(config.get("model_type")) else "clip", config))
    length = max(int(config.get("max_position_embeddings", 512)) for _, config in encoders)
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    return ModelSpec(
        folder.name,
        family,
        {key: value for key, value in denoiser.items() if not key.startswith("_")},
        {key: value for key, value in vae.items() if not key.startswith("_")},
        tuple(encoders),
        sample_size=int(denoiser.get("sample_size") or vae["sample_size"] // factor),
        text_length=length,
        reward=None,
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{file}: not a readable configuration file: {error}") from error
    if not isinstance(value, dict):
        raise ConfigurationError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value
