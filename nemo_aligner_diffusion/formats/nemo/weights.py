"""The weights member of a ``.nemo``: tensors out of untrusted bytes, or an error."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from nemo_aligner_diffusion.errors import printable
from nemo_aligner_diffusion.formats.nemo.common import BLOCK_BYTES, Limits, archive_error

if TYPE_CHECKING:
    import torch

_ZIP_MAGIC = b"PK\x03\x04"
_MOST_BYTES_A_RECORD = 256  # in the zip's table of contents: 46, the name, and 28 for large files


def load_tensors(
    path: Path, name: str, size_bytes: int, open_stream: Callable[[], IO[bytes]], limits: Limits
) -> dict[str, torch.Tensor]:
    """The state dict that ``torch.save`` wrote into member ``name`` of the archive ``path``.

    ``open_stream`` gives a seekable stream over the member's ``size_bytes`` bytes. The tensors are dense, on the CPU
    and as saved; ``_extra_state`` entries are left out.

    Raises:
        ArchiveError: the member is damaged, holds anything but tensors, or asks for code.
    """
    try:
        with open_stream() as stream:
            return _checked_tensors(_read_records(size_bytes, stream, limits))
    except MemoryError:
        raise archive_error(path, f"needs more memory for {name} than this machine has", "Use a larger one.") from None
    except zipfile.BadZipFile as error:
        # PyTorch writes checksums and does not compare them: a flipped bit would silently become another reward.
        raise archive_error(
            path,
            f"has a damaged {name}: a checksum or a header is wrong ({printable(error)})",
            "Download the file again (or save it with torch.serialization.set_crc32_options(True)).",
        ) from error
    # zipfile has no common base for what it raises on damaged or hostile input.
    except Exception as error:
        raise archive_error(
            path,
            f"has a {name} that cannot be loaded as plain tensors ({type(error).__name__}: {printable(error, 400)})",
            "It should be a torch.save'd state dict: save the archive again, or do not trust it.",
        ) from error


def _read_records(size_bytes: int, stream: IO[bytes], limits: Limits) -> dict[Any, Any]:
    """What the pickle says, after refusing odd records and names that another reader takes for others."""
    import numpy as np
    import torch

    from nemo_aligner_diffusion.formats.nemo.state_dict_pickle import read_state_dict

    if size_bytes > limits.weights_bytes:
        raise ValueError(f"{size_bytes} bytes of weights; pass larger Limits if you trust the file")
    if stream.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:
        raise ValueError("it is no torch.save file of PyTorch 1.6 or later; torch.save its state dict anew")
    # Before zipfile makes an object of each entry.
    if (listed := _directory_bytes(stream, size_bytes)) > limits.records * _MOST_BYTES_A_RECORD:
        raise ValueError(
            f"it has a table of contents of {listed} bytes; at most {limits.records} records are allowed: pass larger "
            "Limits if you trust the file"
        )
    stream.seek(0)
    with zipfile.ZipFile(stream) as records:
        entries = sorted(records.infolist(), key=lambda entry: entry.header_offset)
        ends = [entry.header_offset + entry.file_size for entry in entries]
        starts_after = [*(entry.header_offset for entry in entries), size_bytes][1:]
        pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
        if (
            # torch looks names up without regard to case, and C ends them at a NUL, where Python only shows the rest
            len({entry.filename.lower() for entry in entries}) != len(entries)
            or any(entry.orig_filename != entry.filename for entry in entries)
            or len(entries) > limits.records
            or any(end > start for end, start in zip(ends, starts_after, strict=True))
            or any(entry.compress_type != zipfile.ZIP_STORED or _is_folder(entry) for entry in entries)
            or len({entry.filename.partition("/")[0] for entry in entries}) != 1
            or len(pickles) != 1
            or pickles[0].filename.partition("/")[2] != "data.pkl"
            or pickles[0].file_size > limits.pickle_bytes
        ):
            raise ValueError(
                "it has duplicate, compressed, overlapping or oversized records, which torch.save never writes"
            )
        top = pickles[0].filename.removesuffix("data.pkl")
        if f"{top}byteorder" in records.namelist() and records.read(f"{top}byteorder") != b"little":
            raise ValueError("its numbers are stored with the highest byte first")
        data = f"{top}data/"
        sizes = {e.filename.removeprefix(data): e.file_size for e in entries if e.filename.startswith(data)}

        def read(key: str) -> torch.Tensor:
            content = torch.empty(sizes[key], dtype=torch.uint8)
            place, end = content.numpy(), 0
            with records.open(data + key) as record:  # compares the checksum
                while block := record.read(BLOCK_BYTES):
                    place[end : end + len(block)] = np.frombuffer(block, np.uint8)
                    end += len(block)
            if end != len(content):
                raise ValueError(f"its record {key!r} ends early")
            return content

        return read_state_dict(records.read(pickles[0]), sizes, read)


def _is_folder(entry: zipfile.ZipInfo) -> bool:
    # By its name, or by an attribute of MS-DOS: PyTorch's reader takes either.
    return entry.is_dir() or bool(entry.external_attr & 0x10)


def _directory_bytes(stream: IO[bytes], size_bytes: int) -> int:
    """Size of the zip's table of contents as its last 22 bytes (and, for large files, the zip64 record) give it."""
    stream.seek(max(size_bytes - 22 - 20, 0))
    tail = stream.read()
    signature, size, comment = struct.unpack("<4s8xI4xH", tail[-22:])
    if signature != b"PK\x05\x06" or comment:
        raise ValueError("its zip file does not end as torch.save ends it; it may be cut short")
    if tail[:4] == b"PK\x06\x07":
        (offset,) = struct.unpack("<8xQ4x", tail[:20])
        if offset > size_bytes:
            raise ValueError("its zip file refers to a place beyond its end")
        stream.seek(offset)
        large: int = struct.unpack("<4s36xQ", stream.read(48))[1]
        return max(large, 0 if size == 0xFFFFFFFF else size)
    return int(size)


def _checked_tensors(loaded: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    import torch

    if isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]  # a Lightning checkpoint saved in the state dict's place
    tensors: dict[str, torch.Tensor] = {}
    for name, value in loaded.items():
        if isinstance(name, str) and name.endswith("_extra_state"):
            continue  # Transformer Engine's scaling factors: nothing here uses them
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(
                f"its entry {printable(name)!r} is a {type(value).__name__}; expected tensors with strings for names"
            )
        tensors[name] = value
    return tensors
