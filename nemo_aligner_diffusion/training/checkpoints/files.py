"""A checkpoint as a folder on disk: complete or not there, checked before use, removed in one stroke. Imports no torch.

``checkpoints/step_NNNNNN/`` holds ``state.json`` (everything that is not a tensor, and where each tensor is),
``tensors-NNNNN.safetensors`` (one file for each process that wrote) and ``manifest.json`` (size and checksum of the
others). It is written under a hidden name beside its place, flushed to disk, and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_aligner_diffusion.formats.files import parse_json, read_bytes
from nemo_aligner_diffusion.runtime.files import UNFINISHED, sync_directory, write_atomic

FORMAT = 2  # 1 was a single file, written by torch.save
MANIFEST = "manifest.json"
STATE = "state.json"
LAST_MARKER = "last"
_BLOCK = 4 * 2**20  # bytes read at a time; zlib works on it without the interpreter's lock


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says of a file. The checksum is zlib's CRC-32: it finds damage, not malice, at disk speed."""

    bytes: int
    crc32: int


def record_of(path: Path) -> FileRecord:
    """Size and checksum of a file as it is."""
    crc = size = 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
            size += len(block)
    return FileRecord(size, crc)


def write_synced(path: Path, data: bytes) -> FileRecord:
    """Write a file and have it on disk before returning."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(data), zlib.crc32(data))


def write_manifest(folder: Path, records: Mapping[str, FileRecord]) -> None:
    files = {name: asdict(record) for name, record in sorted(records.items())}
    content = {"format": FORMAT, "files": files}
    write_synced(folder / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())


def verify(folder: Path, threads: int = 4) -> int:
    """Compare a checkpoint with its manifest, every byte of it.

    Returns:
        bytes checked.

    Raises:
        ValueError: what is wrong with it, as the end of the sentence "it cannot be read (…)".
        OSError: it cannot be read at all.
    """
    records = _manifest(folder)
    for name, record in records.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"its file {name} is missing")
        if path.stat().st_size != record.bytes:
            raise ValueError(f"its file {name} has {path.stat().st_size} bytes instead of {record.bytes}")
    with ThreadPoolExecutor(threads) as pool:
        found = dict(zip(records, pool.map(lambda name: record_of(folder / name), records), strict=True))
    for name, record in records.items():
        if found[name] != record:
            raise ValueError(f"its file {name} is damaged: its checksum is not the one in {MANIFEST}")
    return sum(record.bytes for record in records.values())


def read_state(folder: Path) -> dict[str, Any]:
    """The content of ``state.json``.

    Raises:
        ValueError: it is no such document.
    """
    state = parse_json(read_bytes(folder / STATE))
    if not isinstance(state, dict) or not isinstance(state.get("tensors"), dict) or "tree" not in state:
        raise ValueError(f"its {STATE} was not written by this program")
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


def _manifest(folder: Path) -> dict[str, FileRecord]:
    try:
        content = parse_json(read_bytes(folder / MANIFEST))
    except FileNotFoundError:
        raise ValueError(f"it has no {MANIFEST}") from None
    except ValueError:
        raise ValueError(f"its {MANIFEST} is damaged") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else content
        raise ValueError(f"its format is {found!r}, and this version reads {FORMAT}")
    try:
        records = {
            str(name): FileRecord(int(record["bytes"]), int(record["crc32"]))
            for name, record in content["files"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"its {MANIFEST} is damaged") from None
    if STATE not in records or any("/" in name or name.startswith(".") for name in records):
        raise ValueError(f"its {MANIFEST} was not written by this program")
    return records
