"""Where each sample of uncompressed files is: made once, by one process, and shared by all as a memory-mapped file.

With it a sample is read by its position alone, so every rank and worker reads its own samples and no others. It also
settles, once and for all ranks alike, which samples and shards are unusable.

Small sources (:data:`IN_MEMORY_BYTES`) are indexed in memory by every process. Larger ones are indexed by whichever
process comes first and kept in a folder, in a file named after the files' paths, sizes and times of change; the other
processes wait on a file lock, which the system frees when its owner dies. Where locks do not work, several processes do
the same work; where the folder cannot be written, each keeps its own index in memory. Neither changes a result. An
index file can be deleted whenever no run uses it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nemo_aligner_diffusion.data.bad_samples import BadSamples
from nemo_aligner_diffusion.errors import DataError
from nemo_aligner_diffusion.formats.files import open_regular
from nemo_aligner_diffusion.formats.tar import GZIP_MAGIC

logger = logging.getLogger(__name__)

IN_MEMORY_BYTES = 32 << 20  # of files; some 32,000 prompts in shards, indexed in a third of a second
LOCK_SECONDS = 3600.0  # the longest wait for another process's index
LOCK_POLL_SECONDS = 0.2
_MAGIC = b"NADINDEX"
_VERSION = 2
_RECORD = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc", "<u4"), ("tag", "u1")])  # packed: 17 bytes a sample


class Span(NamedTuple):
    """The bytes of one usable sample: ``crc`` is their CRC-32, or 0 for not known; ``tag`` is the reader's own."""

    offset: int
    size: int
    crc: int
    tag: int


class ShardIndex:
    """Row by row the samples of a list of files, in file order.

    Attributes:
        counts: (files,) int64, samples in each file.
        records: (samples,), fields ``offset``, ``size``, ``crc``, ``tag``; memory-mapped where ``path`` is not None.
        bad_samples: unusable ones, left out; damaged files are among them, each counted once.
        bad_shards: number of files that were unreadable, damaged or without samples, wholly or from some place on.
        messages: what was wrong with the first of them.
        notes: what else was passed over, and why.
    """

    def __init__(self, counts: NDArray[np.int64], records: Any, bad: dict[str, Any], path: Path | None = None) -> None:
        self.counts = counts
        self.ends = np.cumsum(counts)
        self.path = path
        self.bad = bad
        self.bad_samples = int(bad["samples"])
        self.bad_shards = int(bad["shards"])
        self.messages = [str(message) for message in bad["messages"]]
        self.notes = [str(note) for note in bad["notes"]]
        self._records = records
        digest = hashlib.blake2b(counts.astype("<i8").tobytes(), digest_size=8)
        digest.update(np.ascontiguousarray(records).view(np.uint8).data)
        self.digest = digest.hexdigest()  # of places and contents: equal for equal data, wherever it lies

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def records(self) -> Any:
        if self._records is None:  # in a worker that was not forked
            assert self.path is not None
            self._records = load_index(self.path)._records
        return self._records

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | ({"_records": None} if self.path is not None else {})

    def files_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which file each row is in."""
        return np.searchsorted(self.ends, rows, side="right")


class NotIndexableError(Exception):
    """A file can only be read from its beginning; the message names it."""


def open_index(
    files: Sequence[Path],
    kind: str,
    scan: Callable[[Path, BadSamples], Iterator[Span]],
    bad: Callable[[], BadSamples],
    folder: Path | None = None,
) -> ShardIndex:
    """The index of ``files``: from memory, from a file, or made now.

    Args:
        kind: everything beside the files that the result depends on: the reader and what it does about bad samples.
        scan: the usable samples of one file.
        bad: makes a quiet :class:`~.prompt_files.BadSamples`.
        folder: for index files; None: the user's cache folder, and nothing for small sources.

    Raises:
        DataError: from ``scan``.
        NotIndexableError: a file is compressed.
    """
    identity = hashlib.sha256(f"{_VERSION}\n{kind}\n".encode())
    size = 0
    for file in files:
        name = os.path.abspath(file)
        try:
            status = os.stat(file)
        except OSError:  # its reader will say so
            identity.update(f"{name}\0gone\n".encode("utf-8", "surrogateescape"))
            continue
        size += status.st_size
        # The time of the last change of permissions is part of it: it decides about readable and unreadable shards.
        described = f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}\n"
        identity.update(described.encode("utf-8", "surrogateescape"))
    key = identity.hexdigest()[:32]
    if key not in _recent:
        index = None
        if folder is not None or size > IN_MEMORY_BYTES:
            index = _from_file(files, key, scan, bad, folder if folder is not None else default_folder())
        _recent[key] = index if index is not None else build_index(files, scan, bad())
        if len(_recent) > 4:
            _recent.popitem(last=False)
    return _recent[key]


_recent: OrderedDict[str, ShardIndex] = OrderedDict()  # a run makes its loader several times


def default_folder() -> Path:
    """``shard_index`` in this package's cache folder (``XDG_CACHE_HOME``, else ``~/.cache``)."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(caches) / "nemo_aligner_diffusion" / "shard_index"


def build_index(
    files: Sequence[Path], scan: Callable[[Path, BadSamples], Iterator[Span]], bad: BadSamples
) -> ShardIndex:
    """Read all ``files`` once and note where their samples are. Memory: 17 bytes a sample."""
    for file in files:
        if _is_compressed(file):
            raise NotIndexableError(f"{file} is compressed")
    columns = array("Q"), array("I"), array("I"), array("B")
    counts = np.zeros(len(files), dtype=np.int64)
    last_word = time.monotonic()
    for number, file in enumerate(files):
        before = len(columns[0])
        for span in scan(file, bad):
            if span.size >= 1 << 32:
                raise DataError(f"{file}: a sample of {span.size:,} bytes; expected less than 4 GiB")
            for column, value in zip(columns, span, strict=True):
                column.append(value)
        counts[number] = len(columns[0]) - before
        if time.monotonic() - last_word > 10:
            last_word = time.monotonic()
            logger.info("indexing: %d of %d files, %d samples", number + 1, len(files), len(columns[0]))
    records = np.empty(len(columns[0]), dtype=_RECORD)
    for name, column in zip(_RECORD.names or (), columns, strict=True):
        records[name] = np.frombuffer(column, dtype=column.typecode) if len(column) else []
    left_out = {"samples": bad.count, "shards": bad.shards, "messages": bad.messages, "notes": bad.notes}
    return ShardIndex(counts, records, left_out)


def load_index(path: Path) -> ShardIndex:
    """An index file, memory-mapped.

    Raises:
        ValueError: it is damaged.
        OSError: it cannot be read.
    """
    with open(path, "rb") as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            raise ValueError(f"{path} is no index")
        length = int.from_bytes(stream.read(8), "little")
        if length > 1 << 20:
            raise ValueError(f"{path} has a header of {length:,} bytes")
        header = json.loads(stream.read(length))
        counts = np.frombuffer(stream.read(8 * int(header["files"])), dtype="<i8").astype(np.int64)
        place = stream.tell()
    samples = int(header["samples"])
    if samples != counts.sum() or place + samples * _RECORD.itemsize != os.path.getsize(path):
        raise ValueError(f"{path} has another size than its header says")
    records = (
        np.memmap(path, dtype=_RECORD, mode="r", offset=place, shape=(samples,)) if samples else np.empty(0, _RECORD)
    )
    index = ShardIndex(counts, records, header["bad"], path)
    if index.digest != header["digest"]:
        raise ValueError(f"{path} is damaged: its digest is {index.digest}, expected {header['digest']}")
    return index


def save_index(index: ShardIndex, path: Path) -> None:
    """Write ``path``: whole, or not at all."""
    header = {
        "files": len(index.counts),
        "samples": len(index),
        "bad": index.bad,
        "digest": index.digest,
    }
    text = json.dumps(header).encode()
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}-", suffix=".partial", dir=path.parent)
    try:
        with open(descriptor, "wb") as stream:
            stream.write(_MAGIC + len(text).to_bytes(8, "little") + text + index.counts.astype("<i8").tobytes())
            stream.write(np.ascontiguousarray(index.records).view(np.uint8).data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def _from_file(
    files: Sequence[Path],
    key: str,
    scan: Callable[[Path, BadSamples], Iterator[Span]],
    bad: Callable[[], BadSamples],
    folder: Path,
) -> ShardIndex | None:
    """The index file of ``key``, made by one of the processes that ask for it; None if there can be no such file."""
    path = folder / f"{key}.index"
    with contextlib.suppress(OSError, ValueError):
        return load_index(path)
    index: ShardIndex | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / f"{key}.lock"):
            with contextlib.suppress(OSError, ValueError):
                return load_index(path)
            for left_over in folder.glob(f".{path.name}-*.partial"):  # of a process that was killed in save_index
                left_over.unlink(missing_ok=True)
            started = time.monotonic()
            index = build_index(files, scan, bad())
            save_index(index, path)
            logger.info(
                "indexed %d samples of %d files in %.1f s: %s", len(index), len(files), time.monotonic() - started, path
            )
            return load_index(path)
    except (OSError, ValueError) as error:
        logger.warning(
            "the index of the prompt files cannot be kept in %s (%s): every process makes its own; name a folder that "
            "can be written, for example with model.data.index_folder",
            folder,
            error,
        )
        return index


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, where the file system can lock; after ``LOCK_SECONDS`` go on without."""
    import fcntl

    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    deadline, said = time.monotonic() + LOCK_SECONDS, False
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    logger.warning("another process has held %s for %.0f s: indexing here, too", lock, LOCK_SECONDS)
                    break
                if not said:
                    said = True
                    logger.info("another process indexes the prompt files; waiting for it")
                time.sleep(LOCK_POLL_SECONDS)
            except OSError as error:
                logger.info("%s: this file system does not lock (%s); indexing without", lock, error.strerror)
                break
        yield
    finally:
        os.close(descriptor)


def _is_compressed(file: Path) -> bool:
    try:
        with open_regular(file, buffering=0) as stream:
            return stream.read(len(GZIP_MAGIC)) == GZIP_MAGIC
    except OSError:
        return False  # its reader will say so


def checksum(data: bytes) -> int:
    """What :class:`Span` calls ``crc``."""
    return zlib.crc32(data)
