"""Relatives of FLUX.1, SD3, Qwen-Image and Z-Image, and other flows with a known family's parts."""

from __future__ import annotations

from typing import Any

from diffusers import (
    BriaPipeline,
    BriaTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
    QwenImageImg2ImgPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3PAGPipeline,
    ZImageImg2ImgPipeline,
)
from transformers import Qwen3Model

from .main import ROWS as MAIN
from .main import SMALL, flux, qwen_image, stable_diffusion_3, z_image
from .parts import DYNAMIC_SHIFT, WIDTH, flow_euler, kl_vae, qwen3, t5
from .row import TinyPipeline
from .unets import from_masked_picture, from_picture

FLUX_LORA = next(row.lora_targets for row in MAIN if row.name == "flux")
SHORT = {**SMALL, "max_sequence_length": 8}
FLUX_LIKE: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "axes_dims_rope": (2, 2, 4),
}


def flux_controlnet() -> dict[str, Any]:
    network = FluxControlNetModel(**FLUX_LIKE, pooled_projection_dim=WIDTH, guidance_embeds=True)
    return {**flux(), "controlnet": network}


def stable_diffusion_3_for_pag() -> dict[str, Any]:
    parts = stable_diffusion_3()
    config = parts["transformer"].config
    # PAG's attention knows neither the second attention of a dual block nor norms of queries and keys
    return {**parts, "transformer": SD3Transformer2DModel.from_config(config, dual_attention_layers=(), qk_norm=None)}


def chroma() -> dict[str, Any]:
    transformer = ChromaTransformer2DModel(
        **FLUX_LIKE, approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1
    )
    text_encoder, tokenizer = t5()
    return {"transformer": transformer, "vae": kl_vae(shift_factor=0.1), "text_encoder": text_encoder,
            "tokenizer": tokenizer, "scheduler": flow_euler(**DYNAMIC_SHIFT)}  # fmt: skip


def ovis() -> dict[str, Any]:
    text_encoder, tokenizer = qwen3(Qwen3Model)
    transformer = OvisImageTransformer2DModel(**FLUX_LIKE, out_channels=16)
    return {"transformer": transformer, "vae": kl_vae(shift_factor=0.1), "text_encoder": text_encoder,
            "tokenizer": tokenizer, "scheduler": flow_euler(**DYNAMIC_SHIFT)}  # fmt: skip


def bria() -> dict[str, Any]:
    text_encoder, tokenizer = t5()
    transformer = BriaTransformer2DModel(**{**FLUX_LIKE, "axes_dims_rope": [0, 4, 4]})
    return {"transformer": transformer, "vae": kl_vae(shift_factor=0.1), "text_encoder": text_encoder,
            "tokenizer": tokenizer, "scheduler": flow_euler(**DYNAMIC_SHIFT)}  # fmt: skip


def relative(of: str, name: str, pipeline: Any, components: Any, **changes: Any) -> TinyPipeline:
    """A row with the network of a main row."""
    origin = next(row for row in MAIN if row.name == of)
    same = {key: getattr(origin, key) for key in ("train", "lora_targets", "arguments", "guidance", "unused")}
    return TinyPipeline(name=name, pipeline=pipeline, components=components, **{**same, **changes})


EDIT = {"strength": 0.7}
ROWS = (
    relative("flux", "flux-img2img", FluxImg2ImgPipeline, flux, conditioning=from_picture, arguments={**SHORT, **EDIT}),
    relative("flux", "flux-inpaint", FluxInpaintPipeline, flux, conditioning=from_masked_picture,
             arguments={**SHORT, **EDIT}),
    relative("flux", "flux-kontext", FluxKontextPipeline, flux, conditioning=from_picture,
             arguments={**SHORT, "max_area": 256, "_auto_resize": False}),
    relative("flux", "flux-controlnet", FluxControlNetPipeline, flux_controlnet, arguments=SHORT,
             conditioning=lambda batch: {("control_image" if key == "image" else key): value
                                         for key, value in from_picture(batch).items()}),
    relative("sd3", "sd3-img2img", StableDiffusion3Img2ImgPipeline, stable_diffusion_3, conditioning=from_picture,
             arguments={**SHORT, **EDIT}),
    relative("sd3", "sd3-pag", StableDiffusion3PAGPipeline, stable_diffusion_3_for_pag,
             arguments={**SHORT, "pag_scale": 2.0},
             options={"pag_applied_layers": "blocks.1"}, unused=("transformer_blocks.1.attn.add_q_proj",),
             notes="a pipeline folder does not keep pag_applied_layers: this is the default"),
    relative("qwen-image", "qwen-image-img2img", QwenImageImg2ImgPipeline, qwen_image, conditioning=from_picture,
             arguments={**SMALL, **EDIT, "negative_prompt": " "}),
    relative("z-image", "z-image-img2img", ZImageImg2ImgPipeline, z_image, conditioning=from_picture,
             arguments={**SMALL, **EDIT, "max_sequence_length": 48}),
    relative("flux", "chroma", ChromaPipeline, chroma, arguments=SHORT, guidance=("guidance_scale", 4.0)),
    relative("flux", "ovis", OvisImagePipeline, ovis, arguments={**SMALL, "max_sequence_length": 192},
             guidance=("guidance_scale", 4.0)),
    relative("flux", "bria", BriaPipeline, bria, arguments=SHORT, guidance=("guidance_scale", 4.0)),
)  # fmt: skip
