"""LoRA files of any trainer, read for one network: names, ranks and scales brought to one form, every tensor accounted.

Read are the names of ``diffusers`` (old and new), kohya's sd-scripts (``lora_unet_…``, of ``diffusers``' modules and of
LDM's), PEFT (``base_model.model.…``, ``….default.…``), OneTrainer (``lora_transformer_…``) and, by the pipeline class's
own converter, whatever else it knows (BFL's fused projections, for one). A name is looked up among the network's
modules, so one that fits no module is seen, and is an error.

The scale is ``alpha / rank`` of the tensor ``….alpha``; else what PEFT's metadata says; else 1, as every reader does.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_aligner_diffusion.errors import CheckpointError, ConfigurationError, first_line, printable
from nemo_aligner_diffusion.formats.checkpoints import read_notes, read_tensors
from nemo_aligner_diffusion.formats.files import parse_json, read_json
from nemo_aligner_diffusion.formats.ldm import unet_names
from nemo_aligner_diffusion.runtime.files import atomic_path

log = logging.getLogger(__name__)

WEIGHT_NAME, KOHYA_NAME = "pytorch_lora_weights.safetensors", "kohya_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"  # diffusers': the adapter's configuration as JSON
_PEFT_NAME, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"

_PREFIXES = ("base_model.model.", "unet.", "transformer.", "model.diffusion_model.", "diffusion_model.", "lora_unet_",
             "lora_transformer_")  # fmt: skip
_TEXT_ENCODER = re.compile(  # bundle_emb: OneTrainer's, of words that it has taught them
    r"(base_model\.model\.)?(lora_te\d*_|text_encoders?[._]|te\d?[._]|text_model\.|bundle_emb\.)"
)
_TENSOR = re.compile(
    r"(?P<module>.+)\.(?:(?:lora_(?P<side>A|B|down|up)(?:\.[^.]+)?\.(?P<kind>weight|bias))|(?P<alpha>alpha)"
    r"|(?P<magnitude>lora_magnitude_vector(?:\.[^.]+)?))"
)
_PATTERN = re.compile(r"\^?[\w.]{1,300}")  # PEFT takes patterns for regular expressions; names alone are taken here


@dataclass(frozen=True)
class Lora:
    """An adapter: by module name, the tensors that PEFT knows of it, with a scale of 1: ``W + B·A``.

    Attributes:
        layers: ``lora_A.weight`` (r × …), ``lora_B.weight`` (… × r); perhaps ``lora_B.bias`` and DoRA's
            ``lora_magnitude_vector``.
        header: the file's own notes.
    """

    layers: dict[str, dict[str, Tensor]]
    header: dict[str, str]

    @cached_property
    def ranks(self) -> dict[str, int]:
        return {module: len(layer["lora_A.weight"]) for module, layer in self.layers.items()}

    @cached_property
    def rank(self) -> int:
        """The most frequent one."""
        return Counter(self.ranks.values()).most_common(1)[0][0]

    @cached_property
    def more(self) -> list[str]:
        """What its layers have besides their matrices: DoRA's magnitudes, biases."""
        return sorted({part for layer in self.layers.values() for part in layer} - {"lora_A.weight", "lora_B.weight"})

    def scaled(self, weight: float) -> Lora:
        """``W + weight·B·A``."""
        return replace(self, layers={
            module: {part: tensor * weight if part.startswith("lora_B") else tensor for part, tensor in layer.items()}
            for module, layer in self.layers.items()
        })  # fmt: skip


def read_lora(path: Path, denoiser: Any, component: str = "unet", pipeline_class: Any = None) -> Lora:
    """The adapter in a file or a folder (``export/``, PEFT's) for ``denoiser``.

    Layers of text encoders, which are not trained here, are passed over and named in a warning.

    Args:
        component: the denoiser's name in files of its pipeline: ``unet`` or ``transformer``.
        pipeline_class: whose converter is asked about names that are nobody's module.

    Raises:
        CheckpointError: missing or unreadable; made for another network, in whole or in part; no LoRA.
    """
    file = lora_file(path)
    if file is None:
        what = "this folder holds no LoRA file" if path.is_dir() else "no such LoRA file"
        raise CheckpointError(f"{path}: {what}; expected an export folder or a .safetensors file")
    tensors, header = read_tensors(file), read_notes(file)
    modules = _modules(denoiser)
    spelt = _spellings(modules, denoiser)
    found, texts, unknown = _sort(tensors, spelt, component)
    drops = any("dora_scale" in name for name in unknown)  # which diffusers' converters pass over
    if unknown and not drops and hasattr(pipeline_class, "lora_state_dict"):
        try:
            converted = _converted(dict(tensors), pipeline_class)
            again = _sort(converted, spelt, component)
        except Exception as error:  # a converter that was never meant for these names
            log.debug("%s: not converted by %s: %s", file, pipeline_class.__name__, first_line(error))
        else:
            found, texts, unknown = again if not again[2] else (found, texts, unknown)
    if unknown or not found:
        shown = ", ".join(printable(name, 120) for name in [*unknown, *texts][:3])
        reason = (
            f"{len(unknown)} of its {len(tensors)} tensors have no place in {type(denoiser).__name__}, like {shown}: "
            "it was made for another model, or is of a kind that is not applied here (LoHa, LoKr, kohya's DoRA)"
            if unknown
            else f"it has tensors of text encoders alone ({len(texts)}, such as {shown})"
        )
        raise CheckpointError(f"{file}: this LoRA does not fit the denoiser: {reason}")
    if texts:
        log.warning(
            "%s: %d of its %d tensors are of text encoders, such as %s: passed over, only the denoiser's are used",
            file, len(texts), len(tensors), printable(texts[0], 120),
        )  # fmt: skip
    metadata = _Metadata.of(file, header, component, tensors)
    return Lora({name: _layer(file, name, parts, modules[name], metadata) for name, parts in found.items()}, header)


def lora_file(path: Path) -> Path | None:
    """The LoRA file that ``path`` is or holds: a file, an ``export/`` folder or its run's, a folder with one alone."""
    if not path.is_dir():
        return path if path.is_file() else None
    for folder in (path, path / "export"):
        files = sorted(folder.glob("[!.]*.safetensors"))
        usual = [file for name in (WEIGHT_NAME, _PEFT_NAME) for file in files if file.name == name]
        if usual or (len(files) == 1 and not (folder / "config.json").exists()):  # a network's own folder
            return (usual or files)[0]
    return None


def _modules(denoiser: Any) -> dict[str, torch.Size]:
    """Shapes of the weights of layers that can have an adapter, by name; with adapters on, as without."""
    shapes = {}
    for name, module in denoiser.named_modules():
        layer = getattr(module, "base_layer", module)
        plain = isinstance(layer, torch.nn.Linear) or (isinstance(layer, torch.nn.Conv2d) and layer.groups == 1)
        if plain and not name.endswith(".base_layer") and ".lora_" not in name:
            shapes[name] = layer.weight.shape
    return shapes


def _spellings(modules: Iterable[str], denoiser: Any) -> dict[str, str]:
    """What files call a module → its name: itself, LDM's name for it, and both with underscores (kohya's)."""
    names = {name: name for name in modules}
    per_block = denoiser.config.get("layers_per_block") if hasattr(denoiser, "config") else None
    if isinstance(per_block, int) and "conv_in" in names:
        names |= {theirs: ours for ours, theirs in unet_names(list(names), per_block).items()}
    return {spelling: ours for theirs, ours in names.items() for spelling in (theirs, theirs.replace(".", "_"))}


def _sort(
    tensors: Mapping[str, Tensor], spelt: Mapping[str, str], component: str
) -> tuple[dict[str, dict[str, Tensor]], list[str], list[str]]:
    """(module → its tensors, names of text encoders' tensors, names that are neither's)."""
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    prefixes = (f"{component}.", *_PREFIXES)
    found: dict[str, dict[str, Tensor]] = {}
    texts: list[str] = []
    unknown: list[str] = []
    # `.processor.to_q_lora.down`, `.lora.up` and the like of old diffusers
    current: dict[str, str] = convert_unet_state_dict_to_peft({name: name for name in tensors})
    for renamed, name in current.items():
        match = _TENSOR.fullmatch(renamed)
        module = _module(match["module"], spelt, prefixes) if match else None
        if match is None or module is None:
            (texts if _TEXT_ENCODER.match(name) else unknown).append(name)
            continue
        side = {"down": "A", "up": "B"}.get(match["side"], match["side"])
        part = f"lora_{side}.{match['kind']}" if side else "alpha" if match["alpha"] else "lora_magnitude_vector"
        if found.setdefault(module, {}).setdefault(part, tensors[name]) is not tensors[name]:
            unknown.append(name)  # a second one
    unknown += set(tensors) - set(current.values())
    return found, texts, unknown


def _module(name: str, spelt: Mapping[str, str], prefixes: tuple[str, ...]) -> str | None:
    for _ in range(4):  # base_model.model.unet.…
        if name in spelt:
            return spelt[name]
        name = next((name[len(prefix) :] for prefix in prefixes if name.startswith(prefix)), "")
    return None


def _converted(tensors: dict[str, Tensor], pipeline_class: Any) -> dict[str, Tensor]:
    """By the pipeline class's own converter: FLUX' from kohya and BFL, Qwen-Image's, Z-Image's and others'."""
    asked = {"return_alphas": True} if "return_alphas" in signature(pipeline_class.lora_state_dict).parameters else {}
    state, *alphas, _ = pipeline_class.lora_state_dict(tensors, return_lora_metadata=True, **asked)
    return {**state, **{name: torch.as_tensor(value) for part in alphas for name, value in (part or {}).items()}}


def _layer(
    file: Path, name: str, parts: Mapping[str, Tensor], shape: torch.Size, metadata: _Metadata
) -> dict[str, Tensor]:
    """PEFT's tensors of one layer in float32, the scale taken into B."""
    down, up = parts.get("lora_A.weight"), parts.get("lora_B.weight")
    if down is None or up is None:
        raise CheckpointError(f"{file}: this LoRA is not whole: {name} has {', '.join(parts)} alone")
    if down.ndim != len(shape) and math.prod(down.shape[2:]) * math.prod(up.shape[2:]) == 1:  # 1×1 as linear, or back
        down, up = (tensor.reshape(*tensor.shape[:2], *[1] * (len(shape) - 2)) for tensor in (down, up))
    rank = len(down) if down.ndim else 0
    fits = down.ndim == up.ndim == len(shape) and down.shape[1:] == shape[1:] and up.shape[:2] == (shape[0], rank)
    if not fits or rank < 1 or math.prod(up.shape[2:]) != 1:
        raise CheckpointError(
            f"{file}: this LoRA does not fit the denoiser: {name} is {tuple(shape)} there, and the file has "
            f"{tuple(up.shape)} and {tuple(down.shape)} for it"
        )
    scale = metadata.scale(name, rank)
    if (alpha := parts.get("alpha")) is not None:
        scale = float(alpha.reshape(-1)[0]) / rank if alpha.numel() == 1 else math.nan
    if not math.isfinite(scale):
        raise CheckpointError(f"{file}: this LoRA has no usable scale for {name}: its alpha is no finite number")
    layer = {part: tensor.float() for part, tensor in parts.items() if part != "alpha"}
    layer |= {"lora_A.weight": down.float().contiguous(), "lora_B.weight": up.float().contiguous() * scale}
    if "lora_B.bias" in layer:
        layer["lora_B.bias"] = layer["lora_B.bias"] * scale
    return layer


class _Metadata:
    """What PEFT's configuration in a header, or beside the file, says of scales."""

    def __init__(self, file: Path, fields: Mapping[str, Any]) -> None:
        self._file = file
        self._ranks = self._numbers(fields, "r", "rank_pattern")
        self._alphas = self._numbers(fields, "lora_alpha", "alpha_pattern")
        self._rank_stabilised = fields.get("use_rslora") is True

    @classmethod
    def of(cls, file: Path, header: Mapping[str, str], component: str, tensors: Iterable[str]) -> _Metadata:
        fields: Any = {}
        if METADATA_KEY in header:
            try:
                fields = parse_json(header[METADATA_KEY].encode())
            except ValueError as error:
                raise CheckpointError(f"{file}: its metadata {METADATA_KEY} {error}") from error
            if not isinstance(fields, dict):
                raise CheckpointError(f"{file}: its metadata {METADATA_KEY} is no JSON object; export it again")
            fields = {key.removeprefix(f"{component}."): value for key, value in fields.items()}
        elif any(name.startswith("base_model.model.") for name in tensors):  # PEFT says it in a file of its own
            if (file.parent / _PEFT_CONFIG).is_file():
                fields = read_json(file.parent / _PEFT_CONFIG, CheckpointError)
            elif not any(name.endswith(".alpha") for name in tensors):
                log.warning("%s: no %s beside it says its alpha; its scale is taken as 1", file, _PEFT_CONFIG)
        return cls(file, fields)

    def scale(self, module: str, rank: int) -> float:
        said = self._of(module, self._ranks)
        if said is not None and said != rank:
            raise self._contradicted("r", said, f"{module}, of rank {rank}, does")
        alpha = self._of(module, self._alphas)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self._rank_stabilised else rank)

    def _numbers(self, fields: Mapping[str, Any], default: str, pattern: str) -> dict[str, tuple[int, float]]:
        """Name → (its place, number), ``""`` standing for all; PEFT takes the first name that fits."""
        given, by_name = fields.get(default), fields.get(pattern)
        by_name = {} if by_name is None else by_name
        if not isinstance(by_name, dict) or not all(_PATTERN.fullmatch(str(name)) for name in by_name):
            raise self._contradicted(pattern, by_name)
        numbers = {**by_name, **({} if given is None else {"": given})}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise self._contradicted(pattern if name else default, value)
        return {name: (place, float(value)) for place, (name, value) in enumerate(numbers.items())}

    @staticmethod
    def _of(module: str, numbers: Mapping[str, tuple[int, float]]) -> float | None:
        """Of the names that are ``module`` or its end: a few look-ups, however many names a file lists."""
        words = module.split(".")
        ends = [".".join(words[start:]) for start in range(len(words))]
        fitting = [numbers[name] for name in (f"^{module}", *ends) if name in numbers]
        return min(fitting)[1] if fitting else numbers[""][1] if "" in numbers else None

    def _contradicted(self, field: str, value: object, by: str = "its tensors do") -> CheckpointError:
        return CheckpointError(
            f"{self._file}: its metadata gives {field} = '{printable(value, 80)}', which {by} not bear out; export it "
            "again"
        )


def write_lora(lora: Lora, file: Path, component: str, kohya: bool = False) -> Path:
    """:func:`writing_lora`, done."""
    with writing_lora(lora, file, component, kohya):
        return file


@contextmanager
def writing_lora(lora: Lora, file: Path, component: str, kohya: bool = False) -> Iterator[None]:
    """Write ``lora`` with the names of ``diffusers``, or with those of kohya's trainers (``kohya``), to take ``file``'s
    place on leaving.

    The scale is in B, and alpha, wherever a file says it, is the rank. So no reader can be wrong about it: not one that
    takes ``alpha / rank``, of a tensor or of the header, nor one that knows no alpha and takes 1; not a dict of
    tensors, which has no header; not ``diffusers``, whose Stable Diffusion loader refuses ``….alpha`` beside its names.
    Where ranks are mixed, kohya's layout has the most frequent one as the alpha of all, B multiplied accordingly:
    ``diffusers`` 0.42 forgets alphas that differ on attention layers of UNets.

    kohya's names of a UNet are ``lora_unet_<path with underscores>.lora_down``, ``.lora_up``, ``.alpha``; for SDXL,
    too, which sd-scripts itself writes with LDM's block names: readers take both. For transformers ComfyUI and Forge
    read ``diffusers``' names; these files differ by ``.alpha`` alone.

    Raises:
        ConfigurationError: DoRA or biases in kohya's layout, whose readers would pass them over.
    """
    if kohya and lora.more:
        raise ConfigurationError(
            f"{file}: this adapter has {', '.join(lora.more)} beside its matrices, which kohya's layout has no place "
            "for; write --to diffusers, or merged: --to pipeline or single-file"
        )
    tensors: dict[str, Tensor] = {}
    for module, layer in lora.layers.items():
        rank = len(layer["lora_A.weight"])
        path = f"{component}.{module}"
        if kohya and component == "unet":
            path = f"lora_unet_{module.replace('.', '_')}"
        for part, tensor in layer.items():
            if kohya and part == "lora_B.weight" and rank != lora.rank:
                tensor = tensor * (rank / lora.rank)
            if path.startswith("lora_unet_"):
                part = part.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
            tensors[f"{path}.{part}"] = tensor
        if kohya:
            tensors[f"{path}.alpha"] = torch.tensor(float(lora.rank))
    from safetensors.torch import save_file

    header = {**lora.header, "ss_network_module": "networks.lora"}
    header["ss_network_dim"] = header["ss_network_alpha"] = str(lora.rank)
    patterns = {f"^{module}": rank for module, rank in lora.ranks.items() if rank != lora.rank}
    described = {
        "r": lora.rank,
        "lora_alpha": lora.rank,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": sorted(lora.layers),
        "lora_bias": "lora_B.bias" in lora.more,
        "use_dora": "lora_magnitude_vector" in lora.more,
    }
    header.pop(METADATA_KEY, None)
    if not kohya:  # for diffusers, which takes it or ``.alpha``, not both
        header[METADATA_KEY] = json.dumps({f"{component}.{key}": value for key, value in described.items()})
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary:
        save_file(tensors, temporary, {"format": "pt", **header})
        yield
