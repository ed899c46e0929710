"""Architectures of published models, so that a plan needs no download: what their public ``config.json`` files say.

No torch here. Parameter counts are compared with the published ones in ``tests/test_planner.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.formats.files import read_json

_LEFT_OUT = ("safety_checker", "image_encoder", "feature_extractor")  # no part of a picture from a prompt
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
    reward: str | None = None
    scheduler: tuple[str, dict[str, Any]] = DEFAULT_SCHEDULER
    options: dict[str, Any] = field(default_factory=dict)


# what differs from the defaults of the classes in diffusers (UNet: SD 1; transformer: FLUX.1) and transformers
_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
_FLUX_VAE = {
    **_VAE,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_SD21_UNET = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
_SDXL_UNET = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_T5_XXL = {"d_model": 4096, "d_ff": 10240, "num_heads": 64, "num_layers": 24, "feed_forward_proj": "gated-gelu"}


def _clip(width: int, layers: int, heads: int, projection: int, **others: Any) -> dict[str, Any]:
    return {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
            "num_attention_heads": heads, "projection_dim": projection, **others}  # fmt: skip


_CLIP_L = _clip(768, 12, 12, 768)
_CLIP_H = _clip(1024, 24, 16, 1024, hidden_act="gelu")
_CLIP_G = _clip(1280, 32, 20, 1280, hidden_act="gelu")


def _stable_diffusion(name: str, size: int, unet: dict[str, Any], text_encoder: dict[str, Any]) -> ModelSpec:
    return ModelSpec(
        name,
        "StableDiffusionPipeline",
        {
            "unet": ("UNet2DConditionModel", {**unet, "sample_size": size // 8}),
            "vae": ("AutoencoderKL", {**_VAE, "sample_size": size}),
            "text_encoder": ("CLIPTextModel", text_encoder),
        },
        reward="clip-h",
    )


MODELS: dict[str, ModelSpec] = {
    "sd15": _stable_diffusion("Stable Diffusion 1.5", 512, {"cross_attention_dim": 768}, _CLIP_L),
    "sd21": _stable_diffusion("Stable Diffusion 2.1 (768)", 768, _SD21_UNET, {**_CLIP_H, "num_hidden_layers": 23}),
    "sdxl": ModelSpec(
        "SDXL 1.0",
        "StableDiffusionXLPipeline",
        {
            "unet": ("UNet2DConditionModel", {**_SDXL_UNET, "sample_size": 128}),
            "vae": ("AutoencoderKL", {**_VAE, "sample_size": 1024, "scaling_factor": 0.13025}),
            "text_encoder": ("CLIPTextModel", _CLIP_L),
            "text_encoder_2": ("CLIPTextModelWithProjection", _CLIP_G),
        },
        reward="clip-h",
    ),
    "dit-12b": ModelSpec(
        "12-billion DiT (FLUX.1-dev's shape)",
        "FluxPipeline",
        {
            "transformer": ("FluxTransformer2DModel", {"guidance_embeds": True}),
            "vae": ("AutoencoderKL", {**_FLUX_VAE, "sample_size": 1024}),
            "text_encoder": ("CLIPTextModel", _CLIP_L),
            "text_encoder_2": ("T5EncoderModel", _T5_XXL),
        },
        reward="clip-h",
        scheduler=("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ),
}

# CLIP models that judge: (text fields, vision fields); PickScore and HPSv2 are of the second size
REWARDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip-l": (_CLIP_L, _clip(1024, 24, 16, 768, patch_size=14)),
    "clip-h": (_CLIP_H, _clip(1280, 32, 16, 1024, patch_size=14, hidden_act="gelu")),
}


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
    return ModelSpec(folder.name, str(index["_class_name"]), components, scheduler=scheduler, options=options)
