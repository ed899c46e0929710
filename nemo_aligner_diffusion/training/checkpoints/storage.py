"""Tensors of a checkpoint in safetensors files: no pickle is written, and none can be read.

The files are written here and not by the library, which would hold a second copy of a process's share in memory and
syncs nothing to disk: tensors are streamed one after the other and added to the checksum on their way. Any reader of
safetensors reads them.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from nemo_aligner_diffusion.training.checkpoints.files import STATE, FileRecord, read_state

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_contents(folder: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint, whose table of tensors has been compared with the files' own headers.

    Raises:
        ValueError: it is no such document, or the files hold something else.
        OSError: a file cannot be read.
    """
    state = read_state(folder)
    for file_name, names in _by_file(state["tensors"]).items():
        if Path(file_name).name != file_name:
            raise ValueError(f"its {STATE} looks for tensors in {file_name!r}, outside of the checkpoint")
        with safe_open(folder / file_name, framework="pt") as file:
            there = set(file.keys())
            for name in names:
                entry = state["tensors"][name]
                stored = file.get_slice(name) if name in there else None
                found = None if stored is None else (stored.get_dtype(), list(stored.get_shape()))
                if found != (entry["dtype"], entry["shape"]) or entry["dtype"] not in DTYPES:
                    raise ValueError(f"{file_name} holds another tensor {name} than {STATE} says, or none")
    return state


def stored_tensors(folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that ``entries`` of a checkpoint's ``state.json`` name, mapped from their files: copy what is kept.

    Raises:
        ValueError: a file holds something else.
        OSError: a file cannot be read.
    """
    for file_name, names in _by_file(entries).items():
        with safe_open(folder / file_name, framework="pt") as file:
            for name in names:
                stored = file.get_tensor(name)
                if list(stored.shape) != entries[name]["shape"] or stored.dtype != DTYPES[entries[name]["dtype"]]:
                    raise ValueError(f"{file_name} holds another {name} than {STATE} says")
                yield name, stored


def table(file_name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What ``state.json`` says of tensors in a file."""
    return {
        name: {"file": file_name, "dtype": _NAMES[value.dtype], "shape": list(value.shape)}
        for name, value in tensors.items()
    }


def _by_file(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name, entry in entries.items():
        names.setdefault(str(entry["file"]), []).append(name)
    return names


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write a safetensors file and have it on disk before returning; no second copy of the tensors is made.

    Args:
        path: the file.
        tensors: dense, on the CPU.

    Raises:
        OSError: the disk is full, or something else of the kind.
        ValueError: a dtype that safetensors does not have.
    """
    # large elements first: every tensor then begins at a multiple of its element size
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{name} is {tensor.dtype}; a checkpoint holds {', '.join(map(str, _NAMES))}")
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    crc = size = 0
    with open(path, "wb") as file:

        def write(data: Any) -> None:
            nonlocal crc, size
            file.write(data)
            crc = zlib.crc32(data, crc)
            size += len(data)

        write(struct.pack("<Q", len(text)) + text)
        for name in order:
            if tensors[name].numel():
                write(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    if path.stat().st_size != size:  # some network file systems report a full disk no earlier
        raise OSError(errno.EIO, f"{path.name} has {path.stat().st_size} bytes after {size} were written")
    return FileRecord(size, crc)
