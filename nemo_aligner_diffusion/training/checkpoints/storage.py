"""``torch.distributed.checkpoint`` on safetensors files: no pickle is written, and none can be read.

The storage that comes with it keeps its table of contents in ``.metadata``, a pickle, which a downloaded folder could
use to run code; its Hugging Face storage has no place for checksums, syncs nothing to disk and copies a rank's whole
share in memory. These two classes use its planners and collectives with files of our own making: tensors are streamed
to disk one after the other and added to the checksum on their way. Any reader of safetensors reads the files.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import LoadPlan, LoadPlanner, Metadata, SavePlan, SavePlanner
from torch.distributed.checkpoint import StorageReader as Reader
from torch.distributed.checkpoint import StorageWriter as Writer
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from nemo_aligner_diffusion.training.checkpoints.files import (
    FORMAT,
    STATE,
    FileRecord,
    hidden_name,
    publish,
    read_state,
    write_manifest,
    write_synced,
)

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


class FolderWriter(Writer):
    """Writes a checkpoint folder: each rank a file, the coordinator the rest, which makes it visible as a whole.

    Args:
        place: ``checkpoints/step_NNNNNN``.
        tree: the document for ``state.json``, of the coordinator's.
    """

    def __init__(self, place: Path, tree: Any) -> None:
        super().__init__()
        self.place = place
        self.temporary = hidden_name(place)
        self.tree = tree
        self.rank = 0

    def reset(self, checkpoint_id: Any = None) -> None:
        return

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.rank = int(kwargs.get("rank", 0))

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        shutil.rmtree(self.temporary, ignore_errors=True)  # of a save that was killed
        self.temporary.mkdir(parents=True)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        if plan.items:
            tensors: dict[str, Tensor] = {}
            for item in plan.items:
                value = planner.resolve_data(item)
                assert isinstance(value, Tensor), item.index.fqn
                tensors[item.index.fqn] = value.detach().to("cpu")
            name = f"tensors-{self.rank:05d}.safetensors"
            record = write_tensors(self.temporary / name, tensors)
            results = [WriteResult(item.index, tensors[item.index.fqn].nbytes, (name, record)) for item in plan.items]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        tensors: dict[str, Any] = {}
        records: dict[str, FileRecord] = {}
        for result in (result for of_rank in results for result in of_rank):
            name, record = result.storage_data
            entry = metadata.state_dict_metadata[result.index.fqn]
            assert isinstance(entry, TensorStorageMetadata), result.index.fqn
            dtype = _NAMES[entry.properties.dtype]
            tensors[result.index.fqn] = {"file": name, "dtype": dtype, "shape": list(entry.size)}
            records[name] = record
        state = {"format": FORMAT, "tree": self.tree, "tensors": dict(sorted(tensors.items()))}
        records[STATE] = write_synced(self.temporary / STATE, (json.dumps(state) + "\n").encode())
        write_manifest(self.temporary, records)
        publish(self.temporary, self.place)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class FolderReader(Reader):
    """Reads tensors of a checkpoint folder that has been verified.

    Args:
        folder: ``checkpoints/step_NNNNNN``.
        tensors: from ``state.json``: name -> file, dtype, shape. The files' own headers must agree with it.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        self.folder = folder
        self.tensors = tensors

    def reset(self, checkpoint_id: Any = None) -> None:
        return

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        entries = {}
        for name, entry in self.tensors.items():
            size = torch.Size(entry["shape"])
            entries[name] = TensorStorageMetadata(
                properties=TensorProperties(dtype=DTYPES[entry["dtype"]]),
                size=size,
                chunks=[ChunkStorageMetadata(offsets=torch.Size([0] * len(size)), sizes=size)],
            )
        return Metadata(
            state_dict_metadata=entries,  # type: ignore[arg-type]
            storage_data={MetadataIndex(name, [0] * len(e["shape"])): e["file"] for name, e in self.tensors.items()},
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        return

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            by_file.setdefault(self.tensors[item.storage_index.fqn]["file"], []).append(item)
        for name, items in by_file.items():
            with safe_open(self.folder / name, framework="pt") as file:
                for item in items:
                    stored = file.get_tensor(item.storage_index.fqn)
                    target = planner.resolve_tensor(item).detach()
                    if stored.shape != target.shape or stored.dtype != target.dtype:
                        raise ValueError(f"{name} holds another {item.storage_index.fqn} than {STATE} says")
                    target.copy_(stored)
                    planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def read_contents(folder: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint, whose table of tensors has been compared with the files' own headers.

    Raises:
        ValueError: it is no such document, or the files hold something else.
        OSError: a file cannot be read.
    """
    state = read_state(folder)
    by_file: dict[str, list[str]] = {}
    for name, entry in state["tensors"].items():
        by_file.setdefault(str(entry["file"]), []).append(name)
    for file_name, names in by_file.items():
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
