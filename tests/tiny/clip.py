"""A CLIP small enough for tests, with a byte-pair tokenizer that knows every byte, and its Megatron twin."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

MERGES = [("r", "e"), ("re", "d</w>"), ("a", "p"), ("ap", "p"), ("app", "l"), ("appl", "e</w>")]
MERGES += [("a", "t</w>"), ("c", "at</w>")]


def tokenizer_files() -> dict[str, bytes]:
    """``vocab.json`` and ``merges.txt`` of CLIP's kind: 256 bytes, 256 word-final bytes, a few merges, two specials."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
    entries = characters + [character + "</w>" for character in characters]
    entries += ["".join(pair) for pair in MERGES] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in MERGES), ""])
    return {"vocab.json": json.dumps(vocabulary).encode(), "merges.txt": merges.encode()}


VOCABULARY_SIZE = 512 + len(MERGES) + 2
END_OF_TEXT = VOCABULARY_SIZE - 1


def toy_clip(
    seed: int = 0, *, image_size: int = 32, max_length: int = 16, hidden_act: str = "quick_gelu", text_heads: int = 3
) -> CLIPModel:
    torch.manual_seed(seed)
    tower = {"num_hidden_layers": 2, "hidden_act": hidden_act}
    config = CLIPConfig(
        text_config={
            **tower,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_attention_heads": text_heads,
            "vocab_size": VOCABULARY_SIZE,
            "max_position_embeddings": max_length,
            "bos_token_id": END_OF_TEXT - 1,
            "eos_token_id": END_OF_TEXT,
            "pad_token_id": END_OF_TEXT,
        },
        vision_config={
            **tower,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "image_size": image_size,
            "patch_size": 8,
        },
        projection_dim=20,
        initializer_factor=3.0,  # random towers at the usual scale barely tell pictures apart
    )
    return CLIPModel(config).eval()


_PLAIN = {
    "text_model.final_layer_norm": "text_encoder.language_model.encoder.final_layernorm",
    "text_model.embeddings.token_embedding": "text_encoder.language_model.embedding.word_embeddings",
    "vision_model.pre_layrnorm": "vision_encoder.backbone.preprocess_layernorm",
    "vision_model.post_layernorm": "vision_encoder.backbone.transformer.final_layernorm",
    "vision_model.embeddings.patch_embedding": "vision_encoder.backbone.conv1",
    "text_projection": "text_encoder.head",
    "visual_projection": "vision_encoder.head",
}
_IN_LAYER = {
    "layer_norm1": "input_layernorm",
    "layer_norm2": "post_attention_layernorm",
    "self_attn.out_proj": "self_attention.dense",
    "mlp.fc1": "mlp.dense_h_to_4h",
    "mlp.fc2": "mlp.dense_4h_to_h",
}


def megatron_twin(model: CLIPModel, *, legacy: bool, padded_to: int = 128) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``(model_config.yaml, state dict)`` of the same weights in NeMo's layout."""
    source = model.state_dict()
    text_heads = model.config.to_dict()["text_config"]["num_attention_heads"]
    state: dict[str, Tensor] = {}
    for key, tensor in source.items():
        module, _, kind = key.rpartition(".")
        if module in _PLAIN:
            state[f"{_PLAIN[module]}.{kind}"] = tensor
        for side, prefix in (
            ("text_model", "text_encoder.language_model.encoder.layers"),
            ("vision_model", "vision_encoder.backbone.transformer.layers"),
        ):
            start = f"{side}.encoder.layers."
            if not key.startswith(start):
                continue
            number, _, inner = module.removeprefix(start).partition(".")
            if inner in _IN_LAYER:
                state[f"{prefix}.{number}.{_IN_LAYER[inner]}.{kind}"] = tensor
            if inner == "self_attn.q_proj":
                three = [source[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
                if not legacy:  # (head, q/k/v, channel) instead of (q/k/v, head, channel)
                    heads = text_heads if side == "text_model" else 4
                    rows = [part.reshape(heads, -1, *part.shape[1:]) for part in three]
                    three = [row for head in range(heads) for row in (rows[0][head], rows[1][head], rows[2][head])]
                state[f"{prefix}.{number}.self_attention.query_key_value.{kind}"] = torch.cat(three)
    words = state["text_encoder.language_model.embedding.word_embeddings.weight"]
    padding = torch.full((-len(words) % padded_to, words.shape[1]), 7.0)
    state["text_encoder.language_model.embedding.word_embeddings.weight"] = torch.cat([words, padding])
    state["text_encoder.language_model.embedding.position_embeddings"] = source[
        "text_model.embeddings.position_embedding.weight"
    ]
    state["vision_encoder.backbone.position_embeddings"] = source["vision_model.embeddings.position_embedding.weight"]
    state["vision_encoder.backbone.cls_token"] = source["vision_model.embeddings.class_embedding"].reshape(1, 1, -1)
    state["logit_scale"] = source["logit_scale"]
    tower = {"num_layers": 2, "megatron_legacy": legacy, "layernorm_epsilon": 1e-5, "openai_gelu": False}
    tower |= {"activation": "approx-gelu", "bias_activation_fusion": False}
    config = {
        "target": "nemo_aligner.models.mm.stable_diffusion.image_text_rms.MegatronCLIPRewardModel",
        "nemo_version": "2.0.0",
        "output_dim": 20,
        "vision": {
            **tower,
            "patch_dim": 8,
            "img_h": 32,
            "img_w": 32,
            "image_mean": None,
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "num_attention_heads": 4,
            "output_dim": "${model.output_dim}",
        },
        "text": {
            **tower,
            "hidden_size": 24,
            "ffn_hidden_size": 40,
            "num_attention_heads": text_heads,
            "encoder_seq_length": 16,
            "max_position_embeddings": "${.encoder_seq_length}",
        },
        "tokenizer": {"library": "huggingface", "vocab_file": "nemo:vocab.json", "merge_file": "nemo:merges.txt"},
    }
    return config, {f"model.{name}": tensor for name, tensor in state.items()}


def tensor_parallel_shards(state: dict[str, Tensor], ranks: int, *, legacy: bool) -> list[dict[str, Tensor]]:
    """What each of ``ranks`` tensor-parallel processes holds of a Megatron model: whole heads, rows, or columns."""
    shards: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    for name, tensor in state.items():
        kind = name.split(".")[-2]
        if kind == "query_key_value" and legacy:  # each of q, k and v is split by heads, and stacked again per rank
            per_letter = [part.chunk(ranks) for part in tensor.chunk(3)]
            parts = [torch.cat([letter[rank] for letter in per_letter]) for rank in range(ranks)]
        elif kind in ("query_key_value", "dense_h_to_4h", "word_embeddings"):
            parts = list(tensor.chunk(ranks))
        elif kind in ("dense", "dense_4h_to_h") and tensor.ndim == 2:
            parts = list(tensor.chunk(ranks, dim=1))
        else:
            parts = [tensor] * ranks
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part.clone()
    return shards


_OPEN_CLIP = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn": "attn",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def open_clip_twin(model: CLIPModel) -> dict[str, Tensor]:
    """The same weights under the names, and in the shapes, that OpenCLIP saves them."""
    source = model.state_dict()
    state: dict[str, Tensor] = {}
    for key, tensor in source.items():
        name = key.replace("vision_model.", "visual.").replace("text_model.", "")
        for old, new in _OPEN_CLIP.items():
            name = name.replace(old, new)
        if "q_proj" in name:
            state[name.replace("q_proj.", "in_proj_")] = torch.cat(
                [source[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            )
        elif "k_proj" not in name and "v_proj" not in name:
            state[name] = tensor
    state["visual.proj"] = state.pop("visual_projection.weight").T.contiguous()
    state["text_projection"] = state.pop("text_projection.weight").T.contiguous()
    return state
