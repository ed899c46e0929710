"""CLIP models as NeMo and NeMo-Aligner save them (Megatron layout), turned into Hugging Face's layout.

Beyond the names below: ``query_key_value`` holds q, k and v stacked on dim 0 (ordered by head first, then q/k/v, in a
tower whose configuration says ``megatron_legacy: false``); the word embeddings' rows are padded to a multiple of 128;
``cls_token`` is ``(1, 1, hidden)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nemo_aligner_diffusion.errors import ArchiveError, printable
from nemo_aligner_diffusion.formats.nemo import NemoArchive

_TEXT = "text_encoder.language_model."
_VISION = "vision_encoder.backbone."
_RENAMED = {  # wherever they stand in a name, after its "model."
    f"{_TEXT}encoder.layers.": "text_model.encoder.layers.",
    f"{_VISION}transformer.layers.": "vision_model.encoder.layers.",
    f"{_TEXT}embedding.word_embeddings.": "text_model.embeddings.token_embedding.",
    f"{_TEXT}encoder.final_layernorm.": "text_model.final_layer_norm.",
    f"{_VISION}preprocess_layernorm.": "vision_model.pre_layrnorm.",
    f"{_VISION}transformer.final_layernorm.": "vision_model.post_layernorm.",
    f"{_VISION}conv1.": "vision_model.embeddings.patch_embedding.",
    "text_encoder.head.": "text_projection.",
    "vision_encoder.head.": "visual_projection.",
    ".input_layernorm.": ".layer_norm1.",
    ".post_attention_layernorm.": ".layer_norm2.",
    ".self_attention.dense.": ".self_attn.out_proj.",
    ".mlp.dense_h_to_4h.": ".mlp.fc1.",
    ".mlp.dense_4h_to_h.": ".mlp.fc2.",
}
_WHOLE = {  # parameters in some NeMo versions, embeddings (with ".weight") in others
    f"{_TEXT}embedding.position_embeddings": "text_model.embeddings.position_embedding.weight",
    f"{_VISION}position_embeddings": "vision_model.embeddings.position_embedding.weight",
    f"{_VISION}cls_token": "vision_model.embeddings.class_embedding",
}


def hf_layout(
    archive: NemoArchive,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    vocabulary_size: int,
    eos_token_id: int,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``(our configuration, Hugging Face state dict)`` of a NeMo CLIP archive.

    Args:
        archive: named in errors.
        config: its ``model_config.yaml``.
        state: its tensors.
        vocabulary_size: entries of the tokenizer; embedding rows beyond it are padding and dropped.
        eos_token_id: the id at which the text is pooled.

    Raises:
        ArchiveError: a field that fixes the architecture is missing or unusable.
    """
    text, vision = (_section(archive, config, name) for name in ("text", "vision"))
    _check_supported(archive, text, vision)
    output_dim = _number(archive, config, "output_dim", "")
    towers = {"text_model": _tower(archive, text, "text."), "vision_model": _tower(archive, vision, "vision.")}
    for tower in towers.values():
        tower["projection_dim"] = output_dim

    converted: dict[str, Tensor] = {}
    for full_name, tensor in state.items():
        name = full_name
        while name.startswith(("model.", "module.")):  # "model.module." under half-precision O2
            name = name.split(".", 1)[1]
        if name.endswith(("position_ids", "rotary_pos_emb.inv_freq")):
            continue
        name = _WHOLE.get(name.removesuffix(".weight"), name)
        for old, new in _RENAMED.items():
            name = name.replace(old, new)
        model = name.split(".")[0]
        if model in towers and ".self_attention.query_key_value." in name:
            interleaved = not (text if model == "text_model" else vision).get("megatron_legacy", True)
            heads = towers[model]["num_attention_heads"]
            converted.update(_split_qkv(archive, name, tensor, heads, interleaved))
        else:
            converted[name] = tensor  # unknown: named as misfitting by whoever compares with the model
    for name, shape in (
        ("vision_model.embeddings.class_embedding", (-1,)),
        ("vision_model.embeddings.position_embedding.weight", (-1, towers["vision_model"]["hidden_size"])),
    ):
        if name in converted and converted[name].numel() % abs(shape[-1]) == 0:
            converted[name] = converted[name].reshape(shape)  # (1, 1, hidden) and (1, positions, hidden) in NeMo
    embedding = "text_model.embeddings.token_embedding.weight"
    if embedding in converted:
        if len(converted[embedding]) < vocabulary_size:
            raise ArchiveError(
                f"{archive.path}: its token embedding has {len(converted[embedding])} rows, its tokenizer "
                f"{vocabulary_size} entries. Give the tokenizer that the model was trained with (rm.model.tokenizer)."
            )
        converted[embedding] = converted[embedding][:vocabulary_size].clone()

    image_size = _number(archive, vision, "img_h", "vision.")
    if vision.get("img_w", image_size) != image_size:
        raise ArchiveError(f"{archive.path}: it takes {image_size}×{vision['img_w']} pictures; expected square ones.")
    clip = {
        "projection_dim": output_dim,
        "text_config": {
            **towers["text_model"],
            "vocab_size": vocabulary_size,
            "max_position_embeddings": _number(archive, text, "max_position_embeddings", "text."),
            "eos_token_id": eos_token_id,
            "bos_token_id": eos_token_id,  # not used; its default lies outside small vocabularies
        },
        "vision_config": {
            **towers["vision_model"],
            "image_size": image_size,
            "patch_size": _number(archive, vision, "patch_dim", "vision."),
            "num_channels": vision.get("num_channels", 3),
        },
    }
    preprocessing = {
        "image_size": image_size,
        "mean": vision.get("image_mean") or vision.get("img_mean"),
        "std": vision.get("image_std") or vision.get("img_std"),
    }
    return {"clip": clip, "score": "pickscore", "preprocessing": preprocessing, "tokenizer": {}}, converted


def _split_qkv(archive: NemoArchive, name: str, tensor: Tensor, heads: int, interleaved: bool) -> dict[str, Tensor]:
    if tensor.ndim == 0 or len(tensor) % (3 * heads):
        raise ArchiveError(
            f"{archive.path}: {name} has shape {tuple(tensor.shape)}; expected rows for 3 × {heads} heads."
        )
    if interleaved:
        tensor = tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    parts = torch.chunk(tensor, 3)
    return {
        name.replace("self_attention.query_key_value", f"self_attn.{letter}_proj"): part.clone()
        for letter, part in zip("qkv", parts, strict=True)
    }


def _tower(archive: NemoArchive, section: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {
        "hidden_size": _number(archive, section, "hidden_size", prefix),
        "intermediate_size": _number(archive, section, "ffn_hidden_size", prefix),
        "num_hidden_layers": _number(archive, section, "num_layers", prefix),
        "num_attention_heads": _number(archive, section, "num_attention_heads", prefix),
        "hidden_act": _activation(archive, section, prefix),
        "layer_norm_eps": float(section.get("layernorm_epsilon") or 1e-5),
    }


def _activation(archive: NemoArchive, section: Mapping[str, Any], prefix: str) -> str:
    """Megatron's name for the activation to transformers': OpenAI's weights use ``approx-gelu``, ``x·σ(1.702x)``."""
    if section.get("openai_gelu"):
        return "gelu_new"
    name = section.get("activation") or "gelu"
    if name == "gelu" and section.get("bias_activation_fusion"):
        return "gelu_new"  # Megatron's fused kernel is the tanh approximation
    known = {"gelu": "gelu", "approx-gelu": "quick_gelu", "quick-gelu": "quick_gelu"}
    if name not in known:
        raise ArchiveError(f"{archive.path}: {prefix}activation is '{printable(name)}'; known are {', '.join(known)}.")
    return known[name]


def _check_supported(archive: NemoArchive, text: Mapping[str, Any], vision: Mapping[str, Any]) -> None:
    """Refuse what would give other numbers from tensors of the same names and shapes."""
    for prefix, section in (("text.", text), ("vision.", vision)):
        for key, supported in (
            ("normalization", ("layernorm", None)),  # layernorm1p adds 1 to its weight
            ("transformer_block_type", ("pre_ln", None)),
            ("position_embedding_type", ("learned_absolute", "learned_parameters", None)),
            ("global_average_pool", (False, None)),
        ):
            if section.get(key) not in supported:
                raise ArchiveError(
                    f"{archive.path}: its model_config.yaml has {prefix}{key} = '{printable(section[key], 80)}'; only "
                    f"{supported[0]!r} can be restored, which CLIP, PickScore and HPSv2 have."
                )


def _section(archive: NemoArchive, config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = config.get(key)
    if not isinstance(section, Mapping):
        raise ArchiveError(f"{archive.path}: its model_config.yaml lacks the section {key!r} of the architecture.")
    return section


def _number(archive: NemoArchive, section: Mapping[str, Any], key: str, prefix: str) -> int:
    value = section.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ArchiveError(
            f"{archive.path}: its model_config.yaml has {prefix}{key} = '{printable(value, 80)}'; "
            "expected a whole number."
        )
    return value
