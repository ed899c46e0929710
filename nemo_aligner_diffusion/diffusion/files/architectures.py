"""Published architectures by name (``architectures.yaml``), and their configuration for weights of given shapes.

No torch here: ``--help`` lists the names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nemo_aligner_diffusion.formats.weight_files import Shapes

_KNOWN = yaml.safe_load((Path(__file__).parents[1] / "architectures.yaml").read_text("utf-8"))
REWARDS: dict[str, dict[str, Any]] = _KNOWN["rewards"]  # of CLIPConfig


@dataclass(frozen=True)
class Architecture:
    """What a published model is made of.

    Attributes:
        title: as printed.
        pipeline: name of its ``diffusers`` pipeline class.
        text: repositories that have its text encoders and tokenizers, the preferred one first.
        components: its networks by the pipeline's names: (class of ``diffusers`` or ``transformers``, what its
            constructor or its configuration is given).
        scheduler: class of ``diffusers`` and its configuration.
    """

    title: str
    pipeline: str
    text: tuple[str, ...]
    components: dict[str, tuple[str, dict[str, Any]]]
    scheduler: tuple[str, dict[str, Any]]

    @classmethod
    def of(cls, name: str, pipeline: str, text: list[str], **parts: dict[str, Any]) -> Architecture:
        components = {part: (config["_class_name"], plain(config)) for part, config in parts.items()}
        return cls(name, pipeline, tuple(text), components, components.pop("scheduler"))

    @property
    def denoiser(self) -> str:
        """The component that predicts."""
        return "unet" if "unet" in self.components else "transformer"

    @property
    def in_files(self) -> bool:
        """Whether a pipeline of it is put together from single files, whose shapes say the sizes."""
        return self.components[self.denoiser][0] in _FITTED


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what describes the file."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


ARCHITECTURES: dict[str, Architecture] = {name: Architecture.of(**model) for name, model in _KNOWN["models"].items()}


def fitted(kind: str, config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """``config`` of a class with the sizes that its weights have, under ``diffusers``' names or their makers' own.

    What is published under one name comes in several sizes (SD 3.5 Medium and Large, FLUX.1 with and without guidance);
    a narrower model of the same structure is read likewise.
    """
    return {**config, **_FITTED[kind](shapes)} if kind in _FITTED else config


def _unet(shapes: Shapes) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    levels, widths = unet_levels(shapes), []
    if "input_blocks.0.0.weight" in shapes:  # the first convolution of each level
        per_level = _count(shapes, "input_blocks") // levels  # convolutions and a halving; the first has one before
        for level in range(levels):
            widths.append(shapes[f"input_blocks.{1 + level * per_level}.0.in_layers.2.weight"][0])
    else:
        widths = [shapes[f"down_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(levels)]
    sizes["block_out_channels"] = widths
    context = [shape[-1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")]
    if context:
        sizes["cross_attention_dim"] = context[0]
    for name in ("label_emb.0.0.weight", "add_embedding.linear_1.weight"):
        if name in shapes:
            sizes["projection_class_embeddings_input_dim"] = shapes[name][1]
    return sizes


def unet_levels(shapes: Shapes) -> int:
    """Resolutions of a UNet, counted by the halvings between them; in ``diffusers``' names or LDM's."""
    halvings = (("input_blocks.", ".0.op.weight"), ("down_blocks.", ".downsamplers.0.conv.weight"))
    return 1 + sum(name.startswith(begin) and name.endswith(end) for name in shapes for begin, end in halvings)


def _vae(shapes: Shapes) -> dict[str, Any]:
    theirs = "decoder.up.0.block.0.conv1.weight" in shapes
    level = "encoder.down.{}.block.0.conv1.weight" if theirs else "encoder.down_blocks.{}.resnets.0.conv1.weight"
    levels = _count(shapes, "encoder.down" if theirs else "encoder.down_blocks")
    return {
        "block_out_channels": [shapes[level.format(i)][0] for i in range(levels)],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def _sd3(shapes: Shapes) -> dict[str, Any]:
    theirs = "joint_blocks.0.x_block.attn.qkv.weight" in shapes
    blocks, second = ("joint_blocks", "x_block.attn2") if theirs else ("transformer_blocks", "attn2")
    dual = {int(name.split(".")[1]) for name in shapes if name.startswith(blocks) and f".{second}." in name}
    return {
        "num_layers": _count(shapes, blocks),
        "num_attention_heads": shapes["context_embedder.weight"][0] // 64,
        "caption_projection_dim": shapes["context_embedder.weight"][0],
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes[
            "y_embedder.mlp.0.weight" if theirs else "time_text_embed.text_embedder.linear_1.weight"
        ][1],
        "pos_embed_max_size": round(shapes["pos_embed" if theirs else "pos_embed.pos_embed"][1] ** 0.5),
        "dual_attention_layers": sorted(dual),
        "qk_norm": "rms_norm" if any(".ln_q." in name or ".norm_q." in name for name in shapes) else None,
    }


def _flux(shapes: Shapes) -> dict[str, Any]:
    theirs = "double_blocks.0.img_attn.qkv.weight" in shapes
    text, pooled = (
        ("txt_in", "vector_in.in_layer") if theirs else ("context_embedder", "time_text_embed.text_embedder.linear_1")
    )
    return {
        "num_layers": _count(shapes, "double_blocks" if theirs else "transformer_blocks"),
        "num_single_layers": _count(shapes, "single_blocks" if theirs else "single_transformer_blocks"),
        "num_attention_heads": shapes[f"{text}.weight"][0] // 128,
        "joint_attention_dim": shapes[f"{text}.weight"][1],
        "pooled_projection_dim": shapes[f"{pooled}.weight"][1],
        "guidance_embeds": any("guidance" in name for name in shapes),
    }


_FITTED = {
    "UNet2DConditionModel": _unet,
    "AutoencoderKL": _vae,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
}


def _count(shapes: Shapes, blocks: str) -> int:
    """How many ``blocks.N`` there are."""
    pattern = re.compile(rf"{re.escape(blocks)}\.(\d+)\.")
    return 1 + max((int(match[1]) for name in shapes if (match := pattern.match(name))), default=-1)
