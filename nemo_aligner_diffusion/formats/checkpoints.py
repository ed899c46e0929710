"""Reading networks' weights from the files people have, without running any code they may carry.

A path may be a ``diffusers`` folder, a single file in ``diffusers`` naming, a whole-model file of LDM/CompVis, SGM
(SDXL), SD3 or FLUX, or one written by NeMo; in one file or several, wrapped as training programs wrap them. What a file
is, its content decides, not its name. Pickled files are loaded with ``weights_only=True`` and nothing else.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from zipfile import is_zipfile

import torch
from torch import Tensor, nn

from nemo_aligner_diffusion.errors import CheckpointError, first_line, printable
from nemo_aligner_diffusion.formats.files import open_regular, read_json
from nemo_aligner_diffusion.formats.weight_files import (
    find_weights,
    inner_names,
    kind_of,
    read_header,
    shards_of,
    what_is_in,
)

log = logging.getLogger(__name__)

_Module = TypeVar("_Module", bound=nn.Module)

# class of diffusers -> a tensor that its network has under its makers' own names, and what stands before them there
_ORIGINAL = {
    "UNet2DConditionModel": ("input_blocks.0.0.weight", "model.diffusion_model."),
    "AutoencoderKL": ("decoder.mid.block_1.conv1.weight", "first_stage_model."),
    "SD3Transformer2DModel": ("joint_blocks.0.x_block.attn.qkv.weight", ""),
    "FluxTransformer2DModel": ("double_blocks.0.img_attn.qkv.weight", ""),
    "Flux2Transformer2DModel": ("double_blocks.0.img_attn.qkv.weight", ""),
    "ZImageTransformer2DModel": ("layers.0.attention.qkv.weight", ""),
}
_MOST_NESTING = 4


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, or of the shards that an ``*.index.json`` names, on the CPU.

    A ``state_dict`` is what counts where there is one; other nesting becomes dots in the names. The file is mapped into
    memory where its format allows it: a tensor takes memory of its own, and is read, when it is copied or computed
    with. Copy what outlives the call.

    Raises:
        CheckpointError: missing, unreadable, not what one thinks, or a pickle that holds anything but tensors and plain
            containers.
    """
    kind = kind_of(path)
    if kind == "index":
        return {name: tensor for shard in shards_of(path) for name, tensor in read_tensors(shard).items()}
    if kind == "safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        read_header(path)  # says what is wrong with it
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({first_line(error)})") from error
    else:
        tensors = _read_pickle(path, kind)
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors; expected a state dict")
    return tensors


def _read_pickle(path: Path, kind: str) -> dict[str, Tensor]:
    if kind == "zip" and not is_zipfile(path):
        raise CheckpointError(f"{path}: a checkpoint that is cut off (its zip directory is missing); fetch it again")
    try:
        loaded = _unpickle(path, kind)
    except Exception as error:  # torch raises half a dozen types here, all of which mean the same to a user
        code = "weights only" in str(error).lower().replace("_", " ")
        said = "it holds more than tensors and plain containers" if code else f"{type(error).__name__}, a damaged file?"
        raise CheckpointError(
            f"{path}: cannot be loaded as plain weights (weights_only=True): {said}. Code in a pickle is never run; "
            f"convert the file to .safetensors on a machine where you trust it"
        ) from error
    while isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    tensors = _flat(loaded)
    for name, tensor in tensors.items():
        # An expanded tensor claims more elements than are stored; converting it would take memory for all of them.
        dense = tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"
        if not dense or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"{path}: its tensor '{printable(name)}' is not dense; save it with .cpu().contiguous()"
            )
    return tensors


def _unpickle(path: Path, kind: str) -> Any:
    if path.suffix.lower() == ".safetensors":  # by this name torch would take it for one
        with open_regular(path) as stream:
            return torch.load(stream, map_location="cpu", weights_only=True)
    if kind == "zip":  # what torch.save has written since PyTorch 1.6
        with contextlib.suppress(RuntimeError, OSError):  # a file system that cannot map files; or a damaged file
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return torch.load(path, map_location="cpu", weights_only=True)


def _flat(value: Any, prefix: str = "", depth: int = 0) -> dict[str, Tensor]:
    """Tensors of nested mappings; what else is there (steps, settings, other programs' state) is no weight."""
    tensors: dict[str, Tensor] = {}
    for key, inner in value.items() if isinstance(value, Mapping) else ():
        if isinstance(inner, Tensor):
            tensors[f"{prefix}{key}"] = inner
        elif isinstance(inner, Mapping) and depth < _MOST_NESTING:
            tensors |= _flat(inner, f"{prefix}{key}.", depth + 1)
    return tensors


def empty_module(build: Callable[[], _Module], dtype: torch.dtype = torch.float32) -> _Module:
    """``build()`` with parameters that have a shape and no memory, to be filled by :func:`load_component`.

    Buffers are computed as always: those that no state dict holds come from nowhere else.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return build().to(dtype)


def load_component(module: Any, component: str, path: str | Path) -> None:
    """Load a denoiser's or VAE's weights into ``module`` (a ``diffusers`` model) in place.

    Args:
        module: ``UNet2DConditionModel``, ``AutoencoderKL`` or the like, built; from :func:`empty_module` it needs no
            memory before.
        component: its name in the pipeline.
        path: folder or file, see the module's docstring. A pipeline folder is searched for ``unet/`` or ``vae/``.

    Raises:
        CheckpointError: names the file and the first tensors that are missing, unexpected or of another shape.
    """
    source, variant = find_weights(Path(path).expanduser(), component)
    if variant:
        log.info("%s: takes these weights; there are none without '%s'", source, variant)
    everything = read_tensors(source)
    expected = module.state_dict()
    tensors = component_tensors(everything, module, component, source)
    unexpected = [name for name in tensors if name not in expected]
    # counters and marks that a training program put beside the weights; a dot would say that they belong to a layer
    passed_over = [name for name in unexpected if tensors[name].numel() <= 1 and "." not in name]
    if passed_over:
        log.info("%s: passes over what is no part of the %s: %s", source, component, _listed(passed_over))
    unexpected = [name for name in unexpected if name not in passed_over]
    missing = [name for name in expected if name not in tensors]
    wrong = [
        f"{printable(name)} (file {tuple(tensors[name].shape)}, model {tuple(expected[name].shape)})"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]
    if missing or unexpected or wrong:
        parts = [
            f"{len(names)} {what}, e.g. {', '.join(map(printable, names[:3]))}"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
            if names
        ]
        raise CheckpointError(
            f"{source}: these weights do not fit the configured {component} ({len(expected)} tensors expected): "
            f"{'; '.join(parts)}. Give weights of the same architecture, or set model.from_pretrained to the "
            f"diffusers folder they belong to"
        )
    empty = any(place.is_meta for place in expected.values())
    if empty:  # copies of its own: the file may be replaced while the model lives
        tensors = own_copies(tensors, everything, {name: place.dtype for name, place in expected.items()})
    module.load_state_dict({name: tensors[name] for name in expected}, assign=empty)


def save_component(module: Any, folder: Path, notes: Mapping[str, str] | None = None) -> None:
    """``module.save_pretrained(folder)`` of ``diffusers``, with ``notes`` in the header (of shards: in their index)."""
    from huggingface_hub import save_torch_state_dict

    module.save_config(folder)
    save_torch_state_dict(
        module.state_dict(),
        folder,
        filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
        max_shard_size="10GB",  # as diffusers does
        metadata=dict(notes or {}),
    )


def read_notes(path: Path) -> dict[str, str]:
    """What a readable file says of itself: a safetensors header's metadata, or what an index of shards has for it."""
    notes: Any = {}
    if (kind := kind_of(path)) == "index":
        notes = read_json(path, CheckpointError).get("metadata")
    elif kind == "safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as opened:
            notes = opened.metadata()
    return {key: value for key, value in notes.items() if isinstance(value, str)} if isinstance(notes, dict) else {}


def own_copies(
    tensors: dict[str, Tensor], of_file: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]
) -> dict[str, Tensor]:
    """``tensors`` (emptied on the way) in these precisions, none of them sharing the file's memory."""
    mapped = {tensor.untyped_storage().data_ptr() for tensor in of_file.values()}
    return {
        name: (tensor := tensors.pop(name)).to(dtype, copy=tensor.untyped_storage().data_ptr() in mapped)
        for name, dtype in dtypes.items()
        if name in tensors
    }


def component_tensors(tensors: Mapping[str, Tensor], module: Any, component: str, source: Path) -> dict[str, Tensor]:
    """Those of ``module`` among a file's tensors, under the module's names: found by matching names that it has,
    whatever stands before them, or its makers' names, which ``diffusers`` converts.

    Raises:
        CheckpointError: the file holds none; says what it seems to hold.
    """
    names, expected = list(tensors), list(module.state_dict())
    anchor, before = _ORIGINAL.get(_original_class(module), ("", ""))
    found = inner_names(names, anchor) if anchor else {}
    found = {prefix: inner for prefix, inner in found.items() if "control_model" not in prefix}
    if found:
        inner = found[_chosen({prefix: len(held) for prefix, held in found.items()}, component, source)]
        return _converted({f"{before}{name}": tensors[full] for name, full in inner.items()}, module, component, source)
    for name in {max(expected, key=len), *expected[:: max(1, len(expected) // 8)]}:  # some may be missing or renamed
        found |= inner_names(names, name)
    matches = {prefix: sum(name in inner for name in expected) for prefix, inner in found.items()}
    if not found or 2 * max(matches.values()) < len(expected):
        raise CheckpointError(
            f"{source}: holds no {component} ({type(module).__name__}); what it holds looks like {what_is_in(names)}. "
            f"Give the {component}'s weights"
        )
    inner = found[_chosen(matches, component, source)]
    state = {name: tensors[full] for name, full in inner.items()}
    # attention of before diffusers 0.16: query, key, value, proj_attn; diffusers' own renaming
    getattr(module, "_fix_state_dict_keys_on_load", lambda state: None)(state)
    return state


def _chosen(matches: Mapping[str, int], component: str, source: Path) -> str:
    """The prefix with the most matches; of equal ones the weights themselves rather than their moving average."""
    ranked = sorted(matches, key=lambda prefix: (-matches[prefix], "ema" in prefix, len(prefix)))
    times = sum(count == matches[ranked[0]] for count in matches.values())
    if times > 1:
        log.info("%s: holds the %s %d times; takes '%s'", source, component, times, printable(ranked[0]))
    return ranked[0]


def _original_class(module: Any) -> str:
    return next((kind.__name__ for kind in type(module).__mro__ if kind.__name__ in _ORIGINAL), "")


def _converted(named: dict[str, Tensor], module: Any, component: str, source: Path) -> dict[str, Tensor]:
    """From the makers' names to ``diffusers``', by diffusers' own functions and tables."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    known: Any = SINGLE_FILE_LOADABLE_CLASSES
    convert = known[_original_class(module)]["checkpoint_mapping_fn"]
    try:
        converted: dict[str, Tensor] = convert(checkpoint=named, config=dict(module.config))
    except (KeyError, IndexError, AttributeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{source}: {component} weights under their makers' names that do not fit the configured architecture "
            f"({printable(repr(error))})"
        ) from error
    used = {tensor.data_ptr() for tensor in converted.values() if tensor is not None}
    left = [name for name, tensor in named.items() if tensor.data_ptr() not in used]
    if left:
        log.warning("%s: passes over what is no part of the %s: %s", source, component, _listed(left))
    return {name: tensor for name, tensor in converted.items() if tensor is not None}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return f"{len(names)} tensor(s), {', '.join(map(printable, names[:6]))}{more}"


def component_config(path: str | Path, component: str) -> dict[str, Any] | None:
    """The architecture that a ``diffusers`` folder states for itself, ``None`` for a single file."""
    folder = Path(path).expanduser()
    for candidate in (folder / "config.json", folder / component / "config.json"):
        if candidate.exists():
            return read_json(candidate, CheckpointError)
    return None
