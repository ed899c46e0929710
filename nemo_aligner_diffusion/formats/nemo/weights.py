"""The weights member of a ``.nemo``: tensors out of untrusted bytes, or an error."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from nemo_aligner_diffusion.errors import ArchiveError, printable
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
    from nemo_aligner_diffusion.formats.nemo.state_dict_pickle import ForbiddenGlobalError, NotDenseError

    try:
        with open_stream() as stream:
            return _checked_tensors(path, _read_records(path, name, size_bytes, stream, limits))
    except ArchiveError:
        raise
    except MemoryError:
        raise archive_error(path, f"needs more memory for {name} than this machine has", "Use a larger one.") from None
    except ForbiddenGlobalError as error:
        raise archive_error(
            path,
            f"has a {name} whose pickle asks for {printable(error)!r}: code, not only tensors; none was run",
            "Only plain state dicts are loaded. Do not trust this archive.",
        ) from error
    except zipfile.BadZipFile as error:
        # PyTorch writes checksums and does not compare them: a flipped bit would silently become another reward.
        raise archive_error(
            path,
            f"has a damaged {name}: a checksum or a header is wrong ({printable(error)})",
            "Download the file again (or save it with torch.serialization.set_crc32_options(True)).",
        ) from error
    except NotDenseError as error:
        raise archive_error(
            path,
            f"has a {name} with a tensor that is not dense: {printable(error)}",
            "Save it with .cpu().contiguous() and without quantisation.",
        ) from error
    # zipfile has no common base for what it raises on damaged or hostile input.
    except Exception as error:
        raise archive_error(
            path,
            f"has a {name} that cannot be loaded as plain tensors ({type(error).__name__}: {printable(error)})",
            "It should be a torch.save'd state dict; download or save the archive again.",
        ) from error


def _read_records(path: Path, name: str, size_bytes: int, stream: IO[bytes], limits: Limits) -> dict[Any, Any]:
    """What the pickle says, after refusing flipped bits, odd records and names that another reader takes for others."""
    import numpy as np
    import torch

    from nemo_aligner_diffusion.formats.nemo.state_dict_pickle import read_state_dict

    if size_bytes > limits.weights_bytes:
        raise archive_error(path, f"holds {size_bytes} bytes of weights", "Pass larger Limits if you trust the file.")
    magic = stream.read(len(_ZIP_MAGIC))
    if magic != _ZIP_MAGIC:
        raise archive_error(
            path,
            f"has a {name} that is no torch.save file of PyTorch 1.6 or later",
            "Load it with the program that wrote it and torch.save its state dict anew.",
        )
    # Before zipfile makes an object of each entry.
    if (listed := _directory_bytes(stream, size_bytes)) > limits.records * _MOST_BYTES_A_RECORD:
        raise archive_error(
            path,
            f"has a {name} with a table of contents of {listed} bytes; at most {limits.records} records are allowed",
            "Pass larger Limits if you trust the file.",
        )
    stream.seek(0)
    with zipfile.ZipFile(stream) as records:
        entries = sorted(records.infolist(), key=lambda entry: entry.header_offset)
        ends = [entry.header_offset + entry.file_size for entry in entries]
        pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
        if (
            # torch looks names up without regard to case, and C ends them at a NUL, where Python only shows the rest
            len({entry.filename.lower() for entry in entries}) != len(entries)
            or any(entry.orig_filename != entry.filename for entry in entries)
            or len(entries) > limits.records
            or any(end > after.header_offset for end, after in zip(ends, entries[1:], strict=False))
            or any(end > size_bytes for end in ends)
            or any(entry.compress_type != zipfile.ZIP_STORED or _is_folder(entry) for entry in entries)
            or len({entry.filename.partition("/")[0] for entry in entries}) != 1
            or len(pickles) != 1
            or pickles[0].filename.partition("/")[2] != "data.pkl"
            or pickles[0].file_size > limits.pickle_bytes
        ):
            raise archive_error(
                path,
                f"has a {name} with duplicate, compressed, overlapping or oversized records, which torch.save never "
                "writes",
                "Do not trust this archive; get it from another source.",
            )
        top = pickles[0].filename.removesuffix("data.pkl")
        if f"{top}byteorder" in records.namelist() and records.read(f"{top}byteorder") != b"little":
            raise ValueError("its numbers are stored with the highest byte first")
        storages = {
            entry.filename.removeprefix(f"{top}data/"): entry
            for entry in entries
            if entry.filename.startswith(f"{top}data/")
        }

        def read(key: str) -> torch.Tensor:
            content = torch.empty(storages[key].file_size, dtype=torch.uint8)
            place, end = content.numpy(), 0
            with records.open(storages[key]) as record:  # compares the checksum
                while block := record.read(BLOCK_BYTES):
                    place[end : end + len(block)] = np.frombuffer(block, np.uint8)
                    end += len(block)
            if end != len(content):
                raise ValueError(f"its record {key!r} ends early")
            return content

        sizes = {key: entry.file_size for key, entry in storages.items()}
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


def _checked_tensors(path: Path, loaded: Any) -> dict[str, torch.Tensor]:
    import torch

    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]  # a Lightning checkpoint saved in the state dict's place
    tensors: dict[str, torch.Tensor] = {}
    for name, value in loaded.items():
        if isinstance(name, str) and name.endswith("_extra_state"):
            continue  # Transformer Engine's scaling factors: nothing here uses them
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise archive_error(
                path,
                f"has a state dict whose entry {printable(name)!r} is a {type(value).__name__}",
                "Every entry of a state dict is a tensor with a string for its name.",
            )
        tensors[name] = value
    return tensors
