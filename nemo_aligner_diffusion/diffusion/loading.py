"""From a ``diffusers`` folder (or hub id) to a :class:`.DiffusionModel`, with nothing in the folder naming code."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nemo_aligner_diffusion.diffusion.families import DENOISERS, family_of
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.errors import CheckpointError, ConfigurationError, first_line, printable
from nemo_aligner_diffusion.formats.checkpoints import component_config, empty_module, load_component
from nemo_aligner_diffusion.formats.files import read_json
from nemo_aligner_diffusion.runtime.messages import with_quiet_libraries

log = logging.getLogger(__name__)

_SAMPLE_SIZE = 64  # Stable Diffusion's: 512 pixels
_LIBRARIES = ("diffusers", "transformers")  # whose classes a folder may name
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# numpy and PIL parts that make no picture, and what only an image prompt needs
_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder", "watermark")


def load_model(
    folder: str | Path,
    denoiser_path: str | Path | None = None,
    vae_path: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    trained: str | None = None,
    stateless: Sequence[str] = (),
    arguments: Mapping[str, Any] | None = None,
) -> DiffusionModel:
    """Load the pipeline that ``folder``'s ``model_index.json`` names.

    Args:
        folder: a ``diffusers`` pipeline folder, or a hub id (``org/name``), fetched by ``huggingface_hub``.
        denoiser_path: ``model.unet_config.from_pretrained``: a folder or single file whose weights the denoiser gets.
        vae_path: ``model.first_stage_config.from_pretrained``, the same for the VAE.
        dtype: of all weights.
        trained, stateless, arguments: see :class:`.DiffusionModel`.

    Raises:
        CheckpointError: a part is missing, unreadable, does not fit, or names code that is not of diffusers or
            transformers.
        ConfigurationError: the pipeline makes no pictures from prompts, or has no such component or argument.
    """
    import diffusers  # noqa: F401 -- what has been imported can be kept quiet
    import transformers  # noqa: F401

    folder = _local(folder)
    with with_quiet_libraries():  # what a user must know of the weights is checked here
        pipe = _load(folder, denoiser_path, vae_path, dtype, trained)
    return DiffusionModel(pipe, trained, stateless, arguments)


def _load(
    folder: Path,
    denoiser_path: str | Path | None,
    vae_path: str | Path | None,
    dtype: torch.dtype,
    trained: str | None,
) -> Any:
    import diffusers

    index = _read_index(folder)
    pipeline_class = _pipeline_class(folder, index)
    parts: dict[str, Any] = {name: None for name in _LEFT_OUT if name in index}
    if "requires_safety_checker" in index:
        parts["requires_safety_checker"] = False
    denoiser = trained or family_of(pipeline_class).trained or next((n for n in DENOISERS if n in index), None)
    try:
        for name, path in ((denoiser, denoiser_path), ("vae", vae_path)):
            if path is None or name is None:
                continue
            if name not in index:
                raise CheckpointError(f"{folder}: has no {name} whose weights could come from {path}")
            part_class = getattr(diffusers, index[name][1])
            # architecture: what the weights' own folder says, else the pipeline folder's
            config = component_config(path, name) or component_config(folder / name, name)
            parts[name] = empty_module(partial(part_class.from_config, config), dtype)
            load_component(parts[name], name, path)
        _check_parts(folder, index, parts, pipeline_class)
        parts |= _networks(folder, index, parts, dtype)
        _give_size(folder, parts.get("unet"))
        pipe = pipeline_class.from_pretrained(folder, dtype=dtype, local_files_only=True, **parts)
        _check_tokenizers(folder, pipe)
        return pipe
    except (CheckpointError, ConfigurationError):
        raise
    except Exception as error:  # diffusers and transformers raise a dozen types for what is damaged or missing
        raise CheckpointError(
            f"{folder}: not a complete {pipeline_class.__name__} folder: {first_line(error)}"
        ) from error


def _networks(
    folder: Path, index: Mapping[str, Any], given: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, torch.nn.Module]:
    """The pipeline's networks, each of whose weights came from its folder: the libraries fill what is missing there
    with random numbers, other ones at every start, after a warning at most.

    Raises:
        CheckpointError: weights are missing; names the part and them.
    """
    import diffusers
    import transformers

    networks: dict[str, torch.nn.Module] = {}
    for name, pair in index.items():
        if not isinstance(pair, list) or len(pair) != 2 or name in given:
            continue
        library = {"diffusers": diffusers, "transformers": transformers}.get(pair[0])
        found = getattr(library, pair[1] or "", None)
        if not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
            continue
        part_class: Any = found
        networks[name], report = part_class.from_pretrained(
            folder / name, dtype=dtype, local_files_only=True, output_loading_info=True
        )
        if missing := sorted(report["missing_keys"]):
            others = ", ".join(sorted(report["unexpected_keys"])[:2])
            raise CheckpointError(
                f"{folder / name}: lacks {len(missing)} weights of {part_class.__name__}, such as {missing[0]}"
                + (f"; it has {others} instead" if others else "")
                + f". Copy it again; if another transformers than {transformers.__version__} saved it, use that."
            )
    return networks


def is_hub_id(folder: str | Path) -> bool:
    """Whether ``folder`` has the form of a hub id, ``org/name``; so has a relative path."""
    return _HUB_ID.fullmatch(str(folder)) is not None


def _local(folder: str | Path) -> Path:
    path = Path(folder).expanduser()
    if path.is_dir() or not is_hub_id(folder):
        return path
    import diffusers

    try:
        return Path(diffusers.DiffusionPipeline.download(str(folder)))
    except Exception as error:  # of the hub's client: offline, gated, unknown, no such name
        raise CheckpointError(
            f"{folder}: neither a folder here nor a model that the hub gives: {first_line(error)}"
        ) from error


def _read_index(folder: Path) -> dict[str, Any]:
    file = folder / "model_index.json"
    if not file.is_file():
        raise CheckpointError(
            f"{folder}: no model_index.json there; model.from_pretrained must name a diffusers pipeline folder"
        )
    index = read_json(file, CheckpointError)
    if not isinstance(index.get("_class_name"), str):
        raise CheckpointError(f"{file}: names no pipeline class of diffusers as _class_name")
    return index


def _check_parts(folder: Path, index: Mapping[str, Any], given: Mapping[str, Any], pipeline_class: Any) -> None:
    """The index names every part that the pipeline cannot do without (without a second text encoder it would load all
    the same and fail in its first call), and each has a folder: transformers makes an empty tokenizer of a missing one.
    """
    parameters = list(inspect.signature(pipeline_class.__init__).parameters.values())[1:]
    # SDXL's second text encoder counts as optional, as the refiner has no first one
    spared = [
        name for name in pipeline_class._optional_components if not name.startswith(("text_encoder", "tokenizer"))
    ]
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if lacking := [name for name in needed if name not in index and name not in given and name not in spared]:
        raise CheckpointError(
            f"{folder}: model_index.json says {pipeline_class.__name__}, but names no {', '.join(lacking)}, which that "
            f"pipeline needs; copy the whole folder, or correct _class_name"
        )
    pairs = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    named = [name for name, value in pairs.items() if value != [None, None]]
    missing = [name for name in named if name not in given and not (folder / name).is_dir()]
    if missing:
        raise CheckpointError(f"{folder}: model_index.json names {', '.join(missing)}, but there is no such folder")


def _give_size(folder: Path, unet: Any) -> None:
    """A UNet's ``sample_size`` may be null, but its pipeline computes a picture's height and width from it."""
    if unet is not None and "sample_size" in unet.config and unet.config["sample_size"] is None:
        unet.register_to_config(sample_size=_SAMPLE_SIZE)
        log.warning(
            "%s: its sample_size is null; latents are %d high and wide unless model.infer.height and width say more",
            folder / "unet" / "config.json",
            _SAMPLE_SIZE,
        )


def _check_tokenizers(folder: Path, pipe: Any) -> None:
    """Each has a vocabulary; one that states no length gets its text encoder's."""
    for name, part in pipe.components.items():
        encoder: Any = pipe.components.get(name.replace("tokenizer", "text_encoder"))
        positions = getattr(getattr(encoder, "config", None), "max_position_embeddings", None)
        if name.startswith("tokenizer") and positions and getattr(part, "model_max_length", 0) > positions:
            part.model_max_length = positions
        special = getattr(part, "all_special_ids", None)
        if special is not None and hasattr(part, "get_vocab") and len(part) <= len(set(special)):
            raise CheckpointError(f"{folder / name}: a tokenizer without a vocabulary; its files are missing there")


def _pipeline_class(folder: Path, index: Mapping[str, Any]) -> Any:
    """The class that the index names; only what diffusers and transformers ship may be named."""
    import diffusers

    found = getattr(diffusers, index["_class_name"], None)
    if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)):
        raise CheckpointError(
            f"{folder}: model_index.json names '{printable(index['_class_name'], 80)}', which is no pipeline of the "
            f"installed diffusers {diffusers.__version__}"
        )
    for name, value in index.items():
        if not isinstance(value, list) or len(value) != 2 or value == [None, None] or name in _LEFT_OUT:
            continue
        library, kind = value
        known = library in _LIBRARIES or (isinstance(library, str) and hasattr(diffusers.pipelines, library))
        if not known or not isinstance(kind, str) or (folder / name / f"{library}.py").exists():
            raise CheckpointError(
                f"{folder}: model_index.json says that {name} is {printable(value, 120)}; only classes of "
                f"{' and '.join(_LIBRARIES)} are loaded, and no code that a folder brings"
            )
    return found
