"""Which files hold a network's weights, what they are by their content, and what tensors they hold. No torch here."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from nemo_aligner_diffusion.errors import AlignerError, CheckpointError, printable
from nemo_aligner_diffusion.formats.files import MAX_DOCUMENT_BYTES, open_regular, read_json, what_instead
from nemo_aligner_diffusion.keys import flatten

Shapes = Mapping[str, tuple[int, ...]]

# diffusers' name for a network's weights, then transformers' two; `.fp16` and the like stand before the ending
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_WEIGHTS = re.compile(rf"({'|'.join(_STEMS)})(?:\.([\w-]+))?\.(safetensors|bin)")
_INDEX = re.compile(rf"({'|'.join(_STEMS)})\.(safetensors|bin)\.index(?:\.([\w-]+))?\.json")
VARIANTS = ("", "bf16", "fp16", "non_ema")  # the first that there is; any other one comes last
_NOT_WEIGHTS = {  # first bytes -> what such a file is
    b"GGUF": "a GGUF file of quantized weights; give the original .safetensors",
    b"\x1f\x8b": "a gzip archive; give the weights inside it (a .nemo holds model_weights.ckpt)",
    b"\x89HDF": "an HDF5 file of TensorFlow or Keras; give the PyTorch weights",
}


def kind_of(path: Path) -> str:
    """``safetensors``, ``zip`` or ``pickle`` (of torch), or ``index`` (of shards): by the content, whatever the name.

    Raises:
        CheckpointError: the file is none of these; says what it is instead.
    """
    try:
        with open_regular(path) as stream:
            start, size = stream.read(512), os.fstat(stream.fileno()).st_size
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise CheckpointError(f"{path}: {reason}; expected a .safetensors, .bin, .ckpt or .pt checkpoint") from error
    if not size:
        raise CheckpointError(f"{path}: the file is empty (0 bytes); fetch it again")
    header = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and header < 1 << 40:
        if header > min(size - 8, MAX_DOCUMENT_BYTES):
            raise CheckpointError(
                f"{path}: a safetensors file that is cut off: its header has {header:,} bytes, the file {size:,}; "
                f"fetch it again"
            )
        return "safetensors"
    if start.startswith(b"PK\x03\x04"):
        return "zip"
    if start.lstrip().startswith(b"{"):
        if path.name.endswith(".json"):
            return "index"
        raise CheckpointError(f"{path}: holds JSON text, not weights: {printable(start[:80].decode('latin-1'), 80)}")
    for mark, what in _NOT_WEIGHTS.items():
        if start.startswith(mark):
            raise CheckpointError(f"{path}: this is {what}")
    if instead := what_instead(start):
        raise CheckpointError(f"{path}: no weights, but {instead}")
    if start[257:262] == b"ustar":
        raise CheckpointError(f"{path}: this is a tar archive; give the weights inside it (in a .nemo: *.ckpt)")
    if start[:1] == b"\x80" and start[1] < 6:
        return "pickle"
    raise CheckpointError(
        f"{path}: no weights that are known here: it begins with {printable(start[:8])}; expected safetensors or what "
        f"torch.save writes"
    )


def find_weights(path: Path, component: str) -> tuple[Path, str]:
    """The file of ``component``'s weights (or the index of its shards) and its variant, as in ``model.fp16.bin``.

    Args:
        path: the file itself, the component's folder, or the folder of its pipeline.

    Raises:
        CheckpointError: there is no such file or folder, or no weights in it.
    """
    if path.is_dir():
        for folder in (path, path / component):
            if found := _choices(folder):
                return found[0]
        there = ", ".join(sorted(printable(p.name, 60) for p in path.iterdir())[:8])
        raise CheckpointError(
            f"{path}: a folder without {component} weights (it holds {there or 'nothing'}); expected "
            f"{_STEMS[0]}.safetensors, {_STEMS[1]}.safetensors or the like in it or in its {component}/ folder"
        )
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder (given for the {component})")
    return path, ""


def _choices(folder: Path) -> list[tuple[Path, str]]:
    """Weights in ``folder``: the plain ones first, safetensors before pickles, one file before shards."""
    found = []
    for file in folder.iterdir() if folder.is_dir() else ():
        if match := _WEIGHTS.fullmatch(file.name):
            stem, variant, ending = match.groups()
        elif match := _INDEX.fullmatch(file.name):
            stem, ending, variant = match.groups()
        else:
            continue
        variant = variant or ""
        rank = VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS)
        key = (rank, variant, ending != "safetensors", file.suffix == ".json", _STEMS.index(stem))
        found.append((key, file, variant))
    return [(file, variant) for _, file, variant in sorted(found)]


def has_weights(folder: Path) -> bool:
    """Whether a network's own folder has weights of any variant, and all of their shards."""
    try:
        return bool(found := _choices(folder)) and (found[0][0].suffix != ".json" or bool(shards_of(found[0][0])))
    except CheckpointError:
        return False


def weight_patterns(folder: str, variant: str) -> tuple[str, ...]:
    """Of the files in a repository's ``folder`` (such as ``unet/``) that hold a variant: to fetch those alone."""
    dotted, shard = f".{variant}" if variant else "", "-?????-of-?????"
    names = [(f"{stem}{dotted}", f"{stem}{shard}{dotted}", f"{stem}{dotted}{shard}") for stem in _STEMS[:2]]
    return tuple(f"{folder}{name}.safetensors" for three in names for name in three)


def shards_of(index: Path) -> list[Path]:
    """The files that an ``*.index.json`` names, each of which is there.

    Raises:
        CheckpointError: the index is damaged, names a file of another folder, or one that is missing.
    """
    table = read_json(index, CheckpointError).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointError(f"{index}: its weight_map names no files; fetch it again")
    names = sorted(set(table.values()))
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"{index}: its weight_map names no files of this folder.")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise CheckpointError(
            f"{index}: {len(missing)} of its {len(names)} files are missing, e.g. {printable(missing[0])}; fetch them"
        )
    return [index.parent / name for name in names]


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file's tensors.

    Raises:
        CheckpointError: the header is damaged, or the file shorter than it says.
    """
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length)
    shapes: dict[str, tuple[int, ...]] = {}
    end = 0
    try:
        header = json.loads(text)
        for name, entry in header.items():
            if name != "__metadata__":
                shapes[name] = tuple(int(side) for side in entry["shape"])
                end = max(end, int(entry["data_offsets"][1]))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: a safetensors file whose header is damaged ({printable(error)})") from error
    if end + 8 + length > size:
        raise CheckpointError(
            f"{path}: a safetensors file that is cut off: {size:,} bytes of {end + 8 + length:,} are there; fetch it "
            f"again"
        )
    return shapes


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a file or index, without reading them; a pickle needs torch.

    Raises:
        CheckpointError: as :func:`kind_of`, or the file is damaged.
    """
    kind = kind_of(path)
    if kind == "index":
        return {name: shape for shard in shards_of(path) for name, shape in read_shapes(shard).items()}
    if kind == "safetensors":
        return read_header(path)
    from nemo_aligner_diffusion.formats.checkpoints import read_tensors

    return {name: tuple(tensor.shape) for name, tensor in read_tensors(path).items()}


def inner_names(names: Sequence[str], anchor: str) -> dict[str, dict[str, str]]:
    """Components whose tensor is called ``anchor``, by what stands before its name: inner name → name in the file.

    Wrappers are found so, however many there are: ``module._orig_mod.``, ``state_dict.unet.``.
    """
    prefixes = {
        plain[: -len(anchor)] for name in names if (plain := _plain(name)).endswith(anchor)
        and (len(plain) == len(anchor) or plain[-len(anchor) - 1] == ".")
    }  # fmt: skip
    return {
        prefix: {plain[len(prefix) :]: name for name in names if (plain := _plain(name)).startswith(prefix)}
        for prefix in prefixes
    }


def _plain(name: str) -> str:
    """Without what ``torch.compile``, FSDP and checkpointing put in the middle of names."""
    for wrapper in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    return name


def what_is_in(names: Sequence[str]) -> str:
    """What a file seems to hold, in words, for messages."""
    text = "\n".join(names)
    known = (
        ("a LoRA, not a model", ("lora_A.", "lora_down.", "lora_up.", ".hada_w1", ".lokr_w1")),
        ("a ControlNet", ("control_model.", "controlnet_cond_embedding.")),
        ("weights quantized by bitsandbytes", (".quant_state.", ".absmax")),
        ("weights in scaled 8 bit", ("scaled_fp8", ".scale_weight", ".weight_scale")),
        ("a UNet's", ("down_blocks.0.resnets.0.time_emb_proj", "input_blocks.")),
        ("a transformer's", ("transformer_blocks.", "double_blocks.", "joint_blocks.")),
        ("a VAE's", ("decoder.conv_in.", "decoder.mid")),
        ("a text encoder's", ("token_embedding.", "shared.weight")),
        ("an optimizer's", ("exp_avg",)),
    )
    found = [what for what, marks in known if any(mark in text for mark in marks)]
    found = found[:1] if "a LoRA, not a model" in found else found  # whose names are those of the network's layers
    listed = ", ".join(printable(name, 60) for name in names[:2])
    return f"{' and '.join(found) or 'something else'} ({len(names)} tensors: {listed}, …)"


def check_folder(folder: Path, error: type[AlignerError] = CheckpointError) -> None:
    """A model's folder before a library reads it: files to wait for, damaged JSON, and what names code to fetch.

    Raises:
        CheckpointError: (or ``error``) names the file and what is wrong with it.
    """
    for file in folder.iterdir() if folder.is_dir() else ():
        if not file.is_file() and not file.is_dir():
            raise error(f"{file} is no regular file; copy the folder again")
        if file.suffix != ".json" or not ("config" in file.name or file.name.endswith(".index.json")):
            continue
        if file.name.endswith(".index.json"):
            names = read_json(file, error).get("weight_map")
            if not isinstance(names, dict) or any(Path(str(name)).name != str(name) for name in names.values()):
                raise error(f"{file}: its weight_map names no files of this folder.")
            continue
        for key, value in flatten(read_json(file, error), dotted=True).items():
            if "attn_implementation" in key and "/" in str(value):  # transformers would fetch and run it
                raise error(f"{file} names code on the hub, {printable(key)} = {printable(value)!r}. Remove it.")
