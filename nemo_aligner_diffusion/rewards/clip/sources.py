"""CLIP weights as people have them, read without running any code: Hugging Face folders and OpenCLIP checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_aligner_diffusion.errors import CheckpointError, RewardError
from nemo_aligner_diffusion.formats import open_clip as open_clip_layout
from nemo_aligner_diffusion.formats.checkpoints import read_tensors
from nemo_aligner_diffusion.formats.files import read_json
from nemo_aligner_diffusion.formats.hub import locate
from nemo_aligner_diffusion.formats.open_clip import OpenClipChoices
from nemo_aligner_diffusion.rewards.support.archive import filled
from nemo_aligner_diffusion.rewards.support.image_processor import ImageProcessor
from nemo_aligner_diffusion.rewards.support.preprocessing import Preprocessing
from nemo_aligner_diffusion.rewards.support.pretrained import PATTERNS, holds_weights, load_model, load_processor

if TYPE_CHECKING:
    from transformers import CLIPModel

OPEN_CLIP_WEIGHTS = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"),
)
OPEN_CLIP_CONFIG = "open_clip_config.json"
_OPEN_CLIP_RESIZES = {"shortest": "crop", "longest": "pad", "squash": "squash"}


def locate_clip(source: str | Path) -> Path:
    """The local folder or file of a CLIP given as a path or as ``owner/name`` on the Hugging Face Hub."""
    return locate(
        source,
        (*PATTERNS, *(("*.json", "merges.txt", name) for name in OPEN_CLIP_WEIGHTS)),
        lambda folder: holds_weights(folder) or _first(folder, OPEN_CLIP_WEIGHTS) is not None,
        "the weights of a CLIP",
    )


def read_clip(path: Path, choices: OpenClipChoices) -> tuple[CLIPModel, Preprocessing]:
    """The CLIP in a Hugging Face folder, an OpenCLIP folder or checkpoint, and what its pictures go through.

    Args:
        path: see the module's docstring.
        choices: what OpenCLIP's tensors don't say; heads and activation of a Hugging Face folder stand in its config.

    Raises:
        CheckpointError, RewardError: there are no such weights, they cannot be read safely, or are not a CLIP's.
    """
    from transformers import CLIPConfig, CLIPModel

    if path.is_dir():
        if (path / "config.json").is_file() and holds_weights(path):
            return _read_hf(path, choices)
        weights = _first(path, OPEN_CLIP_WEIGHTS)
        if weights is None:
            raise CheckpointError(
                f"{path}: no CLIP here: it holds {', '.join(sorted(p.name for p in path.iterdir())[:8]) or 'nothing'}; "
                f"expected config.json and model.safetensors, or one of {', '.join(OPEN_CLIP_WEIGHTS)}."
            )
        path = weights
    state = read_tensors(path)
    if not open_clip_layout.is_open_clip(state):
        beside = "Give the folder it lies in, with its config.json." if "vision_model." in " ".join(state) else ""
        raise CheckpointError(
            f"{path}: its tensors ({', '.join(list(state)[:3])}, …) are not named as OpenCLIP names them. {beside}"
        )
    config_path = path.parent / OPEN_CLIP_CONFIG
    given = read_json(config_path, CheckpointError) if config_path.is_file() else {}
    sections, converted = open_clip_layout.hf_layout(state, path, choices, _section(given, "model_cfg"))
    prepared = _section(given, "preprocess_cfg")
    resize = str(prepared.get("resize_mode") or "shortest")
    if resize not in _OPEN_CLIP_RESIZES:
        raise CheckpointError(
            f"{config_path}: resize_mode is {resize!r}; known are {', '.join(_OPEN_CLIP_RESIZES)}. Give --resize."
        )
    remedy = "Check --vision-heads and --text-heads."
    model = filled(lambda: CLIPModel(CLIPConfig(**sections)), converted, path, CheckpointError, remedy)
    stated = {key: prepared[key] for key in ("mean", "std", "interpolation") if prepared.get(key)}
    return model, _preprocessing(config_path, model, resize=_OPEN_CLIP_RESIZES[resize], **stated)


def _read_hf(folder: Path, choices: OpenClipChoices) -> tuple[CLIPModel, Preprocessing]:
    if choices != OpenClipChoices():
        raise CheckpointError(
            f"{folder}: --activation, --vision-heads and --text-heads are for OpenCLIP checkpoints; this folder's "
            "config.json states them. Leave them out."
        )
    model: CLIPModel = load_model("CLIPModel", folder, str(folder), "a CLIP", ("clip",))
    vision: Any = model.config.vision_config
    path = _first(folder, ("preprocessor_config.json", "processor_config.json"))
    if path is None:
        return model, _preprocessing(folder, model, resize="crop_down")
    processor = load_processor("AutoImageProcessor", folder, str(folder), "an image processor")
    steps = ImageProcessor.of(processor, str(folder))
    square = (vision.image_size, vision.image_size)
    resizes = {(vision.image_size, square): "crop_down", (square, None): "squash", (square, square): "squash"}
    resize = resizes.get((steps.resize, steps.crop))
    if resize is None or processor.resample not in (2, 3) or not steps.is_plain or steps.mean is None:
        raise CheckpointError(
            f"{path}: resizes to {steps.resize} and crops to {steps.crop} with Pillow's filter {processor.resample}; "
            f"expected {vision.image_size} pixels, bicubic (3) or bilinear (2), then mean and deviation. Remove the "
            "file to use CLIP's own preparation."
        )
    mean, std = steps.mean, steps.std
    return model, _preprocessing(path, model, interpolation=steps.interpolation, resize=resize, mean=mean, std=std)


def _preprocessing(origin: Path, model: CLIPModel, **stated: Any) -> Preprocessing:
    vision: Any = model.config.vision_config
    try:
        return Preprocessing(vision.image_size, **stated)
    except RewardError as error:
        raise CheckpointError(f"{origin}: {error}") from error


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = config.get(key)
    return section if isinstance(section, Mapping) else {}
