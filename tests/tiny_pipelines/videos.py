"""Video pipelines: pictures come out as ``(B, frames, 3, H, W)``."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AnimateDiffPAGPipeline,
    AnimateDiffPipeline,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LattePipeline,
    LatteTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    MotionAdapter,
    UNetMotionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import LlamaConfig, LlamaModel

from .dits import ATTENTION, FEED_FORWARD, row, together, umt5
from .main import SMALL, UNET_LORA, stable_diffusion
from .parts import WIDTH, clip, flow_euler, kl_vae, language_model_config, qwen_tokenizer, t5


def wan() -> dict[str, Any]:
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=16,
    )
    vae = AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                           latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 1.2, 0.9, 1.1])  # fmt: skip
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0,
                                        num_train_timesteps=1000)  # fmt: skip
    return together(umt5(), transformer=transformer, vae=vae, scheduler=scheduler)


def ltx() -> dict[str, Any]:
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=WIDTH,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    return together(t5(), transformer=transformer, vae=vae, scheduler=flow_euler())


def cogvideox() -> dict[str, Any]:
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=WIDTH,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=5,
        max_text_seq_length=8,
    )
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2, sample_height=16,
        sample_width=16,
    )  # fmt: skip
    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False)
    return together(t5(), transformer=transformer, vae=vae, scheduler=scheduler)


def mochi() -> dict[str, Any]:
    transformer = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=8,
        in_channels=12,
        text_embed_dim=WIDTH,
        time_embed_dim=4,
        max_sequence_length=8,
    )
    vae = AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    return together(t5(), transformer=transformer, vae=vae, scheduler=flow_euler())


def latte() -> dict[str, Any]:
    transformer = LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        attention_bias=True,
        sample_size=4,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=2,
    )
    return together(t5(), transformer=transformer, vae=kl_vae(), scheduler=DDIMScheduler(clip_sample=False))


def animatediff() -> dict[str, Any]:
    parts = stable_diffusion()
    del parts["safety_checker"]
    adapter = MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=2
    )
    return {**parts, "unet": UNetMotionModel.from_unet2d(parts["unet"], adapter), "motion_adapter": adapter}


def hunyuan_video() -> dict[str, Any]:
    tokenizer = qwen_tokenizer()
    llama = LlamaModel(LlamaConfig(**language_model_config(len(tokenizer), layers=4)))
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        rope_axes_dim=(2, 2, 4),
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, scaling_factor=1.0
    )
    text_encoder_2, tokenizer_2 = clip(length=77)
    return together((llama, tokenizer), transformer=transformer, vae=vae, scheduler=flow_euler(),
                    text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2)  # fmt: skip


HUNYUAN_TEMPLATE = {"template": "<|im_start|>{}<|im_end|>", "crop_start": 1}
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
ROWS = (
    row("wan", WanPipeline, wan, video=True, lora_targets=(*ATTENTION, "ffn.net.0.proj", "ffn.net.2"),
        arguments={**SMALL, "num_frames": 5, "max_sequence_length": 8},
        notes="from_pretrained keeps some of its weights in float32, so that float64 does not survive saving"),
    row("ltx", LTXPipeline, ltx, video=True, arguments={"height": 32, "width": 32, "num_frames": 9,
                                                        "max_sequence_length": 8}),
    row("cogvideox", CogVideoXPipeline, cogvideox, video=True,
        arguments={**SMALL, "num_frames": 5, "max_sequence_length": 8}),
    row("mochi", MochiPipeline, mochi, video=True,
        lora_targets=(*ATTENTION, *ADDED, *FEED_FORWARD, "ff_context.net.0.proj", "ff_context.net.2"),
        arguments={**SMALL, "num_frames": 7, "max_sequence_length": 8},
        unused=("transformer_blocks.1.attn1.add_q_proj", "transformer_blocks.1.attn1.norm_added_q"),
        notes="the last block's text tokens are keys and values only; the decoder's norms have 32 groups"),
    row("latte", LattePipeline, latte, video=True, arguments={**SMALL, "clean_caption": False, "video_length": 2},
        notes="pictures come out in float32 in any case"),
    row("animatediff", AnimateDiffPipeline, animatediff, video=True, train="unet", lora_targets=UNET_LORA,
        arguments={**SMALL, "num_frames": 2},
        notes="pictures come out in float32 in any case"),
    row("animatediff-pag", AnimateDiffPAGPipeline, animatediff, video=True, train="unet", lora_targets=UNET_LORA,
        arguments={**SMALL, "num_frames": 2}),
    row("hunyuan-video", HunyuanVideoPipeline, hunyuan_video, video=True,
        lora_targets=(*ATTENTION, *ADDED, *FEED_FORWARD, "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp",
                      "single_transformer_blocks.0.proj_out"),
        arguments={**SMALL, "num_frames": 5, "prompt_template": HUNYUAN_TEMPLATE, "max_sequence_length": 16}),
)  # fmt: skip
