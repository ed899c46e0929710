"""Which published architecture weights have: by their tensors' names and shapes, or by what a folder says.

No torch, but for pickles. Rules for single networks look at structure (levels, blocks, projections), not at widths;
names are ``diffusers``' or the makers' own (as in ``CHECKPOINT_KEY_NAMES`` of ``diffusers.loaders.single_file_utils``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_aligner_diffusion.diffusion.files.architectures import ARCHITECTURES, unet_levels
from nemo_aligner_diffusion.diffusion.settings import WeightsSettings
from nemo_aligner_diffusion.embedded_assets import embedded_model_path
from nemo_aligner_diffusion.errors import CheckpointError, printable
from nemo_aligner_diffusion.formats.files import read_json
from nemo_aligner_diffusion.formats.hub import locate
from nemo_aligner_diffusion.formats.weight_files import (
    VARIANTS,
    Shapes,
    find_weights,
    has_weights,
    inner_names,
    read_shapes,
    weight_patterns,
    what_is_in,
)

EMBEDDED = "embedded"
INDEX = "model_index.json"
# what is read to find out what a pipeline's folder is, and to build it without its weights
SMALL_FILES = ("*.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.jinja")

_PLAIN = "StableDiffusionPipeline"  # of two architectures, told apart by their text encoders' width or projections
_OF_WIDTH = {768: "sd15", 1024: "sd21"}
_PIPELINES = {
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd35",
    "FluxPipeline": "flux1",
    "Flux2Pipeline": "flux2",
    "Flux2KleinPipeline": "flux2_klein",
    "QwenImagePipeline": "qwen_image",
    "ZImagePipeline": "z_image",
}
# input channels of UNets that need more than a prompt
_OTHER_INPUTS = {
    9: ("an inpainting model", "it paints into a given picture"),
    8: ("InstructPix2Pix", "it edits a given picture"),
    7: ("the x4 upscaler", "it enlarges a given picture"),
    5: ("the depth-to-image model", "it needs a depth map"),
}
# the tensor that has its name only there -> architecture; the first that fits. Names of the makers, then diffusers'
_TRANSFORMERS = (
    ("distilled_guidance_layer.in_proj.bias", "Chroma"),
    ("double_stream_modulation_img.lin.weight", "flux2_klein"),
    ("double_stream_modulation_img.linear.weight", "flux2_klein"),
    ("joint_blocks.0.x_block.attn.qkv.weight", "sd35"),
    ("double_blocks.0.img_attn.qkv.weight", "flux1"),
    ("cap_embedder.0.weight", "z_image"),
    ("transformer_blocks.0.img_mod.1.weight", "qwen_image"),
    ("single_transformer_blocks.0.proj_mlp.weight", "flux1"),
    ("pos_embed.pos_embed", "sd35"),
    ("double_layers.0.attn.w2q.weight", "AuraFlow"),
    ("head.modulation", "Wan"),
)
_GUIDED = ("guidance_in.", "time_guidance_embed.guidance_embedder.")  # FLUX.2's, which klein does without
_UNETS = ("input_blocks.0.0.weight", "down_blocks.0.resnets.0.time_emb_proj.weight")
_VAES = ("decoder.mid.block_1.conv1.weight", "decoder.mid_block.resnets.0.conv1.weight")
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"  # names of empty tensors that say how a file was trained


@dataclass(frozen=True)
class Recognised:
    """What a checkpoint is.

    Attributes:
        architecture: ``embedded``, ``sd15``, ``sd21``, ``sdxl``, ``sd35``, ``flux1``, ``flux2``, ``flux2_klein``,
            ``qwen_image``, ``z_image``; empty: another, or not known.
        pipeline: name of the ``diffusers`` pipeline class; empty: not known.
        because: by what it was recognised, half a sentence.
        v_prediction, zero_snr: marked in a file: it predicts v; its last noise level has no signal.
    """

    architecture: str
    pipeline: str
    because: str
    v_prediction: bool = False
    zero_snr: bool = False


def recognise(weights: WeightsSettings, fetch: bool = False) -> Recognised:
    """The architecture of the model that ``weights`` names.

    Args:
        fetch: ask the hub for a repository's small files where the local cache has none of them.

    Raises:
        CheckpointError: a file that is damaged or no model's, or a model that makes no pictures from prompts alone.
            What is missing is not this function's business.
    """
    source = weights.from_pretrained or weights.denoiser_path
    if source is None:
        return Recognised(EMBEDDED, _PLAIN, "no model is named: the embedded one")
    try:
        if weights.from_pretrained is None:
            path = own_folder(source, "unet", fetch)
        else:
            path = locate(
                source, (SMALL_FILES,), lambda folder: (folder / INDEX).exists(), INDEX, weights.revision, fetch
            )
    except CheckpointError:
        return Recognised("", "", f"{source} is not here")
    if path.is_dir() and path.resolve() == embedded_model_path().resolve():
        return Recognised(EMBEDDED, _PLAIN, f"{path} is the embedded model")
    if weights.from_pretrained is not None and path.is_dir():
        return of_folder(path)
    if path.is_dir() and not has_weights(path) and not has_weights(path / "unet"):
        config = read_json(path / "config.json", CheckpointError) if (path / "config.json").exists() else {}
        found = of_pipeline(_PLAIN, lambda part: config)
        if not found.architecture:
            found = Recognised(
                EMBEDDED, _PLAIN, f"{path} is no known denoiser: the embedded model's is to have its place"
            )
        return found
    return of_file(path)


def own_folder(source: str | Path, component: str, fetch: bool = True) -> Path:
    """The file or folder of one network's weights, fetched where ``source`` is a hub id (as of many a VAE)."""
    patterns = [("*.json", *weight_patterns("", variant)) for variant in VARIANTS]
    return locate(source, patterns, has_weights, f"the {component}'s weights", fetch=fetch)


def of_folder(folder: Path) -> Recognised:
    """What the ``model_index.json`` of a pipeline's folder says."""
    kind = read_json(folder / INDEX, CheckpointError).get("_class_name") if (folder / INDEX).exists() else None
    if not isinstance(kind, str):
        return Recognised("", "", f"{folder} has no {INDEX} that names a pipeline")

    def config_of(part: str) -> Mapping[str, Any]:
        file = folder / part / "config.json"
        return read_json(file, CheckpointError) if file.exists() else {}

    return of_pipeline(kind, config_of)


def of_pipeline(kind: str, config_of: Callable[[str], Mapping[str, Any]]) -> Recognised:
    """The architecture of a pipeline.

    Args:
        kind: name of its class.
        config_of: component's name -> its configuration.
    """
    if kind != _PLAIN:
        return Recognised(_PIPELINES.get(kind, ""), kind, f"it is a {printable(kind, 80)}")
    config = config_of("unet")
    width, levels = config.get("cross_attention_dim"), config.get("block_out_channels")
    architecture = _OF_WIDTH.get(width, "") if isinstance(width, int) else ""
    if not architecture and isinstance(levels, list | tuple) and len(levels) == 4:
        architecture = "sd21" if config.get("use_linear_projection") else "sd15"
    if config.get("in_channels", 4) != 4 or config.get("class_embed_type"):
        architecture = ""
    return Recognised(architecture, kind, f"it is a {kind} with a text encoder {printable(width, 20)} wide")


def of_file(path: Path) -> Recognised:
    """What the weights in a file, or in a denoiser's own folder, are.

    Raises:
        CheckpointError: they are damaged, no denoiser's, or one's that makes no pictures from prompts alone.
    """
    file, _ = find_weights(path, "unet" if (path / "unet").is_dir() else "transformer")
    shapes = read_shapes(file)
    architecture = architecture_of(shapes, path)
    if architecture not in (EMBEDDED, *ARCHITECTURES, *_PIPELINES.values()):
        raise CheckpointError(
            f"{path}: this is {architecture}, of which single files are not read here. Give the diffusers folder or "
            f"hub id of its pipeline as model.from_pretrained"
        )
    known = ARCHITECTURES.get(architecture)
    pipeline = known.pipeline if known else next((p for p, a in _PIPELINES.items() if a == architecture), "")
    title = known.title if known else architecture
    return Recognised(architecture, pipeline or _PLAIN, f"{path} holds the weights of {title}", *_marks(shapes))


def marks_of(path: Path, component: str) -> Recognised:
    """The marks alone, of weights that go into a pipeline which is known."""
    return Recognised("", "", "", *_marks(read_shapes(find_weights(path, component)[0])))


def _marks(shapes: Shapes) -> tuple[bool, bool]:
    last = {name.rpartition(".")[2] for name in shapes}
    return V_PREDICTION in last, ZERO_SNR in last


def architecture_of(shapes: Shapes, source: Path) -> str:
    """``embedded``, an architecture's name, or what else this denoiser is.

    Raises:
        CheckpointError: no denoiser, or one that needs more than a prompt.
    """
    names = list(shapes)
    said = what_is_in(names)
    if said.startswith(("a LoRA", "a ControlNet", "weights quantized", "weights in scaled")):
        advice = "give a LoRA as model.peft.restore_from_path" if "LoRA" in said else "give the model's full weights"
        raise CheckpointError(f"{source}: holds {said}; {advice}")
    for anchor in _UNETS:
        if unet := inner_shapes(shapes, anchor):
            return _of_unet(unet, source, edm="edm_mean" in shapes)
    for anchor, architecture in _TRANSFORMERS:
        if inner := inner_shapes(shapes, anchor):
            return _of_transformer(inner, architecture, source)
    raise CheckpointError(f"{source}: holds no denoiser; what it holds looks like {said}. Give a UNet or a transformer")


def inner_shapes(shapes: Shapes, anchor: str) -> dict[str, tuple[int, ...]]:
    """Of the network with a tensor called ``anchor``, without what stands before its names; ``{}``: there is none."""
    found = inner_names(list(shapes), anchor)
    found = {prefix: inner for prefix, inner in found.items() if "control_model" not in prefix}
    best = max(found, key=lambda prefix: len(found[prefix]), default="")
    return {name: shapes[full] for name, full in found.get(best, {}).items()}


def _of_unet(shapes: Shapes, source: Path, edm: bool) -> str:
    theirs = "input_blocks.0.0.weight" in shapes
    first = shapes["input_blocks.0.0.weight" if theirs else "conv_in.weight"] if _has_first(shapes) else (0, 4)
    channels, levels = first[1], unet_levels(shapes)
    sized = "label_emb.0.0.weight" in shapes or "add_embedding.linear_1.weight" in shapes
    linear = any(name.endswith(".proj_in.weight") and len(shape) == 2 for name, shape in shapes.items())
    blocks = [match for name in shapes if (match := re.search(r"\.transformer_blocks\.(\d+)\.", name))]
    depth = 1 + max((int(match[1]) for match in blocks), default=-1)
    kind = "SDXL" if sized else "Stable Diffusion 2" if linear else "Stable Diffusion 1"
    other = ""
    if channels in _OTHER_INPUTS:
        what, why = _OTHER_INPUTS[channels]
        other = f"{what} of the {kind} kind ({channels} input channels): {why}"
    elif edm:
        other = "Playground v2.5: its noise schedule (EDM) stands in no file"
    elif sized and levels == 4:
        other = "the SDXL refiner: it finishes another model's picture" if depth == 4 else "an unCLIP model"
    elif "class_embedding.linear_1.weight" in shapes:
        other = "an unCLIP model: it varies a given picture"
    elif any(".motion_modules." in name for name in shapes):
        other = "a video model"
    elif "time_embedding.cond_proj.weight" in shapes:
        other = "a latent consistency model, which is told its guidance"
    elif sized and (levels, depth) != (3, 10):
        other = f"a reduced SDXL ({levels} levels, up to {depth} transformer blocks)"
    if other:
        raise CheckpointError(
            f"{source}: a UNet of {other}. Give the text-to-image model, or the diffusers folder of its pipeline as "
            f"model.from_pretrained"
        )
    if sized:
        return "sdxl"
    return ("sd21" if linear else "sd15") if levels == 4 else EMBEDDED


def _has_first(shapes: Shapes) -> bool:
    return any(len(shapes.get(name, ())) == 4 for name in ("input_blocks.0.0.weight", "conv_in.weight"))


def _of_transformer(shapes: Shapes, architecture: str, source: Path) -> str:
    if architecture == "flux2_klein" and any(name.startswith(_GUIDED) for name in shapes):
        return "flux2"
    into = shapes.get("img_in.weight") or shapes.get("x_embedder.weight") or (0, 64)
    if architecture == "flux1" and into[1] != 64:
        raise CheckpointError(
            f"{source}: a FLUX.1 transformer with {into[1]} input channels (fill, depth or canny): it needs a picture "
            f"beside the prompt. Give the text-to-image model"
        )
    return architecture


def vae_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Of the VAE in a file."""
    return next((inner for anchor in _VAES if (inner := inner_shapes(shapes, anchor))), {})


def denoiser_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Of the denoiser in a file."""
    anchors = (*_UNETS, *(anchor for anchor, _ in _TRANSFORMERS))
    return next((inner for anchor in anchors if (inner := inner_shapes(shapes, anchor))), {})
