"""Reading denoiser and VAE weights from the files people have, without running any code they may carry.

A path may be a ``diffusers`` folder (``config.json`` beside its weights), a single file in ``diffusers`` naming, a
whole-model LDM/CompVis file (``model.diffusion_model.*``, ``first_stage_model.*``) or one written by NeMo (the same
names, with a further ``model.`` in front or inside ``state_dict``). Safetensors is preferred; pickled files are loaded
with ``weights_only=True`` and nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from zipfile import is_zipfile

import torch
from torch import Tensor, nn

from nemo_aligner_diffusion.errors import CheckpointError, first_line, printable
from nemo_aligner_diffusion.formats.files import read_json

_Module = TypeVar("_Module", bound=nn.Module)

# prefixes under which LDM-style files keep a component, the longest first
LDM_PREFIXES: dict[str, tuple[str, ...]] = {
    "unet": ("model.model.diffusion_model.", "model.diffusion_model."),
    "vae": ("model.first_stage_model.", "first_stage_model."),
}
WEIGHT_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.bin",
)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a ``.safetensors`` or pickled checkpoint, on the CPU.

    The file is mapped into memory where its format allows it: a tensor takes memory of its own, and is read, when it is
    copied or computed with. Copy what outlives the call.

    Raises:
        CheckpointError: missing, unreadable, or a pickle that holds anything but tensors and plain containers.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected a .safetensors, .bin, .ckpt or .pt checkpoint")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
    try:
        loaded = _unpickle(path)
    except Exception as error:  # torch raises half a dozen types here, all of which mean the same to a user
        raise CheckpointError(
            f"{path}: cannot be loaded as plain weights (weights_only=True): {first_line(error)}. Code in a pickle is "
            f"never run; convert the file to .safetensors on a machine where you trust it"
        ) from error
    while isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    tensors = {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, Mapping) else {}
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors; expected a state dict")
    for name, tensor in tensors.items():
        # An expanded tensor claims more elements than are stored; converting it would take memory for all of them.
        dense = tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"
        if not dense or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"{path}: its tensor '{printable(name)}' is not dense; save it with .cpu().contiguous()"
            )
    return tensors


def _unpickle(path: Path) -> Any:
    if is_zipfile(path):  # what torch.save has written since PyTorch 1.6
        with contextlib.suppress(RuntimeError, OSError):  # a file system that cannot map files; or a damaged file
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return torch.load(path, map_location="cpu", weights_only=True)


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
        component: its name in the pipeline; decides the LDM prefix to look for.
        path: folder or file, see the module's docstring. A pipeline folder is searched for ``unet/`` or ``vae/``.

    Raises:
        CheckpointError: names the file and the first tensors that are missing, unexpected or of another shape.
    """
    source = _resolve(Path(path).expanduser(), component)
    tensors = _strip_and_convert(read_tensors(source), component, dict(module.config), source)
    expected = module.state_dict()
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
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
        tensors = {name: tensors[name].to(place.dtype, copy=True) for name, place in expected.items()}
    module.load_state_dict(tensors, assign=empty)


def component_config(path: str | Path, component: str) -> dict[str, Any] | None:
    """The architecture that a ``diffusers`` folder states for itself, ``None`` for a single file."""
    folder = Path(path).expanduser()
    for candidate in (folder / "config.json", folder / component / "config.json"):
        if candidate.is_file():
            return read_json(candidate, CheckpointError)
    return None


def _resolve(path: Path, component: str) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder (given for the {component})")
    for folder in (path, path / component):
        for name in WEIGHT_FILES:
            if (folder / name).is_file():
                return folder / name
    raise CheckpointError(
        f"{path}: a folder without {component} weights; expected one of {', '.join(WEIGHT_FILES)} in it or in "
        f"its {component}/ folder"
    )


def _strip_and_convert(
    tensors: dict[str, Tensor], component: str, config: dict[str, Any], source: Path
) -> dict[str, Tensor]:
    for prefix in LDM_PREFIXES.get(component, ()):
        inner = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
        if inner:
            return _from_ldm(inner, component, config, source)
    if component in LDM_PREFIXES and any(name.startswith(("input_blocks.", "encoder.down.")) for name in tensors):
        return _from_ldm(tensors, component, config, source)
    for prefix in (f"{component}.", "module.", "model."):
        if all(name.startswith(prefix) for name in tensors):
            return {name[len(prefix) :]: value for name, value in tensors.items()}
    return tensors


def _from_ldm(tensors: dict[str, Tensor], component: str, config: dict[str, Any], source: Path) -> dict[str, Tensor]:
    """LDM naming to ``diffusers`` naming, by diffusers' own tables."""
    from diffusers.loaders import single_file_utils

    try:
        if component == "unet":
            named = {f"model.diffusion_model.{name}": value for name, value in tensors.items()}
            return single_file_utils.convert_ldm_unet_checkpoint(named, config)
        named = {f"first_stage_model.{name}": value for name, value in tensors.items()}
        return single_file_utils.convert_ldm_vae_checkpoint(named, config)
    except (KeyError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{source}: LDM-style {component} weights that do not fit the configured architecture ({error!r})"
        ) from error
