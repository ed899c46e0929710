"""Variants of Stable Diffusion and SDXL, and other pipelines around a UNet."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    IFPipeline,
    KandinskyV22Pipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPAGPipeline,
    UNet2DConditionModel,
    VQModel,
)

from .main import SMALL, UNET_LORA, stable_diffusion, stable_diffusion_xl
from .parts import WIDTH, masks, pictures, t5
from .row import TinyPipeline, prompts

ADDED_KV_LORA = ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "to_out.0")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CONTROLNET = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "conditioning_embedding_out_channels": (4, 8, 8),
}


def with_lcm_scheduler() -> dict[str, Any]:
    return {**stable_diffusion(), "scheduler": LCMScheduler(**BETAS)}


def latent_consistency() -> dict[str, Any]:
    parts = with_lcm_scheduler()
    return {**parts, "unet": UNet2DConditionModel.from_config(parts["unet"].config, time_cond_proj_dim=8)}


def with_ancestral_scheduler() -> dict[str, Any]:
    return {**stable_diffusion(), "scheduler": EulerAncestralDiscreteScheduler(**BETAS)}


def nine_channels() -> dict[str, Any]:
    parts = stable_diffusion()
    return {**parts, "unet": UNet2DConditionModel.from_config(parts["unet"].config, in_channels=9)}


def controlled() -> dict[str, Any]:
    network = ControlNetModel(**CONTROLNET, cross_attention_dim=WIDTH, attention_head_dim=2)
    return {**stable_diffusion(), "controlnet": network}


def controlled_xl() -> dict[str, Any]:
    network = ControlNetModel(
        **CONTROLNET,
        cross_attention_dim=2 * WIDTH,
        attention_head_dim=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + WIDTH,
    )
    return {**stable_diffusion_xl(), "controlnet": network}


def kandinsky_2_2() -> dict[str, Any]:
    unet = UNet2DConditionModel(
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        encoder_hid_dim_type="image_proj",
        encoder_hid_dim=WIDTH,
        cross_attention_dim=16,
        **pixel_unet_blocks(),
    )
    movq = VQModel(
        block_out_channels=(32, 32),  # its norm has 32 groups whatever the configuration
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        num_vq_embeddings=12,
        vq_embed_dim=4,
        norm_type="spatial",
    )
    scheduler = DDPMScheduler(beta_schedule="linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                              variance_type="learned_range", thresholding=False)  # fmt: skip
    return {"unet": unet, "movq": movq, "scheduler": scheduler}


def pixel_unet_blocks() -> dict[str, Any]:
    return {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": 8,
    }


def deepfloyd() -> dict[str, Any]:
    text_encoder, tokenizer = t5()
    unet = UNet2DConditionModel(
        in_channels=3,
        out_channels=6,
        encoder_hid_dim=WIDTH,
        encoder_hid_dim_type="text_proj",
        cross_attention_dim=16,
        act_fn="gelu",
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        **pixel_unet_blocks(),
    )
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=False,
                              clip_sample=True)  # fmt: skip
    return {"tokenizer": tokenizer, "text_encoder": text_encoder, "unet": unet, "scheduler": scheduler,
            "safety_checker": None, "feature_extractor": None, "watermarker": None}  # fmt: skip


def from_picture(batch: int) -> dict[str, Any]:
    return {**prompts(batch), "image": pictures(batch)}


def from_masked_picture(batch: int) -> dict[str, Any]:
    return {**from_picture(batch), "mask_image": masks(batch)}


def image_embeddings(batch: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(8)
    names = ("image_embeds", "negative_image_embeds")
    return {name: torch.randn(batch, WIDTH, generator=generator) for name in names}


def sd_row(name: str, pipeline: Any, components: Any = stable_diffusion, **changes: Any) -> TinyPipeline:
    defaults: dict[str, Any] = {
        "train": "unet",
        "lora_targets": UNET_LORA,
        "arguments": SMALL,
        "guidance": ("guidance_scale", 4.0),
        "options": {"requires_safety_checker": False},
    }
    return TinyPipeline(name=name, pipeline=pipeline, components=components, **{**defaults, **changes})


XL = {"options": {"add_watermarker": False}}
ROWS = (
    sd_row("sd-lcm-scheduler", StableDiffusionPipeline, with_lcm_scheduler, guidance=("guidance_scale", 1.5)),
    sd_row("lcm", LatentConsistencyModelPipeline, latent_consistency, notes="guidance is an input of the network"),
    sd_row("sd-euler-ancestral", StableDiffusionPipeline, with_ancestral_scheduler),
    sd_row("sd-pag", StableDiffusionPAGPipeline, arguments={**SMALL, "pag_scale": 2.0},
           options={"requires_safety_checker": False, "pag_applied_layers": "mid"}),
    sd_row("sd-img2img", StableDiffusionImg2ImgPipeline, conditioning=from_picture, arguments={"strength": 0.7}),
    sd_row("sd-inpaint", StableDiffusionInpaintPipeline, nine_channels, conditioning=from_masked_picture,
           arguments={**SMALL, "strength": 1.0}),
    sd_row("sd-controlnet", StableDiffusionControlNetPipeline, controlled, conditioning=from_picture, arguments={}),
    sd_row("sdxl-pag", StableDiffusionXLPAGPipeline, stable_diffusion_xl, arguments={**SMALL, "pag_scale": 2.0},
           options={"add_watermarker": False, "pag_applied_layers": "mid"}),
    sd_row("sdxl-img2img", StableDiffusionXLImg2ImgPipeline, stable_diffusion_xl, conditioning=from_picture,
           arguments={"strength": 0.7}, **XL),
    sd_row("sdxl-inpaint", StableDiffusionXLInpaintPipeline, stable_diffusion_xl, conditioning=from_masked_picture,
           arguments={**SMALL, "strength": 0.7}, **XL),
    sd_row("sdxl-controlnet", StableDiffusionXLControlNetPipeline, controlled_xl, conditioning=from_picture,
           arguments={}, **XL),
    sd_row("kandinsky-2.2", KandinskyV22Pipeline, kandinsky_2_2, conditioning=image_embeddings,
           lora_targets=ADDED_KV_LORA, options={}, pixels=(-1.0, 1.0),
           notes="conditioned on image embeddings, not on a prompt; pixels are not clamped"),
    sd_row("if", IFPipeline, deepfloyd, arguments={"height": 8, "width": 8, "clean_caption": False},
           lora_targets=ADDED_KV_LORA, pixels=(-1.0, 1.0),
           notes="pixel space, no decoder"),
)  # fmt: skip
