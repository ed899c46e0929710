"""The names of LDM's (CompVis', Stability's SGM) files for ``diffusers``' networks: SD 1.x, 2.x and SDXL, the way out.

``diffusers`` has the way in (``loaders.single_file_utils``), which undoes what is done here in the tests.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.formats.open_clip import open_clip_text_layout

_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE = {
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_BLOCK = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def unet_names(names: Collection[str], layers_per_block: int) -> dict[str, str]:
    """LDM's name for each of ``names``, modules or tensors of a ``UNet2DConditionModel``, as far as it has one.

    >>> unet_names(["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"], 2)
    {'down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q': 'input_blocks.4.1.transformer_blocks.0.attn1.to_q'}
    """
    attending = {match[1] for name in names if (match := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}
    found = {name: _unet_name(name, layers_per_block + 1, attending) for name in names}
    return {name: theirs for name, theirs in found.items() if theirs is not None}


def _unet_name(name: str, step: int, attending: Collection[str]) -> str | None:
    match = _BLOCK.fullmatch(name)
    if match is None:
        return next((new + name[len(old) :] for old, new in _UNET.items() if f"{name}.".startswith(f"{old}.")), None)
    side, block, kind, layer, rest = match.groups()
    if kind == "resnets":
        rest = _renamed(rest, _UNET_RESNET)
    if side is None:
        return f"middle_block.{2 * int(layer) if kind == 'resnets' else 1}.{rest}"
    first = step * int(block)
    if kind == "downsamplers":
        return f"input_blocks.{first + step}.0.{_renamed(rest, {'conv': 'op'})}"
    if kind == "upsamplers":
        return f"output_blocks.{first + step - 1}.{2 if block in attending else 1}.{rest}"
    place = f"input_blocks.{first + int(layer) + 1}" if side == "down" else f"output_blocks.{first + int(layer)}"
    return f"{place}.{1 if kind == 'attentions' else 0}.{rest}"


def _vae_name(name: str, levels: int) -> str:
    coder, dot, inner = name.partition(".")
    match = _BLOCK.fullmatch(inner)
    if match is None:
        return coder + dot + _renamed(inner, _VAE)  # quant_conv and post_quant_conv keep their names
    side, block, kind, layer, rest = match.groups()
    rest = _renamed(rest, _VAE)
    if side is None:
        return f"{coder}.mid.{'attn_1' if kind == 'attentions' else f'block_{int(layer) + 1}'}.{rest}"
    level = int(block) if side == "down" else levels - 1 - int(block)
    part = {"downsamplers": "downsample", "upsamplers": "upsample"}.get(kind, f"block.{layer}")
    return f"{coder}.{side}.{level}.{part}.{rest}"


def _renamed(name: str, table: Mapping[str, str]) -> str:
    """``name`` with its beginning, whole words, changed as ``table`` says."""
    return next((new + name[len(old) :] for old, new in table.items() if f"{name}.".startswith(f"{old}.")), name)


def ldm_state_dict(pipe: Any) -> dict[str, Tensor]:
    """All weights of a Stable Diffusion or SDXL pipeline under the names of a single file.

    Raises:
        ConfigurationError: another pipeline, or a UNet with blocks that these files have no names for.
    """
    kind = type(pipe).__name__
    if kind not in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        raise ConfigurationError(
            f"{kind}: a single file is written for Stable Diffusion 1.x, 2.x and SDXL alone; write a pipeline folder "
            "instead (--to pipeline)"
        )
    weights = pipe.unet.state_dict()
    per_block = pipe.unet.config.layers_per_block
    names = unet_names(weights, per_block) if isinstance(per_block, int) else {}
    if unnamed := [name for name in weights if name not in names]:
        raise ConfigurationError(
            f"{len(unnamed)} of the UNet's weights, such as {unnamed[0]}, have no place in a single file; write a "
            "pipeline folder instead (--to pipeline)"
        )
    state = {f"model.diffusion_model.{names[name]}": value for name, value in weights.items()}
    levels = len(pipe.vae.config.block_out_channels)
    for name, value in pipe.vae.state_dict().items():
        linear = ".attentions." in name and value.ndim == 2  # a convolution there
        state[f"first_stage_model.{_vae_name(name, levels)}"] = value[..., None, None] if linear else value
    encoder = _text_state(pipe.text_encoder)
    if kind == "StableDiffusionXLPipeline":
        second = open_clip_text_layout(_text_state(pipe.text_encoder_2))
        state |= {f"conditioner.embedders.0.transformer.{name}": value for name, value in encoder.items()}
        state |= {f"conditioner.embedders.1.model.{name}": value for name, value in second.items()}
    elif pipe.text_encoder.config.hidden_act == "quick_gelu":  # OpenAI's CLIP, SD 1.x
        state |= {f"cond_stage_model.transformer.{name}": value for name, value in encoder.items()}
    else:  # SD 2.x: OpenCLIP's, whose last layer, which nothing reads, diffusers' folders lack
        state |= {f"cond_stage_model.model.{name}": value for name, value in open_clip_text_layout(encoder).items()}
    return {name: value.contiguous() for name, value in state.items()}


def _text_state(encoder: Any) -> dict[str, Tensor]:
    """transformers >= 5.6 has flattened ``CLIPTextModel``; files have its tensors under ``text_model.``."""
    state = encoder.state_dict()
    flat = not any(name.startswith("text_model.") for name in state)
    return {f"text_model.{name}" if flat else name: value for name, value in state.items()}
