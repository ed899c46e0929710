"""A checkpoint as a folder on disk: complete or not there, checked before use, removed in one stroke.

``checkpoints/step_NNNNNN/`` holds ``state.json`` (everything that is not a tensor, and where each tensor is),
``tensors-NNNNN.safetensors`` (one file for each process that wrote) and ``manifest.json`` (size and checksum of the
others). It is written under a hidden name beside its place, flushed to disk, and renamed. No pickle is written, and
none can be read.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemo_aligner_diffusion.formats.files import parse_json, read_bytes
from nemo_aligner_diffusion.runtime.files import UNFINISHED, give_usual_mode, sync_directory, write_atomic

FORMAT = 2  # 1 was a single file, written by torch.save
MANIFEST = "manifest.json"
STATE = "state.json"
LAST_MARKER = "last"
_BLOCK = 4 * 2**20  # bytes read at a time; zlib works on it without the interpreter's lock

Record = dict[str, int]  # what the manifest says of a file


def record_of(path: Path) -> Record:
    """Size and checksum of a file as it is. zlib's CRC-32 finds damage, not malice, at disk speed."""
    crc = size = 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
            size += len(block)
    return {"bytes": size, "crc32": crc}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Record:
    """Write a safetensors file and have it on disk before returning.

    Args:
        path: the file.
        tensors: contiguous, on the CPU, none of them sharing memory with another.

    Raises:
        OSError, SafetensorError: the disk is full, or something else of the kind.
    """
    save_file(dict(tensors), path, metadata={"format": "pt"})
    give_usual_mode(path)
    with open(path, "rb+") as file:  # some network file systems report a full disk no earlier
        os.fsync(file.fileno())
    return record_of(path)


def table_of(path: Path) -> dict[str, dict[str, Any]]:
    """What ``state.json`` says of the tensors in a safetensors file: by name its file, dtype and shape."""
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        stored = {name: file.get_slice(name) for name in names}
        return {
            name: {"file": path.name, "dtype": value.get_dtype(), "shape": list(value.get_shape())}
            for name, value in stored.items()
        }


def write_manifest(folder: Path, records: Mapping[str, Record]) -> None:
    content = {"format": FORMAT, "files": dict(sorted(records.items()))}
    write_atomic(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


def verify(folder: Path) -> int:
    """Compare a checkpoint with its manifest, every byte of it.

    Returns:
        bytes checked.

    Raises:
        ValueError: what is wrong with it, as the end of the sentence "it cannot be read (…)".
        OSError: it cannot be read at all.
    """
    records = _manifest(folder)
    for name in records:
        if not (folder / name).is_file():
            raise ValueError(f"its file {name} is missing")
    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(records, pool.map(lambda name: record_of(folder / name), records), strict=True))
    for name, record in records.items():
        if found[name] != record:
            raise ValueError(f"its file {name} is damaged: its checksum is not the one in {MANIFEST}")
    return sum(record["bytes"] for record in found.values())


def read_state(folder: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint, whose table of tensors has been compared with the files' own headers.

    Raises:
        ValueError: it is no such document, or the files hold something else.
        OSError: a file cannot be read.
    """
    state = parse_json(read_bytes(folder / STATE))
    if not isinstance(state, dict) or not isinstance(state.get("tensors"), dict) or "tree" not in state:
        raise ValueError(f"its {STATE} was not written by this program")
    entries = state["tensors"]
    found: dict[str, dict[str, Any]] = {}
    for file_name in {str(entry["file"]) for entry in entries.values()}:
        if Path(file_name).name != file_name:
            raise ValueError(f"its {STATE} looks for tensors in {file_name!r}, outside of the checkpoint")
        found |= table_of(folder / file_name)
    for name, entry in entries.items():
        if found.get(name) != entry:
            raise ValueError(f"{entry['file']} holds another tensor {name} than {STATE} says, or none")
    return state


def publish(temporary: Path, place: Path) -> None:
    """Give a complete folder its name, and note it as the newest in ``last``.

    Whoever looks sees the old state of things or the new one, after a power failure too.
    """
    sync_directory(temporary)
    if place.exists():  # the same step once more: a resumed run that saves where it began
        remove(place)
    os.rename(temporary, place)
    sync_directory(place.parent)
    mark_last(place)


def mark_last(place: Path) -> None:
    """Note a checkpoint as the newest one, in ``last``."""
    marker, text = place.parent / LAST_MARKER, place.name + "\n"
    if not marker.is_file() or marker.read_text(encoding="utf-8") != text:
        write_atomic(marker, text)


def remove(folder: Path) -> None:
    """Delete a checkpoint; a process that is killed meanwhile leaves no half checkpoint under its name."""
    doomed = folder.with_name(f".{folder.name}.removed{UNFINISHED}")
    shutil.rmtree(doomed, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def hidden_name(folder: Path) -> Path:
    """Where a checkpoint is while it is written; the same on every process."""
    return folder.with_name(f".{folder.name}{UNFINISHED}")


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_bytes(folder / MANIFEST))
    except FileNotFoundError:
        raise ValueError(f"it has no {MANIFEST}") from None
    except ValueError:
        raise ValueError(f"its {MANIFEST} is damaged") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else content
        raise ValueError(f"its format is {found!r}, and this version reads {FORMAT}")
    records = content.get("files")
    if not isinstance(records, dict) or STATE not in records:
        raise ValueError(f"its {MANIFEST} is damaged")
    if any("/" in name or name.startswith(".") for name in records):
        raise ValueError(f"its {MANIFEST} was not written by this program")
    return records
