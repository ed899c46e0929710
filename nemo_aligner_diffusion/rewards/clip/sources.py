"""CLIP weights as people have them, read without running any code: Hugging Face folders and OpenCLIP checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nemo_aligner_diffusion.errors import CheckpointError, RewardError
from nemo_aligner_diffusion.formats import open_clip as open_clip_layout
from nemo_aligner_diffusion.formats.checkpoints import read_tensors
from nemo_aligner_diffusion.formats.files import read_json
from nemo_aligner_diffusion.formats.hub import locate
from nemo_aligner_diffusion.formats.open_clip import OpenClipChoices
from nemo_aligner_diffusion.rewards.clip.archive import TEXT_KEYS, TOP_KEYS, VISION_KEYS, fields
from nemo_aligner_diffusion.rewards.support.archive import filled
from nemo_aligner_diffusion.rewards.support.preprocessing import Preprocessing

if TYPE_CHECKING:
    from transformers import CLIPModel

HF_WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
OPEN_CLIP_WEIGHTS = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"),
)
OPEN_CLIP_CONFIG = "open_clip_config.json"
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_SMALL_FILES = ("*.json", "merges.txt")
_PILLOW_FILTERS = {2: "bilinear", 3: "bicubic"}
_OPEN_CLIP_RESIZES = {"shortest": "crop", "longest": "pad", "squash": "squash"}


def locate_clip(source: str | Path) -> Path:
    """The local folder or file of a CLIP given as a path or as ``owner/name`` on the Hugging Face Hub."""
    return locate(
        source,
        (
            (*_SMALL_FILES, "model.safetensors", "model-*.safetensors"),
            (*_SMALL_FILES, "pytorch_model.bin", "pytorch_model-*.bin"),
            *((*_SMALL_FILES, name) for name in OPEN_CLIP_WEIGHTS),
        ),
        lambda folder: _first(folder, (*HF_WEIGHTS, *OPEN_CLIP_WEIGHTS)) is not None,
        "the weights of a CLIP",
    )


def read_clip(path: Path, choices: OpenClipChoices) -> tuple[CLIPModel, Preprocessing]:
    """The CLIP in a Hugging Face folder, an OpenCLIP folder or checkpoint, and what its pictures go through.

    Args:
        path: see the module's docstring.
        choices: what OpenCLIP's tensors don't say; heads and activation of a Hugging Face folder stand in its config.

    Raises:
        CheckpointError: there are no such weights, they cannot be read safely, or they are not a CLIP's.
    """
    if path.is_dir():
        if (path / "config.json").is_file() and (weights := _first(path, HF_WEIGHTS)) is not None:
            return _read_hf(path, weights, choices)
        weights = _first(path, OPEN_CLIP_WEIGHTS)
        if weights is None:
            raise CheckpointError(
                f"{path}: no CLIP here: it holds {', '.join(sorted(p.name for p in path.iterdir())[:8]) or 'nothing'}; "
                f"expected config.json and one of {', '.join(HF_WEIGHTS)}, or one of {', '.join(OPEN_CLIP_WEIGHTS)}."
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
    model = _build(sections, converted, path)
    stated = {key: prepared[key] for key in ("mean", "std", "interpolation") if prepared.get(key)}
    return model, _preprocessing(config_path, model, resize=_OPEN_CLIP_RESIZES[resize], **stated)


def _read_hf(folder: Path, weights: Path, choices: OpenClipChoices) -> tuple[CLIPModel, Preprocessing]:
    from transformers import CLIPConfig

    kind = read_json(folder / "config.json", CheckpointError).get("model_type")
    if kind != "clip":
        raise CheckpointError(
            f"{folder}: config.json describes a model of type {str(kind)[:100]!r}; expected 'clip'. SigLIP, BLIP and "
            "other families cannot be converted as a CLIP."
        )
    if choices != OpenClipChoices():
        raise CheckpointError(
            f"{folder}: --activation, --vision-heads and --text-heads are for OpenCLIP checkpoints; this folder's "
            "config.json states them. Leave them out."
        )
    # from_pretrained follows the older ways of writing this file; only known fields are taken from what it gives.
    given: Any = CLIPConfig.from_pretrained(folder)
    sections = {
        **fields(given, TOP_KEYS),
        "text_config": fields(given.text_config, TEXT_KEYS),
        "vision_config": fields(given.vision_config, VISION_KEYS),
    }
    files = [weights.name]
    if weights.suffix == ".json":
        files = sorted({str(name) for name in _section(read_json(weights, CheckpointError), "weight_map").values()})
        if not files or any(Path(name).name != name for name in files):
            raise CheckpointError(f"{weights}: its weight_map names no files of this folder.")
    state: dict[str, Tensor] = {}
    for name in files:
        state |= read_tensors(folder / name)
    model = _build(sections, state, folder)
    return model, _hf_preprocessing(folder, model)


def _build(sections: Mapping[str, Any], state: Mapping[str, Tensor], origin: Path) -> CLIPModel:
    from transformers import CLIPConfig, CLIPModel

    remedy = "Check its config.json, or --vision-heads and --text-heads."
    return filled(lambda: CLIPModel(CLIPConfig(**sections)), state, origin, CheckpointError, remedy)


def _preprocessing(origin: Path, model: CLIPModel, **stated: Any) -> Preprocessing:
    vision: Any = model.config.vision_config
    try:
        return Preprocessing(vision.image_size, **stated)
    except RewardError as error:
        raise CheckpointError(f"{origin}: {error}") from error


def _hf_preprocessing(folder: Path, model: CLIPModel) -> Preprocessing:
    """What a folder's image processor states; CLIP's own where there is none.

    Raises:
        CheckpointError: it prepares pictures in a way that cannot be followed.
    """
    vision: Any = model.config.vision_config
    path = _first(folder, _PROCESSORS)
    stated = read_json(path, CheckpointError) if path is not None else {}
    given = _section(stated, "image_processor") or stated
    size, crop = given.get("size"), given.get("crop_size")
    resize = "crop_down"
    if isinstance(size, Mapping) and "shortest_edge" not in size:
        resize, size = "squash", size.get("height") if size.get("height") == size.get("width") else size
    elif isinstance(size, Mapping):
        size = size["shortest_edge"]
    crop = crop.get("height") if isinstance(crop, Mapping) else crop
    interpolation = _PILLOW_FILTERS.get(given.get("resample", 3))
    sides = {side for side in (size, crop if resize == "crop_down" else None) if side is not None}
    if interpolation is None or not sides <= {vision.image_size}:
        raise CheckpointError(
            f"{path}: resizes to {given.get('size')} and crops to {given.get('crop_size')} with Pillow's filter "
            f"{given.get('resample')}; expected {vision.image_size} pixels, bicubic (3) or bilinear (2). Remove the "
            "file to use CLIP's own preparation."
        )
    stated = {key: given[f"image_{key}"] for key in ("mean", "std") if given.get(f"image_{key}")}
    return _preprocessing(path or folder, model, interpolation=interpolation, resize=resize, **stated)


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = config.get(key)
    return section if isinstance(section, Mapping) else {}
