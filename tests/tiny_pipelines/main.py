"""Seven families that the product names: SD, SDXL, SD3, FLUX.1, FLUX.2-klein, Qwen-Image and Z-Image."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    EulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny.stable_diffusion import SCHEDULER, tiny_parts
from transformers import Qwen3ForCausalLM, Qwen3Model

from .parts import DYNAMIC_SHIFT, WIDTH, clip, flow_euler, kl_vae, qwen3, qwen_vl, t5
from .row import TinyPipeline

SMALL = {"height": 16, "width": 16}
# UNet2DConditionModel's attention: two projections in, self- and cross-attention, feed-forward
UNET_LORA = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
NO_SAFETY = {"safety_checker": None, "feature_extractor": None}


def stable_diffusion() -> dict[str, Any]:
    scheduler = DDIMScheduler(**{key: value for key, value in SCHEDULER.items() if not key.startswith("_")})
    return {**tiny_parts(), "scheduler": scheduler, **NO_SAFETY}


def xl_unet(**config: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **{
            "sample_size": 4,
            "layers_per_block": 1,
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 2 * WIDTH,
            "attention_head_dim": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + WIDTH,
            **config,
        }
    )


def stable_diffusion_xl() -> dict[str, Any]:
    text_encoder, tokenizer = clip()
    text_encoder_2, tokenizer_2 = clip(projection=True)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    return {"vae": kl_vae(), "text_encoder": text_encoder, "text_encoder_2": text_encoder_2, "tokenizer": tokenizer,
            "tokenizer_2": tokenizer_2, "unet": xl_unet(), "scheduler": scheduler}  # fmt: skip


def stable_diffusion_3() -> dict[str, Any]:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    parts = {"transformer": transformer, "vae": kl_vae(shift_factor=0.06), "scheduler": flow_euler()}
    parts["text_encoder"], parts["tokenizer"] = clip(projection=True)
    parts["text_encoder_2"], parts["tokenizer_2"] = clip(projection=True)
    parts["text_encoder_3"], parts["tokenizer_3"] = t5(2 * WIDTH)
    return parts


def flux_transformer(**config: Any) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        **{
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": WIDTH,
            "pooled_projection_dim": WIDTH,
            "guidance_embeds": True,
            "axes_dims_rope": (2, 2, 4),
            **config,
        }
    )


def flux() -> dict[str, Any]:
    parts = {
        "transformer": flux_transformer(),
        "vae": kl_vae(shift_factor=0.1),
        "scheduler": flow_euler(**DYNAMIC_SHIFT),
    }
    parts["text_encoder"], parts["tokenizer"] = clip()
    parts["text_encoder_2"], parts["tokenizer_2"] = t5()
    return parts


def flux_2_vae() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )


def flux_2_transformer(**config: Any) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        **{
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 3 * WIDTH,
            "timestep_guidance_channels": 8,
            "mlp_ratio": 2.0,
            "axes_dims_rope": (2, 2, 2, 2),
            **config,
        }
    )


def flux_2_klein() -> dict[str, Any]:
    text_encoder, tokenizer = qwen3(Qwen3ForCausalLM)
    return {"transformer": flux_2_transformer(guidance_embeds=False), "vae": flux_2_vae(), "text_encoder": text_encoder,
            "tokenizer": tokenizer, "scheduler": flow_euler(**DYNAMIC_SHIFT)}  # fmt: skip


def qwen_image_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 1.2, 0.9, 1.1],
    )


def qwen_image_transformer(**config: Any) -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        **{
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": WIDTH,
            "axes_dims_rope": (2, 2, 4),
            **config,
        }
    )


def qwen_image() -> dict[str, Any]:
    text_encoder, tokenizer = qwen_vl()
    return {"transformer": qwen_image_transformer(), "vae": qwen_image_vae(), "text_encoder": text_encoder,
            "tokenizer": tokenizer, "scheduler": flow_euler(**DYNAMIC_SHIFT)}  # fmt: skip


def z_image() -> dict[str, Any]:
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[2, 2, 4],
        axes_lens=[256, 16, 16],
    )
    text_encoder, tokenizer = qwen3(Qwen3Model)
    return {"transformer": transformer, "vae": kl_vae(shift_factor=0.1), "text_encoder": text_encoder,
            "tokenizer": tokenizer, "scheduler": flow_euler()}  # fmt: skip


ROWS = (
    TinyPipeline(
        name="sd",
        pipeline=StableDiffusionPipeline,
        components=stable_diffusion,
        train="unet",
        lora_targets=UNET_LORA,
        arguments=SMALL,
        guidance=("guidance_scale", 4.0),
        options={"requires_safety_checker": False},
    ),
    TinyPipeline(
        name="sdxl",
        pipeline=StableDiffusionXLPipeline,
        components=stable_diffusion_xl,
        train="unet",
        lora_targets=UNET_LORA,
        arguments=SMALL,
        guidance=("guidance_scale", 4.0),
        options={"add_watermarker": False},
    ),
    TinyPipeline(
        name="sd3",
        pipeline=StableDiffusion3Pipeline,
        components=stable_diffusion_3,
        train="transformer",
        lora_targets=("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
                      "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
        arguments={**SMALL, "max_sequence_length": 8},
        guidance=("guidance_scale", 4.0),
        unused=("transformer_blocks.1.attn.add_q_proj", "transformer_blocks.1.attn.norm_added_q"),
        notes="the last block's text tokens are keys and values only",
    ),
    TinyPipeline(
        name="flux",
        pipeline=FluxPipeline,
        components=flux,
        train="transformer",
        lora_targets=("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
                      "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp",
                      "single_transformer_blocks.0.proj_out"),
        arguments={**SMALL, "max_sequence_length": 8},
        guidance=("guidance_scale", 3.5),
    ),
    TinyPipeline(
        name="flux-2-klein",
        pipeline=Flux2KleinPipeline,
        components=flux_2_klein,
        train="transformer",
        lora_targets=("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
                      "ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out",
                      "to_qkv_mlp_proj", "single_transformer_blocks.0.attn.to_out"),
        arguments={**SMALL, "max_sequence_length": 48, "text_encoder_out_layers": (0, 1, 2)},
        guidance=("guidance_scale", 4.0),
    ),
    TinyPipeline(
        name="qwen-image",
        pipeline=QwenImagePipeline,
        components=qwen_image,
        train="transformer",
        lora_targets=("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
                      "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
        arguments={**SMALL, "negative_prompt": " "},
        guidance=("true_cfg_scale", 4.0),
        unused=tuple(f"transformer_blocks.1.{part}" for part in
                     ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp")),
        notes="the text tokens that the last block makes are thrown away",
    ),
    TinyPipeline(
        name="z-image",
        pipeline=ZImagePipeline,
        components=z_image,
        train="transformer",
        lora_targets=("to_q", "to_k", "to_v", "to_out.0", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
        arguments={**SMALL, "max_sequence_length": 48},
        guidance=("guidance_scale", 4.0),
        notes="writes into the list of prompts that it is given: hand it a new one each time",
    ),
)  # fmt: skip
