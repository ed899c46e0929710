"""Transformers with their own text encoders: PixArt, AuraFlow, CogView, Sana, Lumina and others."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    CogVideoXDDIMScheduler,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPAGPipeline,
    HunyuanDiTPipeline,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPAGPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPAGPipeline,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaConfig,
    GemmaModel,
    GemmaTokenizer,
    GlmConfig,
    GlmModel,
    UMT5Config,
    UMT5EncoderModel,
)

from .main import SMALL
from .parts import WIDTH, flow_euler, kl_vae, language_model_config, qwen_tokenizer, t5, t5_config, t5_tokenizer
from .row import TinyPipeline

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
SHORT_PROMPTS = {"clean_caption": False, "max_sequence_length": 8}


def umt5() -> tuple[Any, Any]:
    """UMT5's encoder and tokenizer."""
    tokenizer = t5_tokenizer()
    config = t5_config(tokenizer).to_dict()
    return UMT5EncoderModel(UMT5Config(**{k: v for k, v in config.items() if k not in ("model_type",)})), tokenizer


def gemma_tokenizer() -> GemmaTokenizer:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokens = [*special, *"▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"-<>()\n"]
    return GemmaTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], add_bos_token=True, model_max_length=512
    )


def gemma() -> tuple[Any, Any]:
    tokenizer = gemma_tokenizer()
    return GemmaModel(GemmaConfig(**language_model_config(len(tokenizer)))), tokenizer


def gemma_2() -> tuple[Any, Any]:
    tokenizer = gemma_tokenizer()
    config = {**language_model_config(len(tokenizer)), "query_pre_attn_scalar": 8}
    return Gemma2Model(Gemma2Config(**config)), tokenizer


def glm() -> tuple[Any, Any]:
    tokenizer = qwen_tokenizer()
    tokenizer.padding_side = "left"
    return GlmModel(GlmConfig(**language_model_config(len(tokenizer)))), tokenizer


def bert() -> tuple[Any, Any]:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, model_max_length=16)
    config = BertConfig(vocab_size=len(tokens), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1,
                        num_attention_heads=2, max_position_embeddings=80)  # fmt: skip
    return BertModel(config), tokenizer


def together(encoder: tuple[Any, Any], **parts: Any) -> dict[str, Any]:
    return {"text_encoder": encoder[0], "tokenizer": encoder[1], **parts}


def pixart(**config: Any) -> dict[str, Any]:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=4,
        **config,
    )
    scheduler = DPMSolverMultistepScheduler(beta_schedule="linear")
    return together(t5(), transformer=transformer, vae=kl_vae(), scheduler=scheduler)


def pixart_alpha() -> dict[str, Any]:
    return pixart(use_additional_conditions=False)


def aura_flow() -> dict[str, Any]:
    transformer = AuraFlowTransformer2DModel(
        sample_size=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    return together(umt5(), transformer=transformer, vae=kl_vae(), scheduler=flow_euler())


def cogview(network: Any, **config: Any) -> Any:
    return network(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=8,
        sample_size=8,
        **config,
    )


def cogview_3() -> dict[str, Any]:
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.0, timestep_spacing="trailing",
        clip_sample=False,
    )  # fmt: skip
    transformer = cogview(CogView3PlusTransformer2DModel)
    return together(t5(), transformer=transformer, vae=kl_vae(), scheduler=scheduler)


def cogview_4() -> dict[str, Any]:
    scheduler = flow_euler(base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True,
                           time_shift_type="linear")  # fmt: skip
    transformer = cogview(CogView4Transformer2DModel, rope_axes_dim=(8, 8))
    return together(glm(), transformer=transformer, vae=kl_vae(), scheduler=scheduler)


def sana_vae() -> AutoencoderDC:
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )


def sana_transformer(**config: Any) -> SanaTransformer2DModel:
    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=8,
        **config,
    )


def sana() -> dict[str, Any]:
    return together(gemma_2(), transformer=sana_transformer(), vae=sana_vae(), scheduler=flow_euler())


def sana_sprint() -> dict[str, Any]:
    transformer = sana_transformer(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    return together(gemma_2(), transformer=transformer, vae=sana_vae(), scheduler=SCMScheduler())


def lumina() -> dict[str, Any]:
    transformer = LuminaNextDiT2DModel(
        sample_size=4, hidden_size=16, num_layers=1, num_attention_heads=2, num_kv_heads=2, multiple_of=16,
        cross_attention_dim=WIDTH,
    )  # fmt: skip
    return together(gemma(), transformer=transformer, vae=kl_vae(blocks=4), scheduler=flow_euler())


def lumina_2() -> dict[str, Any]:
    transformer = Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 64, 64),
        cap_feat_dim=WIDTH,
    )
    return together(gemma_2(), transformer=transformer, vae=kl_vae(blocks=4, shift_factor=0.1), scheduler=flow_euler())


def hunyuan_dit() -> dict[str, Any]:
    transformer = HunyuanDiT2DModel(
        sample_size=4,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        hidden_size=16,
        in_channels=4,
        mlp_ratio=2.0,
        cross_attention_dim=WIDTH,
        cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=16,
        text_len=77,
        text_len_t5=256,
        activation_fn="gelu-approximate",
    )
    text_encoder_2, tokenizer_2 = t5()
    return together(
        bert(),
        transformer=transformer,
        vae=kl_vae(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1, set_alpha_to_one=False),
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        safety_checker=None,
        feature_extractor=None,
    )


def dit() -> dict[str, Any]:
    transformer = DiTTransformer2DModel(
        sample_size=4, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return {"transformer": transformer, "vae": kl_vae(), "scheduler": DDIMScheduler(clip_sample=False)}


def class_labels(batch: int) -> dict[str, Any]:
    return {"class_labels": torch.arange(1, 1 + batch).tolist()}


def row(name: str, pipeline: Any, components: Any, **changes: Any) -> TinyPipeline:
    defaults: dict[str, Any] = {
        "train": "transformer",
        "lora_targets": (*ATTENTION, *FEED_FORWARD),
        "arguments": SMALL,
        "guidance": ("guidance_scale", 4.0),
    }
    return TinyPipeline(name=name, pipeline=pipeline, components=components, **{**defaults, **changes})


LARGER = {"height": 32, "width": 32}
NO_BINNING = {"use_resolution_binning": False}  # it resizes the finished picture
LUMINA_LORA = (*ATTENTION, "feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3")
ROWS = (
    row("pixart-alpha", PixArtAlphaPipeline, pixart_alpha, arguments={**SMALL, **SHORT_PROMPTS, **NO_BINNING}),
    row("pixart-sigma", PixArtSigmaPipeline, pixart, arguments={**SMALL, **SHORT_PROMPTS, **NO_BINNING}),
    row("pixart-sigma-pag", PixArtSigmaPAGPipeline, pixart, arguments={**SMALL, **SHORT_PROMPTS, **NO_BINNING},
        options={"pag_applied_layers": ["blocks.0"]}),
    row("auraflow", AuraFlowPipeline, aura_flow, arguments={**SMALL, "max_sequence_length": 8},
        lora_targets=(*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff.linear_1",
                      "ff.linear_2", "ff.out_projection", "ff_context.linear_1", "ff_context.linear_2",
                      "ff_context.out_projection")),
    row("cogview3", CogView3PlusPipeline, cogview_3, arguments={**SMALL, "max_sequence_length": 8}),
    row("cogview4", CogView4Pipeline, cogview_4, arguments={**SMALL, "max_sequence_length": 16, "negative_prompt": " "},
        notes="an empty prompt has no token here: the real tokenizer begins every text with two of its own"),
    row("sana", SanaPipeline, sana, lora_targets=ATTENTION, notes="its feed-forward is convolutions",
        arguments={**LARGER, **NO_BINNING, "max_sequence_length": 8, "complex_human_instruction": None}),
    row("sana-pag", SanaPAGPipeline, sana, lora_targets=ATTENTION,
        arguments={**LARGER, **NO_BINNING, "max_sequence_length": 8, "complex_human_instruction": None},
        options={"pag_applied_layers": "transformer_blocks.0"}),
    row("sana-sprint", SanaSprintPipeline, sana_sprint, lora_targets=ATTENTION, steps=2,
        arguments={**LARGER, **NO_BINNING, "max_sequence_length": 8, "complex_human_instruction": None}),
    row("lumina", LuminaPipeline, lumina, arguments={**LARGER, **SHORT_PROMPTS}, lora_targets=LUMINA_LORA,
        unused=("pad_token",), notes="its VAE has the factor 8 whatever the configuration; no forward reads pad_token"),
    row("lumina2", Lumina2Pipeline, lumina_2, arguments={**LARGER, "max_sequence_length": 48, "system_prompt": "x"},
        lora_targets=LUMINA_LORA, notes="its VAE has the factor 8 whatever the configuration"),
    row("hunyuan-dit", HunyuanDiTPipeline, hunyuan_dit, arguments={**SMALL, **NO_BINNING},
        options={"requires_safety_checker": False}),
    row("hunyuan-dit-pag", HunyuanDiTPAGPipeline, hunyuan_dit, arguments={**SMALL, **NO_BINNING},
        options={"requires_safety_checker": False, "pag_applied_layers": ["blocks.0"]}),
    row("dit", DiTPipeline, dit, conditioning=class_labels, arguments={},
        notes="conditioned on classes, not on a prompt"),
)  # fmt: skip
