"""Narrow models with the block structure and the tensor names of published ones, and the makers' own names for them.

The names are written out here from the makers' layouts, the other way round than ``diffusers``' converters go.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from tiny_pipelines.others import mistral
from tiny_pipelines.parts import clip, qwen3, qwen_vl, t5
from torch import Tensor, nn
from transformers import CLIPTextConfig, Mistral3ForConditionalGeneration, Qwen3ForCausalLM, Qwen3Model

from nemo_aligner_diffusion.diffusion.files.architectures import ARCHITECTURES

WIDTH, SECOND = 16, 32  # of text encoders; the second CLIP is wider, as the published ones are
# heads that the published configurations state divide these; a head is as wide as published
_FEW: dict[str, Any] = {"num_layers": 2, "num_attention_heads": 2}
NARROW: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": [32, 64, 128, 128], "cross_attention_dim": WIDTH},
    "sd21": {"block_out_channels": [160] * 4, "cross_attention_dim": WIDTH},
    "sdxl": {
        "block_out_channels": [160] * 3,
        "cross_attention_dim": WIDTH + SECOND,
        "projection_class_embeddings_input_dim": 6 * 256 + SECOND,
    },
    "sd35": {
        **_FEW,
        "caption_projection_dim": 128,
        "joint_attention_dim": WIDTH + SECOND,
        "pooled_projection_dim": WIDTH + SECOND,
        "dual_attention_layers": [0],
        "pos_embed_max_size": 16,
    },
    "flux1": {**_FEW, "num_single_layers": 2, "joint_attention_dim": WIDTH + SECOND, "pooled_projection_dim": WIDTH},
    "flux2": {**_FEW, "num_single_layers": 2, "joint_attention_dim": 3 * WIDTH},
    "flux2_klein": {**_FEW, "num_single_layers": 2, "joint_attention_dim": 3 * WIDTH},
    "qwen_image": {**_FEW, "joint_attention_dim": WIDTH},
    "z_image": {"dim": 256, "n_heads": 2, "n_kv_heads": 2, "n_layers": 2, "n_refiner_layers": 1, "cap_feat_dim": WIDTH},
}
_KLEIN = ARCHITECTURES["flux2_klein"]
# its transformer is klein's class, with the sizes that are the class's defaults
_FLUX2 = replace(
    _KLEIN,
    pipeline="Flux2Pipeline",
    components={
        "transformer": ("Flux2Transformer2DModel", {}),
        "vae": _KLEIN.components["vae"],
        "text_encoder": ("Mistral3ForConditionalGeneration", {}),
    },
)
PUBLISHED = {name: ARCHITECTURES.get(name, _FLUX2) for name in NARROW}
# deep enough for the layers that the pipelines read by default
TEXT = {
    "CLIPTextModel": clip,
    "CLIPTextModelWithProjection": lambda: clip(projection=True),
    "T5EncoderModel": lambda: t5(WIDTH + SECOND),
    "Qwen3ForCausalLM": lambda: qwen3(Qwen3ForCausalLM, layers=28),
    "Qwen3Model": lambda: qwen3(Qwen3Model),
    "Qwen2_5_VLForConditionalGeneration": qwen_vl,
    "Mistral3ForConditionalGeneration": lambda: mistral(Mistral3ForConditionalGeneration, layers=30),
}


def narrow(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline of an architecture, narrow, of random weights."""
    torch.manual_seed(seed)
    known = PUBLISHED[name]
    denoiser, config = known.components[known.denoiser]
    autoencoder, decoding = known.components["vae"]
    thin = {"base_dim": 8} if autoencoder == "AutoencoderKLQwenImage" else {"block_out_channels": [32] * 4}
    parts: dict[str, Any] = {
        known.denoiser: getattr(diffusers, denoiser).from_config({**config, **NARROW[name]}),
        "vae": getattr(diffusers, autoencoder).from_config({**decoding, **thin}),
    }
    for part, (kind, _) in known.components.items():
        if part.startswith("text_encoder"):
            encoder, tokenizer = TEXT[kind]()
            if part == "text_encoder_2" and not kind.startswith("T5"):
                wider = {**encoder.config.to_dict(), "hidden_size": SECOND, "projection_dim": SECOND}
                encoder = type(encoder)(CLIPTextConfig(**wider))
            parts[part], parts[part.replace("text_encoder", "tokenizer")] = encoder, tokenizer
    for part in parts.values():
        if isinstance(part, nn.Module):
            for parameter in part.parameters():
                if parameter.ndim < 2:  # norms and biases: none stays at 1 or 0
                    parameter.data += 0.05 * torch.randn(parameter.shape)
            part.to(dtype).eval()
    kind, config = known.scheduler
    options = {"safety_checker": None, "feature_extractor": None} if name in ("sd15", "sd21") else {}
    options |= {"requires_safety_checker": False} if options else {"add_watermarker": False} if name == "sdxl" else {}
    pipe = getattr(diffusers, known.pipeline)(
        **parts, **options, scheduler=getattr(diffusers, kind).from_config(config)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_text(pipe: Any, folder: Path, weights: bool = True) -> Path:
    """Text encoders and tokenizers as a pipeline's folder has them; without weights: what a whole file needs beside."""
    for name, part in pipe.components.items():
        if name.startswith("tokenizer"):
            part.save_pretrained(folder / name)
        elif name.startswith("text_encoder"):
            part.save_pretrained(folder / name) if weights else part.config.save_pretrained(folder / name)
    return folder


def whole_file(name: str, pipe: Any, file: Path) -> Path:
    """The pipeline as its makers publish it in one file."""
    state: dict[str, Tensor] = {f"first_stage_model.{n}": t for n, t in vae_names(pipe.vae.state_dict()).items()}
    if name == "sd35":
        state |= {f"model.diffusion_model.{n}": t for n, t in sd3_names(pipe.transformer).items()}
        for encoder, theirs in (("", "clip_l"), ("_2", "clip_g"), ("_3", "t5xxl")):
            text = getattr(pipe, f"text_encoder{encoder}").state_dict()
            state |= {f"text_encoders.{theirs}.transformer.{n}": t for n, t in text.items()}
        state.pop("text_encoders.t5xxl.transformer.encoder.embed_tokens.weight", None)
    else:
        state |= {f"model.diffusion_model.{n}": t for n, t in unet_names(pipe.unet.state_dict()).items()}
        encoder = hugging_face_names(pipe.text_encoder)
        if name == "sd15":
            state |= {f"cond_stage_model.transformer.{n}": t for n, t in encoder.items()}
            state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(8)[None]
        elif name == "sd21":
            state |= {f"cond_stage_model.model.{n}": t for n, t in open_clip_names(encoder).items()}
            state["cond_stage_model.model.text_projection"] = torch.eye(WIDTH)
        else:
            second = hugging_face_names(pipe.text_encoder_2)
            state |= {f"conditioner.embedders.0.transformer.{n}": t for n, t in encoder.items()}
            state |= {f"conditioner.embedders.1.model.{n}": t for n, t in open_clip_names(second).items()}
            state["conditioner.embedders.1.model.logit_scale"] = torch.tensor(1.0)
        state |= {"alphas_cumprod": torch.rand(1000), "model_ema.num_updates": torch.tensor(3)}
    save_file({key: value.detach().clone().contiguous() for key, value in state.items()}, file)
    return file


def unet_names(state: dict[str, Any], layers: int = 2) -> dict[str, Any]:
    """LDM's names of a UNet's tensors (or of anything by those names)."""
    crossed = {int(n.split(".")[1]) for n in state if re.match(r"up_blocks\.\d+\.attentions", n)}
    fixed = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    inner = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
             "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}  # fmt: skip
    renamed = {}
    for name, value in state.items():
        head = next((old for old in fixed if name.startswith(f"{old}.")), None)
        if head is not None:
            new, rest = fixed[head], name[len(head) + 1 :]
            is_resnet = ".resnets." in head
        else:
            side, block, what, index, *others = name.split(".")
            position = int(block) * (layers + 1) + (int(index) if what in ("resnets", "attentions") else layers)
            rest, is_resnet = ".".join(others), what == "resnets"
            new = f"input_blocks.{position + 1}" if side == "down_blocks" else f"output_blocks.{position}"
            if what == "downsamplers":
                new, rest = f"{new}.0.op", rest.removeprefix("conv.")
            elif what == "upsamplers":
                new = f"{new}.{2 if int(block) in crossed else 1}"
            else:
                new = f"{new}.{0 if is_resnet else 1}"
        if is_resnet:
            first, _, tail = rest.partition(".")
            rest = f"{inner[first]}.{tail}"
        renamed[f"{new}.{rest}"] = value
    return renamed


def vae_names(state: dict[str, Any]) -> dict[str, Any]:
    """LDM's names of a VAE's tensors; its attention is made of convolutions."""
    levels = 1 + max(int(n.split(".")[2]) for n in state if n.startswith("encoder.down_blocks."))
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    renamed = {}
    for name, value in state.items():
        new = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = new.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0." in new:
            for ours, theirs in attention.items():
                new = new.replace(f"attentions.0.{ours}.", f"attn_1.{theirs}.")
            new = new.replace("mid_block.", "mid.")
            if new.endswith("weight") and value.ndim == 2:
                value = value[:, :, None, None]
        renamed[new] = value
    return renamed


def hugging_face_names(encoder: Any) -> dict[str, Tensor]:
    """As transformers before 5.6 named them: all below ``text_model``."""
    return {
        name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": tensor
        for name, tensor in encoder.state_dict().items()
    }


def open_clip_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    rules = {"text_model.embeddings.token_embedding.weight": "token_embedding.weight",
             "text_model.embeddings.position_embedding.weight": "positional_embedding",
             "text_model.final_layer_norm": "ln_final", "text_model.encoder.layers": "transformer.resblocks",
             "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
    renamed = {}
    for name, tensor in state.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            tensor = torch.cat([state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
        if name == "text_projection.weight":
            name, tensor = "text_projection", tensor.T
        for old, new in rules.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed


def sd3_names(transformer: Any) -> dict[str, Tensor]:
    """SD 3's own names; queries, keys and values are one matrix, and shift stands before scale."""
    state = transformer.state_dict()
    last = transformer.config.num_layers - 1
    fixed = {"pos_embed.pos_embed": "pos_embed", "pos_embed.proj": "x_embedder.proj", "proj_out": "final_layer.linear",
             "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
             "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
             "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
             "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
             "norm_out.linear": "final_layer.adaLN_modulation.1"}  # fmt: skip
    within = {"attn.norm_q": "x_block.attn.ln_q", "attn.norm_k": "x_block.attn.ln_k",
              "attn.norm_added_q": "context_block.attn.ln_q", "attn.norm_added_k": "context_block.attn.ln_k",
              "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj",
              "attn2.norm_q": "x_block.attn2.ln_q", "attn2.norm_k": "x_block.attn2.ln_k",
              "attn2.to_out.0": "x_block.attn2.proj", "norm1.linear": "x_block.adaLN_modulation.1",
              "norm1_context.linear": "context_block.adaLN_modulation.1", "ff.net.0.proj": "x_block.mlp.fc1",
              "ff.net.2": "x_block.mlp.fc2", "ff_context.net.0.proj": "context_block.mlp.fc1",
              "ff_context.net.2": "context_block.mlp.fc2"}  # fmt: skip
    fused = {"attn.to_q": "x_block.attn.qkv", "attn2.to_q": "x_block.attn2.qkv",
             "attn.add_q_proj": "context_block.attn.qkv"}  # fmt: skip
    renamed = {}
    for name, tensor in state.items():
        if re.search(r"\.(to_[kv]|add_[kv]_proj)\.", name):
            continue
        swapped = name.startswith(("norm_out.", f"transformer_blocks.{last}.norm1_context."))
        if swapped:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        for ours, theirs in fused.items():
            if f".{ours}." in name:
                letters = [name.replace("to_q", f"to_{x}").replace("add_q", f"add_{x}") for x in "qkv"]
                tensor = torch.cat([state[letter] for letter in letters])
                name = name.replace(ours, theirs)
        for ours, theirs in within.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        for ours, theirs in fixed.items():
            if name == ours or name.startswith(f"{ours}."):
                name = theirs + name[len(ours) :]
        renamed[name.replace("transformer_blocks.", "joint_blocks.")] = tensor
    return renamed


def flux_names(transformer: Any) -> dict[str, Tensor]:
    """FLUX.1's own names; queries, keys and values (and in single blocks the feed-forward) are one matrix."""
    state = transformer.state_dict()
    fixed = {"time_text_embed.timestep_embedder": "time_in", "time_text_embed.text_embedder": "vector_in",
             "time_text_embed.guidance_embedder": "guidance_in", "context_embedder": "txt_in", "x_embedder": "img_in",
             "norm_out.linear": "final_layer.adaLN_modulation.1", "proj_out": "final_layer.linear",
             "single_transformer_blocks": "single_blocks", "transformer_blocks": "double_blocks"}  # fmt: skip
    double = {"linear_1": "in_layer", "linear_2": "out_layer", "norm1.linear": "img_mod.lin",
              "norm1_context.linear": "txt_mod.lin", "attn.to_q": "img_attn.qkv", "attn.add_q_proj": "txt_attn.qkv",
              "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
              "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
              "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
              "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale", "attn.to_out.0": "img_attn.proj",
              "attn.to_add_out": "txt_attn.proj", "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2",
              "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2"}  # fmt: skip
    single = {"norm.linear": "modulation.lin", "attn.to_q": "linear1", "proj_out": "linear2",
              "attn.norm_q.weight": "norm.query_norm.scale", "attn.norm_k.weight": "norm.key_norm.scale"}  # fmt: skip
    renamed = {}
    for name, tensor in state.items():
        if re.search(r"\.(to_[kv]|add_[kv]_proj|proj_mlp)\.", name):
            continue
        if ".to_q." in name or ".add_q_proj." in name:
            parts = [name.replace("to_q", f"to_{x}").replace("add_q", f"add_{x}") for x in "qkv"]
            parts += [name.replace("attn.to_q", "proj_mlp")] if name.startswith("single") else []
            tensor = torch.cat([state[part] for part in parts])
        if name.startswith("norm_out."):  # shift stands before scale
            tensor = torch.cat(tensor.chunk(2)[::-1])
        head = next(ours for ours in fixed if name.startswith(f"{ours}."))
        rest = name[len(head) :]
        for ours, theirs in (single if head.startswith("single") else double).items():
            rest = rest.replace(f".{ours}", f".{theirs}")
        renamed[fixed[head] + rest] = tensor
    return renamed
