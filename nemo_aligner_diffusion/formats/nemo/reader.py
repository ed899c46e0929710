"""The ``.nemo`` reader. Every byte is untrusted until checked; see the package's docstring."""

from __future__ import annotations

import functools
import io
import os
import re
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from nemo_aligner_diffusion.errors import ArchiveError, DataError, printable
from nemo_aligner_diffusion.formats.files import open_regular
from nemo_aligner_diffusion.formats.nemo.common import (
    ARTIFACT_SCHEME,
    BLOCK_BYTES,
    CONFIG_NAME,
    OUR_VERSION,
    WEIGHTS_NAME,
    Limits,
    archive_error,
    artifact_digest,
    listing,
)
from nemo_aligner_diffusion.formats.nemo.config import parse_config
from nemo_aligner_diffusion.formats.nemo.weights import load_tensors
from nemo_aligner_diffusion.formats.tar import GZIP_MAGIC, walk_stream

if TYPE_CHECKING:
    import torch

_GZIP = zlib.MAX_WBITS | 16  # what zlib calls that format
# Rank folders of model-parallel writers: mp_rank_00, tp_rank_00_pp_rank_000.
_RANK_FOLDER = re.compile(
    r"(?:mp_rank_(?P<rank>[0-9]{1,6})|tp_rank_(?P<tensor_rank>[0-9]{1,6})_pp_rank_(?P<stage>[0-9]{1,6}))/"
    + re.escape(WEIGHTS_NAME)
)
_HOW_TO_MERGE = (
    "Merge them first with NeMo's examples/nlp/language_modeling/megatron_change_num_partitions.py "
    "(target_tensor_model_parallel_size=1, target_pipeline_model_parallel_size=1)."
)
_A_TAR = "A .nemo file is a plain or gzipped tar; download or save it again."
_KINDS = {"link": "link", "other": "device, sparse or other special file"}


@dataclass(frozen=True)
class _Member:
    name: str  # without the leading "./"
    offset: int  # of its first byte in the (unpacked) tar
    size: int


class NemoArchive:
    """An opened ``.nemo``: ``config`` is parsed, weights and artifacts are read when asked for.

    Attributes:
        path: the file.
        config: the configuration as plain dicts and lists. References between keys (``${model.output_dim}``) are
            resolved; anything that would call an OmegaConf resolver (``${oc.env:…}``) stays the literal text it is.
        members: names in the archive, without ``./``.

    Raises:
        ArchiveError: the file is missing, no tar, damaged, hostile, or lacks its configuration or weights.
    """

    def __init__(self, path: str | os.PathLike[str], limits: Limits | None = None) -> None:
        self.path = Path(path)
        self._limits = limits or Limits()
        self._unpacked: bytes | None = None  # the whole tar, when the file is gzipped
        try:
            self._index = self._read_index()
        except FileNotFoundError:
            raise self._error("does not exist", "Give the path of a .nemo file that does.") from None
        except OSError as error:
            raise self._error(
                f"cannot be read: {error.strerror}", "Give the path of a regular, readable .nemo file."
            ) from None
        except MemoryError:
            raise self._error("needs more memory to open than this machine has", "Use a larger one.") from None
        except (DataError, zlib.error) as error:
            found = str(error).removeprefix(str(self.path)).lstrip(": ")
            raise self._error(f"is truncated, damaged or no tar ({found})", _A_TAR) from error
        self._weights = self._find_weights()
        self.config: dict[str, Any] = self._read_config()

    def __repr__(self) -> str:
        return f"NemoArchive({str(self.path)!r}, target={self.target!r})"

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(self._index)

    @property
    def target(self) -> str:
        """The dotted class name the writer recorded, or ``""``. It is a label: nothing is ever imported by it."""
        target = self.config.get("target")
        return target if isinstance(target, str) else ""

    def artifact(self, reference: str, most_bytes: int | None = None) -> bytes:
        """Bytes of the artifact that the configuration names ``nemo:<hash>_<name>`` (the scheme may be left out).

        ``most_bytes`` lowers the limit for what is parsed afterwards.
        """
        if not isinstance(reference, str):
            raise self._error(
                f"names an artifact by {printable(reference)!r}",
                f"An artifact is named by a string {ARTIFACT_SCHEME}<hash>_<name>.",
            )
        member = self._index.get(_normalise(reference.removeprefix(ARTIFACT_SCHEME)))
        if member is None:
            raise self._error(
                f"lacks the artifact {printable(reference)!r} that it should hold (it holds {listing(self._index)})",
                "Save the archive again with that file inside.",
            )
        content = self._read(member, min(self._limits.artifact_bytes, most_bytes or self._limits.artifact_bytes))
        ours = self.config.get("nemo_version") == OUR_VERSION
        if ours and not member.name.startswith(artifact_digest(content) + "_"):
            raise self._error(
                f"has a damaged artifact {member.name!r}: its content does not match the digest in its name",
                "Download the file again, or save the archive anew with the changed artifact.",
            )
        return content

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights, dense, on the CPU and as saved; ``_extra_state`` entries are left out."""
        if len(self._weights) > 1:
            raise self._error(
                f"holds weights split over {len(self._weights)} tensor-parallel ranks, "
                f"{listing(member.name for member in self._weights)}, which are not merged for this kind of model",
                _HOW_TO_MERGE,
            )
        return self.shards()[0]

    def shards(self) -> list[dict[str, torch.Tensor]]:
        """The weights of every tensor-parallel rank (``mp_rank_00/`` and so on); one of them where nothing is split."""
        count = len(self._weights)
        limits = replace(
            self._limits, records=self._limits.records // count, pickle_bytes=self._limits.pickle_bytes // count
        )
        return [
            load_tensors(self.path, member.name, member.size, functools.partial(self._window, member), limits)
            for member in self._weights
        ]

    def _read_index(self) -> dict[str, _Member]:
        with open_regular(self.path) as file:
            head = file.read(len(GZIP_MAGIC))
            if not head:
                raise self._error("is empty", _A_TAR)
            file.seek(0)
            if head == GZIP_MAGIC:
                self._unpacked = self._gunzip(file)
                return self._walk(io.BytesIO(self._unpacked), len(self._unpacked))
            return self._walk(file, os.fstat(file.fileno()).st_size)

    def _gunzip(self, file: IO[bytes]) -> bytes:
        """The unpacked tar, in memory. Read to the very end, so that gzip's own checksum is verified."""
        packed_bytes = os.fstat(file.fileno()).st_size
        allowed = max(self._limits.gzip_floor_bytes, self._limits.gzip_ratio * packed_bytes)
        unpacked = io.BytesIO()
        # zlib itself: the gzip module goes through any number of empty streams in one read.
        stream = zlib.decompressobj(_GZIP)
        while not stream.eof:
            packed = stream.unconsumed_tail or file.read(BLOCK_BYTES)
            block = stream.decompress(packed, BLOCK_BYTES)
            if not (packed or block or stream.eof):
                raise self._error("is truncated: its gzip stream has no end", "Download or copy the file again.")
            unpacked.write(block)
            if unpacked.tell() > allowed:
                raise self._error(
                    f"unpacks from {packed_bytes} to more than {allowed} bytes, as a gzip bomb does",
                    "If you trust the file, gunzip it by hand and give the plain tar.",
                )
        rest = stream.unused_data
        while not rest.strip(b"\0"):  # padding
            rest = file.read(BLOCK_BYTES)
            if not rest:
                return unpacked.getvalue()
        raise self._error("goes on after the end of its gzip stream", "Compress it as one.")

    def _walk(self, file: IO[bytes], total_bytes: int) -> dict[str, _Member]:
        """Every member's place, after checking all of them. Reads headers only."""
        index: dict[str, _Member] = {}
        members = 0

        def check(raw_name: str, kind: str, size: int) -> bool:
            nonlocal members
            members += 1
            if members > self._limits.members:
                raise self._error(
                    f"holds more than {self._limits.members} members", "A reward archive holds about ten; check it."
                )
            name = self._safe_name(raw_name)
            if kind == "folder":
                return False
            if not name:
                raise self._error("holds a file without a name", "Do not trust this archive.")
            if kind != "file":
                raise self._error(
                    f"holds {name!r}, which is a {_KINDS[kind]}",
                    "Only plain files and folders belong in a .nemo. Do not trust this archive.",
                )
            if name in index:
                raise self._error(f"holds {name!r} twice", "Which is meant is unclear: save the archive again.")
            if name.startswith("model_weights/"):
                raise self._error(
                    "holds a distributed checkpoint (a folder model_weights/, not a file model_weights.ckpt)",
                    "Load it once with NeMo (megatron.core.dist_checkpointing), and save its plain state dict with "
                    "nemo_aligner_diffusion.formats.nemo.save_nemo.",
                )
            index[name] = _Member(name, file.tell(), size)
            return False

        # Extension headers (long names) come before a member's own.
        most = 2 * self._limits.members
        for _ in walk_stream(self.path, file, total_bytes, check, most_header_blocks=most, single=True):
            pass
        return index

    def _safe_name(self, name: str) -> str:
        """The member's name without ``./``; refused when it could land outside a folder it were unpacked into."""
        clean = _normalise(name)
        parts = clean.split("/")
        unsafe = name.startswith("/") or ".." in parts or "\\" in name or ":" in parts[0]
        if unsafe or not name.isprintable() or len(name) > self._limits.name_characters:
            raise self._error(
                f"holds a member named '{printable(name, 100)}', which climbs out of its folder or is no file name",
                "Do not trust this archive; get it from another source.",
            )
        return clean

    def _window(self, member: _Member) -> io.BufferedReader:
        source: IO[bytes] = open(self.path, "rb") if self._unpacked is None else io.BytesIO(self._unpacked)  # noqa: SIM115
        return io.BufferedReader(_Window(source, member.offset, member.size), buffer_size=BLOCK_BYTES)

    def _read(self, member: _Member, limit_bytes: int) -> bytes:
        if member.size > limit_bytes:
            raise self._error(
                f"holds {member.name!r} with {member.size} bytes; at most {limit_bytes} are allowed for such a member",
                "Pass larger Limits if you trust the file.",
            )
        try:
            with self._window(member) as stream:
                content = stream.read()
        except OSError as error:
            raise self._error(f"cannot be read: {error.strerror}", "Check the disk it lies on.") from error
        if len(content) != member.size:
            raise self._error(f"changed while {member.name!r} was being read", "Let its writer finish and try again.")
        return content

    def _read_config(self) -> dict[str, Any]:
        member = self._index.get(CONFIG_NAME)
        if member is None:
            raise self._error(
                f"lacks {CONFIG_NAME} (it holds {listing(self._index)})",
                f"A .nemo needs {CONFIG_NAME} and {WEIGHTS_NAME} at its top level.",
            )
        try:
            return parse_config(self._read(member, self._limits.config_bytes))
        except ValueError as error:
            remedy = "Repair the YAML or save the archive again."
            raise self._error(f"has an unusable {CONFIG_NAME}, which {error}", remedy) from error

    def _find_weights(self) -> tuple[_Member, ...]:
        """The weights, or their tensor-parallel shards in order of rank."""
        if WEIGHTS_NAME in self._index:
            return (self._index[WEIGHTS_NAME],)
        ranked = sorted(
            (int(match["stage"] or 0), int(match["rank"] or match["tensor_rank"]), name)
            for name in self._index
            if (match := _RANK_FOLDER.fullmatch(name))
        )
        if not ranked:
            raise self._error(
                f"lacks {WEIGHTS_NAME} (it holds {listing(self._index)})",
                f"A .nemo needs {CONFIG_NAME} and {WEIGHTS_NAME}, the latter perhaps under mp_rank_00/.",
            )
        names = [name for _, _, name in ranked]
        wanted = [(0, rank, name) for rank, name in enumerate(names)]
        if ranked != wanted or len(ranked) > self._limits.ranks:
            raise self._error(
                f"holds weights split as {listing(names)}; expected tensor-parallel ranks from 0, without a gap, each "
                f"once, at most {self._limits.ranks}, and no pipeline stages",
                _HOW_TO_MERGE,
            )
        return tuple(self._index[name] for name in names)

    def _error(self, found: str, remedy: str) -> ArchiveError:
        return archive_error(self.path, found, remedy)


class _Window(io.RawIOBase):
    """``size`` bytes of ``source`` from ``offset``, as a seekable read-only file. Owns ``source``."""

    def __init__(self, source: IO[bytes], offset: int, size: int) -> None:
        self._source, self._offset, self._size, self._position = source, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"seek to {base + offset}, before the start of the member")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._source.seek(self._offset + self._position)
        content = self._source.read(min(len(buffer), max(self._size - self._position, 0)))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def close(self) -> None:
        self._source.close()
        super().close()


def load_nemo(path: str | os.PathLike[str], limits: Limits | None = None) -> NemoArchive:
    """Open a ``.nemo``: see :class:`NemoArchive` for what it offers and raises."""
    return NemoArchive(path, limits)


def _normalise(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", "."))
