"""HiDream-I1, PRX, Kandinsky 5, GLM-Image and NucleusMoE: made trainable from the documentation alone, as a trial."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    GlmImagePipeline,
    GlmImageTransformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
    NucleusMoEImagePipeline,
    NucleusMoEImageTransformer2DModel,
    PRXPipeline,
    PRXTransformer2DModel,
)
from transformers import (
    ByT5Tokenizer,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageImageProcessorPil,
    GlmImageProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    T5EncoderModel,
    T5GemmaModuleConfig,
)
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

from .dits import LARGER, NO_BINNING, gemma_tokenizer, row, together
from .main import SMALL, qwen_image_vae
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


def hidream() -> dict[str, Any]:
    clip_1, tokenizer_1 = clip(projection=True)
    clip_2, tokenizer_2 = clip(projection=True)
    t5_encoder, tokenizer_3 = t5()
    tokenizer_4 = qwen_tokenizer()
    tokenizer_4.eos_token = "<|endoftext|>"
    language = {**language_model_config(len(tokenizer_4)), "attn_implementation": "eager"}
    llama = LlamaForCausalLM(LlamaConfig(**language))
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[WIDTH, WIDTH],
        text_emb_dim=2 * WIDTH,
        num_routed_experts=3,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(8, 8),
        llama_layers=[0, 1],
    )
    return {
        "scheduler": flow_euler(),
        "vae": kl_vae(shift_factor=0.1),
        "text_encoder": clip_1,
        "tokenizer": tokenizer_1,
        "text_encoder_2": clip_2,
        "tokenizer_2": tokenizer_2,
        "text_encoder_3": t5_encoder,
        "tokenizer_3": tokenizer_3,
        "text_encoder_4": llama,
        "tokenizer_4": tokenizer_4,
        "transformer": transformer,
    }


def prx() -> dict[str, Any]:
    tokenizer = gemma_tokenizer()
    language = {**language_model_config(len(tokenizer)), "query_pre_attn_scalar": 8, "dropout_rate": 0.0}
    config: Any = T5GemmaModuleConfig(**language)
    transformer = PRXTransformer2DModel(
        in_channels=4, context_in_dim=WIDTH, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[4, 4]
    )
    return together((T5GemmaEncoder(config), tokenizer), transformer=transformer, vae=kl_vae(shift_factor=0.1),
                    scheduler=flow_euler())  # fmt: skip


def kandinsky_5() -> dict[str, Any]:
    text_encoder_2, tokenizer_2 = clip(length=77)
    transformer = Kandinsky5Transformer3DModel(
        in_text_dim=WIDTH,
        in_text_dim2=WIDTH,
        time_dim=16,
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 2, 2),
    )
    return together(qwen_vl(), transformer=transformer, vae=kl_vae(blocks=4), scheduler=flow_euler(),
                    text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2)  # fmt: skip


def glm_image() -> dict[str, Any]:
    glyphs = ByT5Tokenizer(extra_ids=0)
    tokenizer: Any = qwen_tokenizer()
    tokenizer.padding_side = "left"
    for name, token in {"image_token": "<|image_pad|>", "grid_bos_token": "<|vision_start|>",
                        "grid_eos_token": "<|vision_end|>", "bos_token": "<|im_start|>"}.items():  # fmt: skip
        setattr(tokenizer, name, token)
    text = language_model_config(len(tokenizer))
    del text["head_dim"]
    config = GlmImageConfig(
        text_config={**text, "vision_vocab_size": 32, "eos_token_id": None, "pad_token_id": 0,
                     "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
        vision_config={"depth": 1, "hidden_size": WIDTH, "intermediate_size": 32, "num_heads": 2, "image_size": 16,
                       "patch_size": 4},
        vq_config={"embed_dim": 8, "num_embeddings": 16, "latent_channels": WIDTH},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        image_start_token_id=16,
        image_end_token_id=17,
    )  # fmt: skip
    transformer = GlmImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=32,
    )
    return {
        "tokenizer": glyphs,
        "processor": GlmImageProcessor(GlmImageImageProcessorPil(), tokenizer, chat_template=tokenizer.chat_template),
        "text_encoder": T5EncoderModel(t5_config(glyphs)),
        "vision_language_encoder": GlmImageForConditionalGeneration(config),
        "vae": kl_vae(blocks=4, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 1.2, 0.9, 1.1]),
        "transformer": transformer,
        "scheduler": flow_euler(**DYNAMIC_SHIFT),
    }


def nucleus_moe() -> dict[str, Any]:
    tokenizer = qwen_tokenizer()
    text = language_model_config(len(tokenizer), layers=9)
    config = Qwen3VLConfig(
        text_config={**text, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
        vision_config={"depth": 1, "hidden_size": WIDTH, "intermediate_size": 32, "num_heads": 2,
                       "out_hidden_size": WIDTH, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    )  # fmt: skip
    transformer = NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=5,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
        mlp_ratio=16.0,
        num_experts=4,
        moe_intermediate_dim=16,
        capacity_factors=2.0,
    )
    return {
        "transformer": transformer,
        "scheduler": flow_euler(**DYNAMIC_SHIFT),
        "vae": qwen_image_vae(),
        "text_encoder": Qwen3VLForConditionalGeneration(config),
        "processor": tokenizer,
    }


HIDREAM_LORA = ("to_q", "to_k", "to_v", "to_out", "to_q_t", "to_k_t", "to_v_t", "to_out_t")
ROWS: tuple[TinyPipeline, ...] = (
    row("hidream", HiDreamImagePipeline, hidream, lora_targets=HIDREAM_LORA,
        arguments={**SMALL, "max_sequence_length": 8, "negative_prompt": " "},
        attributes={"default_sample_size": 4}),
    row("prx", PRXPipeline, prx, lora_targets=(), arguments={**SMALL, **NO_BINNING, "tokenizer_max_length": 8},
        batch=1, needs="ftfy", notes="with guidance diffusers 0.42 gives the network two timesteps whatever the batch"),
    row("kandinsky5", Kandinsky5T2IPipeline, kandinsky_5, dtype=torch.float32, attributes={"resolutions": [(32, 32)]},
        lora_targets=("to_query", "to_key", "to_value", "feed_forward.in_layer", "feed_forward.out_layer"),
        arguments=LARGER, notes="its embedding of time is float32 whatever the weights are"),
    row("glm-image", GlmImagePipeline, glm_image, arguments=LARGER, batch=2),
    row("nucleus-moe", NucleusMoEImagePipeline, nucleus_moe,
        lora_targets=("to_q", "to_k", "to_v", "to_out.0"), arguments=SMALL,
        unused=tuple(f"transformer_blocks.{i}.attn.norm_added_q." for i in range(5)),
        notes="processor is the tokenizer here: the real one needs torchvision"),
)  # fmt: skip
