"""CLIP checkpoints as ``open_clip`` writes them (HPSv2, LAION's and many others), turned into Hugging Face's layout.

In OpenCLIP's ``in_proj`` q, k and v are stacked on dim 0; its projections are transposed.

The architecture is read off the tensors' shapes. Two things are not in them. **Heads**: OpenCLIP's models have 64
channels a head, but for the vision towers of ViT-H (1280 channels), -g, -bigG and -e, see :data:`VISION_HEAD_WIDTHS`.
**The activation**: GELU in LAION's models and HPSv2; OpenAI's, DFN's and MetaCLIP's need QuickGELU. Both can be given,
and an ``open_clip_config.json`` beside the checkpoint, as Hub repositories have it, says both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_aligner_diffusion.errors import CheckpointError, printable

# Channels per head of OpenCLIP's vision towers, by their width (its model_configs: ViT-H, ViT-g, ViT-bigG, ViT-e).
VISION_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}
HEAD_WIDTH = 64
ACTIVATIONS = ("gelu", "quick_gelu")

_RENAMED = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
_TRANSPOSED = ("text_projection.weight", "visual_projection.weight")
_WITHIN_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")
_NEEDED = (
    *("positional_embedding", "token_embedding.weight", "text_projection"),
    *("visual.positional_embedding", "visual.conv1.weight", "visual.proj"),
)


@dataclass(frozen=True)
class OpenClipChoices:
    """What the tensors don't say; ``None`` is worked out as the module's docstring describes."""

    activation: str | None = None
    vision_heads: int | None = None
    text_heads: int | None = None


def is_open_clip(state: Mapping[str, Tensor]) -> bool:
    """Whether the tensors' names are OpenCLIP's (a vision transformer's, at least)."""
    return any(name.endswith("visual.conv1.weight") for name in state) and not any("vision_model." in n for n in state)


def hf_layout(
    state: Mapping[str, Tensor],
    origin: str | Path,
    choices: OpenClipChoices,
    model_cfg: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``(fields of transformers.CLIPConfig, Hugging Face state dict)`` of an OpenCLIP checkpoint.

    Args:
        state: the tensors; ``module.`` (DistributedDataParallel) and ``text.`` (custom text towers) are taken off.
        origin: named in errors.
        choices: the user's; they win over ``model_cfg``.
        model_cfg: that section of an ``open_clip_config.json``, where there is one.

    Raises:
        CheckpointError: no CLIP with two transformers of OpenAI's kind, or the activation cannot be known.
    """
    plain = _plain_names(state)
    if lacking := [name for name in _NEEDED if name not in plain]:
        shown = ", ".join(printable(name, 120) for name in list(state)[:3])
        raise CheckpointError(
            f"{origin}: no CLIP with two transformers in OpenCLIP's layout: it lacks {', '.join(lacking)} "
            f"({len(state)} tensors, e.g. {shown}). ResNet, SigLIP, CoCa and custom text towers "
            "cannot be converted."
        )
    converted: dict[str, Tensor] = {}
    for name, tensor in plain.items():
        converted.update(_convert(name, tensor))
    return _architecture(plain, origin, choices, model_cfg or {}), converted


def _plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain = {}
    for name, tensor in state.items():
        while name.startswith(("module.", "_orig_mod.")):  # left by DistributedDataParallel and torch.compile
            name = name.split(".", 1)[1]
        name = name.removeprefix("text.")
        if name != "attn_mask":  # a constant that early versions saved
            plain[name] = tensor
    return plain


def _convert(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name in _RENAMED:
        new = _RENAMED[name]
        return {new: tensor.T.contiguous() if new in _TRANSPOSED else tensor}
    match = _LAYER.fullmatch(name)
    if match is not None:
        side, number, module, kind = match.groups()
        layer = f"{'vision' if side else 'text'}_model.encoder.layers.{number}"
        if module == "attn.in_proj" and len(tensor) % 3 == 0:
            parts = zip("qkv", torch.chunk(tensor, 3), strict=True)
            return {f"{layer}.self_attn.{letter}_proj.{kind}": part.clone() for letter, part in parts}
        if module in _WITHIN_LAYER:
            return {f"{layer}.{_WITHIN_LAYER[module]}.{kind}": tensor}
    return {name: tensor}  # unknown: named as misfitting by whoever compares with the model


def open_clip_text_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back, for a text encoder: Hugging Face's tensors under OpenCLIP's names (SD 2.x, SDXL).

    A position count (``position_ids``), which old versions saved, is left out.
    """
    theirs = {ours: name for name, ours in _RENAMED.items()}
    within = {ours: name for name, ours in _WITHIN_LAYER.items()}
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if match is not None:
            number, module, kind = match.groups()
            layer = f"transformer.resblocks.{number}"
            if module == "self_attn.q_proj":
                parts = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
                converted[f"{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
            elif module in within:
                converted[f"{layer}.{within[module]}.{kind}"] = tensor
        elif name in theirs:
            converted[theirs[name]] = tensor.T.contiguous() if name in _TRANSPOSED else tensor
    return converted


def _architecture(
    state: Mapping[str, Tensor], origin: str | Path, choices: OpenClipChoices, model_cfg: Mapping[str, Any]
) -> dict[str, Any]:
    vision_cfg, text_cfg = _section(model_cfg, "vision_cfg"), _section(model_cfg, "text_cfg")
    activation = choices.activation
    if activation is None and model_cfg:
        activation = "quick_gelu" if model_cfg.get("quick_gelu") else "gelu"
    if activation not in ACTIVATIONS:
        raise CheckpointError(
            f"{origin}: {'its activation cannot be told from the weights' if activation is None else activation!r}. "
            "Give --activation gelu (LAION's models, HPSv2) or --activation quick_gelu (OpenAI's, DFN's, MetaCLIP's)."
        )
    conv = state["visual.conv1.weight"]
    if conv.ndim != 4 or conv.shape[2] != conv.shape[3]:
        raise CheckpointError(f"{origin}: visual.conv1.weight is {tuple(conv.shape)}; expected square patches.")
    width, channels, patch = conv.shape[0], conv.shape[1], conv.shape[2]
    grid = math.isqrt(len(state["visual.positional_embedding"]) - 1)
    if grid * grid != len(state["visual.positional_embedding"]) - 1:
        raise CheckpointError(
            f"{origin}: {len(state['visual.positional_embedding'])} positions are no square of patches and a class "
            "token; only square pictures are supported."
        )
    vocabulary, text_width = state["token_embedding.weight"].shape
    return {
        "projection_dim": state["text_projection"].shape[-1],
        "vision_config": {
            **_tower(state, "visual.", width, activation, origin),
            "num_attention_heads": choices.vision_heads
            or width // (vision_cfg.get("head_width") or VISION_HEAD_WIDTHS.get(width, HEAD_WIDTH))
            or 1,
            "image_size": grid * patch,
            "patch_size": patch,
            "num_channels": channels,
        },
        "text_config": {
            **_tower(state, "", text_width, activation, origin),
            "num_attention_heads": choices.text_heads or text_cfg.get("heads") or text_width // HEAD_WIDTH or 1,
            "vocab_size": vocabulary,
            "max_position_embeddings": len(state["positional_embedding"]),
            # CLIP's two special tokens end the vocabulary; OpenCLIP pools at the highest id, which is the last.
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
            "pad_token_id": vocabulary - 1,
        },
    }


def _tower(state: Mapping[str, Tensor], prefix: str, width: int, activation: str, origin: str | Path) -> dict[str, Any]:
    first = f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"
    if first not in state:
        raise CheckpointError(f"{origin}: it lacks {first}; expected a transformer in OpenCLIP's layout.")
    numbers = {int(match[2]) for name in state if (match := _LAYER.fullmatch(name)) and (match[1] or "") == prefix}
    return {
        "hidden_size": width,
        "intermediate_size": len(state[first]),
        "num_hidden_layers": len(numbers),
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
    }


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = config.get(key)
    return section if isinstance(section, Mapping) else {}
