"""From a ``diffusers`` folder, hub id or single files to a :class:`.DiffusionModel`; nothing in them names code."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_aligner_diffusion.diffusion.families import DENOISERS, family_of
from nemo_aligner_diffusion.diffusion.files.assembly import assemble, marked
from nemo_aligner_diffusion.diffusion.files.parts import (
    check_tokenizers,
    check_vae,
    network_of_file,
    network_of_folder,
    outline_of_folder,
    text_parts,
)
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.recognition import (
    EMBEDDED,
    INDEX,
    SMALL_FILES,
    Recognised,
    marks_of,
    of_file,
    own_folder,
)
from nemo_aligner_diffusion.embedded_assets import embedded_model_path
from nemo_aligner_diffusion.errors import CheckpointError, first_line, printable
from nemo_aligner_diffusion.formats.checkpoints import component_config
from nemo_aligner_diffusion.formats.files import read_json
from nemo_aligner_diffusion.formats.hub import locate
from nemo_aligner_diffusion.formats.weight_files import VARIANTS, check_folder, has_weights, weight_patterns
from nemo_aligner_diffusion.runtime.messages import with_quiet_libraries

log = logging.getLogger(__name__)

_SAMPLE_SIZE = 64  # Stable Diffusion's: 512 pixels
_LIBRARIES = ("diffusers", "transformers")  # whose classes a folder may name
# numpy and PIL parts that make no picture, and what only an image prompt needs
_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder", "watermark")


def load_model(
    source: str | Path | None = None,
    denoiser_path: str | Path | None = None,
    vae_path: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    trained: str | None = None,
    stateless: Sequence[str] = (),
    arguments: Mapping[str, Any] | None = None,
    text_path: str | Path | None = None,
    revision: str | None = None,
    only: str | None = None,
) -> DiffusionModel:
    """Load a pipeline: the one that a folder's ``model_index.json`` names, or that weights in a file belong to.

    Args:
        source: ``model.from_pretrained``: a ``diffusers`` pipeline folder, a hub id (``org/name``), or a single file of
            the whole model; ``None``: what the denoiser's weights belong to, and without these the embedded model.
        denoiser_path: ``model.unet_config.from_pretrained``: a folder or single file whose weights the denoiser gets.
        vae_path: ``model.first_stage_config.from_pretrained``, the same for the VAE.
        dtype: of all weights.
        trained, stateless, arguments: see :class:`.DiffusionModel`.
        text_path: ``model.cond_stage_config.from_pretrained``: folder or hub id of text encoders and tokenizers.
        revision: branch, tag or commit of ``source`` (or else of ``text_path``) on the hub.
        only: the one network of a folder or hub id that is to have weights; the others are on the meta device.

    Raises:
        CheckpointError: a part is missing, unreadable, does not fit, or names code that is not of diffusers or
            transformers.
        ConfigurationError: the pipeline makes no pictures from prompts, or has no such component or argument.
    """
    import diffusers  # noqa: F401 -- what has been imported can be kept quiet
    import transformers  # noqa: F401

    whole = embedded_model_path() if source is None else _local(source, revision, only)
    text = None if text_path is None else str(text_path)
    denoiser = None if denoiser_path is None else own_folder(denoiser_path, trained or "unet")
    vae = None if vae_path is None else own_folder(vae_path, "vae")
    with with_quiet_libraries():  # what a user must know of the weights is checked here
        found = Recognised(EMBEDDED, "", "")
        if whole.is_file() or (source is None and denoiser is not None):
            found = of_file(whole if denoiser is None else denoiser)
        if whole.is_file():
            pipe = assemble(found, denoiser or whole, vae, text, dtype, revision, whole)
        elif found.architecture != EMBEDDED:
            assert denoiser is not None
            pipe = assemble(found, denoiser, vae, text, dtype, revision, denoiser)
        else:
            pipe = _load(whole, denoiser, vae, text, dtype, trained, revision if source is None else None, only)
    return DiffusionModel(pipe, trained, stateless, arguments)


def _load(
    folder: Path,
    denoiser_path: Path | None,
    vae_path: Path | None,
    text: str | None,
    dtype: torch.dtype,
    trained: str | None,
    revision: str | None,
    only: str | None,
) -> Any:
    import diffusers

    index = _read_index(folder)
    pipeline_class = _pipeline_class(folder, index)
    parts: dict[str, Any] = {name: None for name in _LEFT_OUT if name in index}
    if "requires_safety_checker" in index:
        parts["requires_safety_checker"] = False
    denoiser = trained or family_of(pipeline_class).trained or next((n for n in DENOISERS if n in index), None)
    for name, path in ((denoiser, denoiser_path), ("vae", vae_path)):
        if path is None or name is None:
            continue
        if name not in index:
            raise CheckpointError(f"{folder}: has no {name} whose weights could come from {path}")
        part_class = getattr(diffusers, index[name][1])
        # architecture: what the weights' own folder says, else the pipeline folder's
        config = component_config(path, name) or component_config(folder / name, name)
        parts[name] = network_of_file(part_class, name, config or {}, path, dtype)
        if name == "vae":
            check_vae(parts[name], component_config(folder / name, name), path)
    if text is not None:
        encoders = {n: pair[1] for n, pair in index.items() if n.startswith("text_encoder") and _is_class(pair)}
        tokenizers = {n: pair[1] for n, pair in index.items() if n.startswith("tokenizer") and _is_class(pair)}
        parts |= text_parts(encoders, tokenizers, [text], dtype, revision)[0]
    _check_parts(folder, index, parts, pipeline_class)
    parts |= _networks(folder, index, parts, dtype, only)
    _give_size(folder, parts.get("unet"))
    try:
        pipe = pipeline_class.from_pretrained(folder, dtype=dtype, local_files_only=True, **parts)
    except Exception as error:  # diffusers and transformers raise a dozen types for what is damaged or missing
        raise CheckpointError(
            f"{folder}: not a complete {pipeline_class.__name__} folder: {first_line(error)}"
        ) from error
    check_tokenizers(folder, pipe)
    if denoiser_path is not None:
        pipe.scheduler = marked(pipe.scheduler, marks_of(denoiser_path, denoiser or "unet"))
    return pipe


def _networks(
    folder: Path, index: Mapping[str, Any], given: Mapping[str, Any], dtype: torch.dtype, only: str | None
) -> dict[str, torch.nn.Module]:
    """The pipeline's networks that are not ``given``, each from its folder; the other parts' folders are looked at."""
    import diffusers
    import transformers

    networks: dict[str, torch.nn.Module] = {}
    for name, pair in index.items():
        if not _is_class(pair) or name in given:
            continue
        library = {"diffusers": diffusers, "transformers": transformers}.get(pair[0])
        found = getattr(library, pair[1], None)
        if needed := getattr(found, "_backends", None):  # a stand-in for a class
            raise CheckpointError(
                f"{folder / name}: {pair[1]} of {pair[0]} needs {', '.join(needed)}; install what is missing"
            )
        if isinstance(found, type) and issubclass(found, torch.nn.Module):
            make = network_of_folder if only in (None, name) else outline_of_folder
            networks[name] = make(found, folder / name, dtype)
        else:
            check_folder(folder / name)
    return networks


def _is_class(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and None not in pair


def _local(source: str | Path, revision: str | None, only: str | None) -> Path:
    """A folder or file here; of a hub id its folder in the cache, fetched as far as it is not there."""
    small = locate(
        source,
        (SMALL_FILES,),
        lambda folder: (folder / INDEX).exists(),
        "a diffusers pipeline folder or a single file of weights",
        revision,
    )
    if Path(source).expanduser().exists():
        return small
    parts = [n for n, pair in _read_index(small).items() if _is_class(pair) and n not in _LEFT_OUT]
    parts = [n for n in parts if only in (None, n) and (small / n / "config.json").exists()]  # the networks
    patterns = [
        (*SMALL_FILES, *(pattern for name in parts for pattern in weight_patterns(f"{name}/", variant)))
        for variant in VARIANTS
    ]
    return locate(
        source, patterns, lambda folder: all(has_weights(folder / name) for name in parts),
        f"the weights of its {', '.join(parts)}", revision,
    )  # fmt: skip


def _read_index(folder: Path) -> dict[str, Any]:
    file = folder / INDEX
    if not file.exists():
        raise CheckpointError(
            f"{folder}: no model_index.json there; model.from_pretrained must name a diffusers pipeline folder, or a "
            f"single file of weights (a network's own folder goes to model.unet_config.from_pretrained)"
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
