"""The parts of a pipeline, one by one: networks from a folder or a file, text encoders and tokenizers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from nemo_aligner_diffusion.errors import CheckpointError, first_line, printable
from nemo_aligner_diffusion.formats.checkpoints import (
    component_config,
    empty_module,
    load_component,
    own_copies,
    read_tensors,
)
from nemo_aligner_diffusion.formats.hub import locate
from nemo_aligner_diffusion.formats.weight_files import (
    VARIANTS,
    check_folder,
    find_weights,
    has_weights,
    inner_names,
    kind_of,
    read_shapes,
    shards_of,
    weight_patterns,
)
from nemo_aligner_diffusion.runtime.memory import check_room

# how text encoders are named in whole-model files -> one of their tensors; those of OpenCLIP are converted
_CLIP = "text_model.embeddings.token_embedding.weight"
_OPEN_CLIP = "transformer.resblocks.0.attn.in_proj_weight"
_T5 = "encoder.block.0.layer.0.SelfAttention.q.weight"


def network_of_file(part_class: Any, component: str, config: Mapping[str, Any], path: Path, dtype: torch.dtype) -> Any:
    """A ``diffusers`` network whose weights come from a file, or its own folder."""
    try:
        module = empty_module(partial(part_class.from_config, dict(config)), dtype)
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: a {component} of this configuration cannot be built: {first_line(error)}"
        ) from error
    check_room(sum(p.numel() for p in module.parameters()) * dtype.itemsize, f"{path} ({component}, {_called(dtype)})")
    load_component(module, component, path)
    return module.eval()


def check_vae(vae: Any, expected: Mapping[str, Any] | None, path: Path) -> None:
    """A VAE given by itself has latents of the number and scale that the model was made with.

    Args:
        expected: the configuration of the model's own; ``None``: there is none.

    Raises:
        CheckpointError: it was made for another model.
    """
    if expected is None:
        return
    defaults = inspect.signature(type(vae).__init__).parameters
    for key in ("latent_channels", "scaling_factor"):
        if key in defaults and (found := vae.config[key]) != (wanted := expected.get(key, defaults[key].default)):
            raise CheckpointError(
                f"{path}: the VAE of another model: its {key.replace('_', ' ')} is {found}, this model's is {wanted}; "
                f"give the one that belongs to the denoiser as model.first_stage_config.from_pretrained"
            )


def network_of_folder(part_class: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A network of ``diffusers`` or ``transformers`` all of whose weights came from ``folder``: the libraries fill what
    is missing there with random numbers, other ones at every start, after a warning at most.

    Raises:
        CheckpointError: names the folder or file and what is wrong with it, or the weights that are missing.
    """
    import transformers

    check_folder(folder)
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: has no config.json; copy the whole folder")
    file, variant = find_weights(folder, folder.name)
    files = shards_of(file) if kind_of(file) == "index" else [file]
    size = sum(math.prod(shape) for each in files for shape in read_shapes(each).values())  # says what is damaged
    if size * dtype.itemsize > 1.01 * sum(each.stat().st_size for each in files):  # else they are mapped, not copied
        check_room(size * dtype.itemsize, f"{folder} ({_called(dtype)})")
    try:
        network, report = part_class.from_pretrained(
            folder, dtype=dtype, variant=variant or None, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # diffusers and transformers raise a dozen types for what is damaged
        raise CheckpointError(f"{folder}: no {part_class.__name__} can be made of it: {first_line(error)}") from error
    remedy = f"if another transformers than {transformers.__version__} saved it, use that"
    _check_report(report, folder, part_class, remedy)
    return network.eval()


def outline_of_folder(part_class: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """:func:`network_of_folder` without weights, on the meta device.

    Raises:
        CheckpointError: its configuration makes no such network.
    """
    try:
        with torch.device("meta"):
            if hasattr(part_class, "load_config"):  # of diffusers
                return part_class.from_config(part_class.load_config(folder, local_files_only=True)).to(dtype)
            return part_class(part_class.config_class.from_pretrained(folder, local_files_only=True)).to(dtype)
    except Exception as error:
        raise CheckpointError(f"{folder}: no {part_class.__name__} can be made of it: {first_line(error)}") from error


def _called(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_report(report: Mapping[str, Any], source: Path, part_class: Any, remedy: str) -> None:
    if missing := sorted(report["missing_keys"]):
        others = ", ".join(sorted(report["unexpected_keys"])[:2])
        raise CheckpointError(
            f"{source}: lacks {len(missing)} weights of {part_class.__name__}, such as {missing[0]}"
            + (f"; it has {others} instead" if others else "")
            + f". Copy it again; {remedy}."
        )


def text_parts(
    wanted: Mapping[str, str],
    tokenizers: Mapping[str, str],
    sources: Sequence[str],
    dtype: torch.dtype,
    revision: str | None = None,
    whole: Path | None = None,
    configs: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[dict[str, Any], Path, str]:
    """Text encoders and tokenizers, the folder that they (the latter at least) came from, and in words what from where.

    Args:
        wanted: text encoders by component name → class of ``transformers``.
        tokenizers: likewise.
        sources: folders or hub ids, the first that has all; a pipeline's folder, or with one text encoder its own.
        whole: a whole-model file, whose text encoders are taken as far as it has them.
        configs: of text encoders in ``whole`` where the folder has none.

    Raises:
        CheckpointError: there is none with all parts; says what to give.
    """
    import transformers

    in_file = _names_in_file(whole, wanted) if whole else set()
    needed = [name for name in wanted if name not in in_file]

    def place(folder: Path, name: str) -> Path:
        return folder / name if (folder / name).is_dir() or len(tokenizers) > 1 else folder

    def lacking(folder: Path) -> list[str]:
        vocabularies = ("tokenizer.json", "vocab.json", "spiece.model", "vocab.txt")
        return [name for name in needed if not has_weights(place(folder, name))] + [
            name for name in tokenizers if not any((place(folder, name) / file).is_file() for file in vocabularies)
        ]

    small = ("*.json", "*.txt", "tokenizer*/*", "text_encoder*/*.json", "scheduler/*.json")
    weights = {v: tuple(p for f in ("", "text_encoder*/") for p in weight_patterns(f, v)) for v in VARIANTS if needed}
    patterns = [(*small, *weights.get(v, ())) for v in VARIANTS]
    folder = _first_complete(sources, patterns, lacking, revision, [*needed, *tokenizers])
    parts: dict[str, Any] = {}
    for name, kind in wanted.items():
        part_class = getattr(transformers, kind)
        own = place(folder, name)
        if name in needed:
            parts[name] = network_of_folder(part_class, own, dtype)
        else:
            assert whole is not None
            check_folder(own)
            given = component_config(own, name) or dict((configs or {})[name])
            given = given.get("text_config", given)  # of a whole CLIP
            parts[name] = _network_in_file(part_class, name, given, whole, dtype)
    for name, kind in tokenizers.items():
        own = place(folder, name)
        check_folder(own)
        try:
            parts[name] = getattr(transformers, kind).from_pretrained(own, local_files_only=True)
        except Exception as error:  # of transformers and tokenizers
            raise CheckpointError(f"{own}: no tokenizer can be made of it: {first_line(error)}") from error
    said = {"from the file": [n for n in wanted if n in in_file], f"from {folder}": [*needed, *tokenizers]}
    return parts, folder, "; ".join(f"{', '.join(names)} {where}" for where, names in said.items() if names)


def _first_complete(
    sources: Sequence[str],
    patterns: Sequence[Sequence[str]],
    lacking: Callable[[Path], list[str]],
    revision: str | None,
    needed: list[str],
) -> Path:
    key = "model.cond_stage_config.from_pretrained, or --text"
    problems = []
    for source in sources:
        try:
            wanted = "a folder with text encoder and tokenizer"
            folder = locate(source, patterns, lambda place: not lacking(place), wanted, revision)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if not (missing := lacking(folder)):
            return folder
        problems.append(f"{folder} lacks weights or tokenizer files of {', '.join(missing)}")
    raise CheckpointError(
        f"these weights come without {', '.join(needed)}: give {key} = a folder with "
        f"{', '.join(f'{name}/' for name in needed)}, or a hub id. {problems[0]}"
    )


def _names_in_file(whole: Path, wanted: Mapping[str, str]) -> set[str]:
    """Which text encoders a whole-model file has: as many CLIPs and T5s as are wanted, or none of the kind."""
    names = list(read_tensors(find_weights(whole, "text_encoder")[0]))
    found = {"CLIP": len(_clips(names)), "T5": len(inner_names(names, _T5))}
    kinds = {name: "T5" if kind.startswith("T5") else "CLIP" for name, kind in wanted.items()}
    return {name for name, kind in kinds.items() if found[kind] >= list(kinds.values()).count(kind)}


def _clips(names: list[str]) -> dict[str, dict[str, str]]:
    found = {**inner_names(names, _CLIP), **inner_names(names, _OPEN_CLIP)}
    return {p: inner for p, inner in found.items() if _CLIP in inner or "token_embedding.weight" in inner}


def _network_in_file(
    part_class: Any, name: str, config: Mapping[str, Any], whole: Path, dtype: torch.dtype
) -> nn.Module:
    """A text encoder of a whole-model file; of several CLIPs the one whose width the configuration has."""
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    file = find_weights(whole, name)[0]
    tensors = read_tensors(file)
    names = list(tensors)
    if part_class.__name__.startswith("T5"):
        found, stated, marks = inner_names(names, _T5), "d_model", [_T5]
    else:
        found, stated, marks = _clips(names), "hidden_size", [_CLIP, "token_embedding.weight"]
    width: Any = config.get(stated)
    fitting = [
        inner for inner in found.values()
        if any(mark in inner and tensors[inner[mark]].shape[-1] == width for mark in marks)
    ]  # fmt: skip
    if not fitting:
        raise CheckpointError(
            f"{file}: holds no {name} ({part_class.__name__}) of width {width}, which its config states"
        )
    inner = fitting[0]
    state: dict[str, Tensor] = {key: tensors[full] for key, full in inner.items()}
    model_config: Any = part_class.config_class(**config)
    if _OPEN_CLIP in inner:  # the last layer of SD 2's is not used, and diffusers drops it by its name
        before = "conditioner.embedders.1.model." if "Projection" in part_class.__name__ else "cond_stage_model.model."
        named = {f"{before}{key}": tensor for key, tensor in state.items()}
        state = convert_open_clip_checkpoint(SimpleNamespace(config=model_config), named, prefix=before)
    elif "Projection" in part_class.__name__ and "text_projection.weight" not in state:
        state["text_projection.weight"] = torch.eye(width)  # as diffusers does for SD 3's
    state = own_copies(state, tensors, dict.fromkeys(state, dtype))
    with torch.no_grad():
        network, report = part_class.from_pretrained(
            None, config=model_config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    _check_report(report, file, part_class, "its configuration states another text encoder than the file has")
    return network.eval()


def check_tokenizers(folder: Path, pipe: Any) -> None:
    """Each has a vocabulary; one that states no length gets its text encoder's."""
    for name, part in pipe.components.items():
        encoder: Any = pipe.components.get(name.replace("tokenizer", "text_encoder"))
        positions = getattr(getattr(encoder, "config", None), "max_position_embeddings", None)
        length = getattr(part, "model_max_length", 0)
        if name.startswith("tokenizer") and not isinstance(length, int | float):
            raise CheckpointError(f"{folder / name}: its model_max_length is {printable(length)!r}; expected a number")
        if name.startswith("tokenizer") and positions and length > positions:
            part.model_max_length = positions
        special = getattr(part, "all_special_ids", None)
        if special is not None and hasattr(part, "get_vocab") and len(part) <= len(set(special)):
            raise CheckpointError(f"{folder / name}: a tokenizer without a vocabulary; its files are missing there")
