"""FLUX.2, Krea 2, ERNIE-Image, LongCat-Image, HunyuanImage 2.1, Kandinsky 3 and Stable Cascade."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLHunyuanImage,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    Flux2Pipeline,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    Kandinsky3Pipeline,
    Kandinsky3UNet,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    StableCascadePriorPipeline,
    VQModel,
)
from diffusers.guiders import AdaptiveProjectedMixGuidance
from diffusers.models import StableCascadeUNet
from transformers import (
    ByT5Tokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Mistral3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5EncoderModel,
)

from .dits import ATTENTION, row, together
from .flows import FLUX_LIKE, FLUX_LORA
from .main import ROWS as MAIN
from .main import SMALL, flux_2_transformer, flux_2_vae, qwen_image_vae
from .parts import (
    DYNAMIC_SHIFT,
    WIDTH,
    clip,
    flow_euler,
    kl_vae,
    language_model_config,
    qwen_tokenizer,
    qwen_vl,
    t5,
    t5_config,
)
from .row import TinyPipeline

VISION = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
          "head_dim": 8, "image_size": 16, "patch_size": 4}  # fmt: skip
KLEIN = next(row for row in MAIN if row.name == "flux-2-klein")


def mistral(model: type, layers: int = 2) -> tuple[Any, Any]:
    """Mistral 3 as ``model``, and a tokenizer that has its chat template."""
    tokenizer = qwen_tokenizer()
    text = {"model_type": "mistral", **language_model_config(len(tokenizer), layers)}
    return model(Mistral3Config(text_config=text, vision_config={"model_type": "pixtral", **VISION})), tokenizer


def flux_2() -> dict[str, Any]:
    return together(mistral(Mistral3ForConditionalGeneration), transformer=flux_2_transformer(), vae=flux_2_vae(),
                    scheduler=flow_euler(**DYNAMIC_SHIFT))  # fmt: skip


def ernie() -> dict[str, Any]:
    transformer = ErnieImageTransformer2DModel(
        hidden_size=16,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=32,
        in_channels=16,
        out_channels=16,
        text_in_dim=WIDTH,
        rope_axes_dim=(2, 2, 4),
    )
    return together(mistral(Mistral3Model), transformer=transformer, vae=flux_2_vae(), scheduler=flow_euler())


def krea_2() -> dict[str, Any]:
    tokenizer = qwen_tokenizer()
    text = language_model_config(len(tokenizer))
    config = Qwen3VLConfig(
        text_config={**text, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
        vision_config={"depth": 1, "hidden_size": WIDTH, "intermediate_size": 32, "num_heads": 2,
                       "out_hidden_size": WIDTH, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    )  # fmt: skip
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=WIDTH,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    return together((Qwen3VLModel(config), tokenizer), transformer=transformer, vae=qwen_image_vae(),
                    scheduler=flow_euler(**DYNAMIC_SHIFT))  # fmt: skip


def longcat() -> dict[str, Any]:
    text_encoder, tokenizer = qwen_vl()
    transformer = LongCatImageTransformer2DModel(
        **{**FLUX_LIKE, "in_channels": 64, "axes_dims_rope": [2, 2, 4]}, pooled_projection_dim=WIDTH
    )
    return together((text_encoder, tokenizer), transformer=transformer, vae=kl_vae(16, shift_factor=0.1),
                    scheduler=flow_euler(**DYNAMIC_SHIFT), text_processor=tokenizer)  # fmt: skip


def hunyuan_image() -> dict[str, Any]:
    tokenizer_2 = ByT5Tokenizer(extra_ids=0)
    transformer = HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=WIDTH,
        rope_axes_dim=(4, 4),
    )
    vae = AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32, 32),  # its norms have 32 groups whatever the configuration
        layers_per_block=1,
        spatial_compression_ratio=4,
        sample_size=16,
        scaling_factor=0.75,
    )
    return together(
        qwen_vl(),
        transformer=transformer,
        vae=vae,
        scheduler=flow_euler(),
        text_encoder_2=T5EncoderModel(t5_config(tokenizer_2)),
        tokenizer_2=tokenizer_2,
        guider=AdaptiveProjectedMixGuidance(guidance_scale=3.5, enabled=True),
    )


def kandinsky_3() -> dict[str, Any]:
    unet = Kandinsky3UNet(
        time_embedding_dim=4,
        groups=4,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(8, 16),
        cross_attention_dim=8,
        encoder_hid_dim=WIDTH,
    )
    movq = VQModel(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        num_vq_embeddings=12,
        vq_embed_dim=4,
        norm_type="spatial",
    )
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True, thresholding=False)
    return together(t5(), unet=unet, movq=movq, scheduler=scheduler)


def cascade_prior() -> dict[str, Any]:
    text_encoder, tokenizer = clip(projection=True)
    prior = StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        conditioning_dim=16,
        block_out_channels=(16, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_text_in_channels=WIDTH,
        clip_text_pooled_in_channels=WIDTH,
        clip_image_in_channels=WIDTH,
        timestep_ratio_embedding_dim=8,
        dropout=(0.0, 0.0),
        switch_level=(False,),
    )
    return {
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "scheduler": DDPMWuerstchenScheduler(),
        "prior": prior,
    }


SINGLE = "single_transformer_blocks.0."
HUNYUAN_LORA = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff.net.0.proj", "ff.net.2",
                "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", f"{SINGLE}proj_out")  # fmt: skip
ROWS: tuple[TinyPipeline, ...] = (
    row("flux-2", Flux2Pipeline, flux_2, lora_targets=KLEIN.lora_targets,
        arguments={**SMALL, "max_sequence_length": 512, "text_encoder_out_layers": (0, 1, 2)}),
    row("ernie", ErnieImagePipeline, ernie, lora_targets=(*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.linear_fc2"),
        arguments={**SMALL, "use_pe": False}),
    row("krea2", Krea2Pipeline, krea_2, lora_targets=(*ATTENTION, "ff.gate", "ff.up", "ff.down"),
        options={"text_encoder_select_layers": (1, 2)}, arguments={**SMALL, "max_sequence_length": 192},
        notes="from_pretrained keeps some of its weights in float32, so that float64 does not survive saving"),
    row("longcat", LongCatImagePipeline, longcat, lora_targets=FLUX_LORA,
        arguments={**SMALL, "enable_prompt_rewrite": False},
        notes="512 text tokens whatever the prompt; text_processor, for rewriting prompts, is the tokenizer here: the "
              "real one needs torchvision"),
    row("hunyuan-image", HunyuanImagePipeline, hunyuan_image, lora_targets=HUNYUAN_LORA, guidance=None,
        notes="guidance is an object of the pipeline, guider; 1000 text tokens whatever the prompt: slow"),
    row("kandinsky3", Kandinsky3Pipeline, kandinsky_3, train="unet", lora_targets=("to_q", "to_k", "to_v", "to_out.0")),
    row("cascade-prior", StableCascadePriorPipeline, cascade_prior, train="prior",
        lora_targets=("to_q", "to_k", "to_v", "to_out.0"), arguments={"height": 128, "width": 128},
        unused=("clip_img_mapper.weight",), notes="makes image embeddings, no pictures; no image is given to it"),
)  # fmt: skip
