"""Where each sample is: found once, by one process, and shared by all as a memory-mapped file.

With it a sample is read by its position alone, so every rank and worker reads its own samples and no others. It also
settles, once and for all ranks alike, which samples and shards are unusable. Compressed files cannot be sought in:
their samples are written beside the index, one after the other.

Small uncompressed sources (:data:`IN_MEMORY_BYTES`) are indexed in memory by every process. Others are indexed by
whichever process comes first and kept in a folder named after the files' paths, sizes and times of change; the other
processes wait on a file lock, which the system frees when its owner dies. Where locks do not work, several processes
do the same work; where the folder cannot be written, each keeps its own index in memory, and compressed files are an
error. The folder of an index can be deleted whenever no run uses it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_aligner_diffusion.data.bad_samples import BadSamples
from nemo_aligner_diffusion.data.spans import Span
from nemo_aligner_diffusion.errors import DataError
from nemo_aligner_diffusion.formats.files import open_regular, read_json
from nemo_aligner_diffusion.formats.tar import GZIP_MAGIC

logger = logging.getLogger(__name__)

IN_MEMORY_BYTES = 32 << 20  # of files; some 32,000 prompts in shards, indexed in a third of a second
# samples of a compressed file: at most so many times its size, and so many bytes more
UNPACKED_TIMES, UNPACKED_BYTES = 100, 64 << 20
LOCK_SECONDS = 3600.0  # the longest wait for another process's index
_VERSION = 3
_RECORD = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc", "<u4"), ("tag", "u1")])  # packed: 17 bytes a sample
_HEADER, _RECORDS, _SAMPLES = "index.json", "records", "samples"  # files in the folder of an index

Scan = Callable[[Path, BadSamples], Iterator[Span]]


class ShardIndex:
    """Row by row the samples of a list of files, in file order.

    Attributes:
        counts: (files,) int64, samples in each file.
        records: (samples,), fields ``offset``, ``size``, ``crc``, ``tag``; memory-mapped where ``folder`` is not None.
        left_out: what :meth:`.BadSamples.summary` says.
        unpacked: numbers of the compressed files.
        folder: where it is kept; None: in memory.
        digest: of places and contents: equal for equal data, wherever it lies.
    """

    def __init__(
        self,
        counts: NDArray[np.int64],
        records: Any,
        left_out: dict[str, Any],
        unpacked: Collection[int] = (),
        folder: Path | None = None,
    ) -> None:
        self.counts, self.records, self.left_out = counts, records, left_out
        self.unpacked, self.folder = frozenset(unpacked), folder
        self._ends = np.cumsum(counts)
        digest = hashlib.blake2b(counts.astype("<i8").tobytes(), digest_size=8)
        digest.update(np.ascontiguousarray(records).view(np.uint8).data)
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.records)

    def __reduce_ex__(self, protocol: Any) -> Any:  # to workers that are started anew instead of forked
        return (load_index, (self.folder,)) if self.folder is not None else super().__reduce_ex__(protocol)

    def file_of(self, row: int) -> int:
        """Number of the file that a row is of."""
        return int(np.searchsorted(self._ends, row, side="right"))

    def sources(self, files: Sequence[Path]) -> list[Path]:
        """Where the samples of each of ``files`` are read: in it, or in what its samples were written to."""
        samples = (self.folder or Path()) / _SAMPLES
        return [samples if number in self.unpacked else file for number, file in enumerate(files)]


def open_index(
    files: Sequence[Path], kind: str, scan: Scan, bad: Callable[[], BadSamples], folder: Path | None = None
) -> ShardIndex:
    """The index of ``files``: from memory, from a folder, or made now.

    Args:
        kind: everything beside the files that the result depends on: the reader and what it does about bad samples.
        scan: the usable samples of one file.
        folder: for folders of indexes; None: the user's cache folder, and nothing for small uncompressed sources.

    Raises:
        DataError: from ``scan``; or compressed files cannot be unpacked into ``folder``.
    """
    key, size = _identity(files, kind)
    if key not in _recent:
        if folder is None and size <= IN_MEMORY_BYTES and not any(map(is_compressed, files)):
            index = build_index(files, scan, bad())
        else:
            index = _from_folder(files, key, scan, bad, folder or default_folder())
        if len(_recent) >= 4:
            _recent.clear()
        _recent[key] = index
    return _recent[key]


_recent: dict[str, ShardIndex] = {}  # a run makes its loader several times


def default_folder() -> Path:
    """``shard_index`` in this package's cache folder (``XDG_CACHE_HOME``, else ``~/.cache``)."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(caches) / "nemo_aligner_diffusion" / "shard_index"


def is_compressed(file: Path) -> bool:
    """Whether a file is gzipped, by its content."""
    try:
        with open_regular(file, buffering=0) as stream:
            return stream.read(len(GZIP_MAGIC)) == GZIP_MAGIC
    except OSError:
        return False  # its reader will say so


def build_index(
    files: Sequence[Path], scan: Scan, bad: BadSamples, unpacked: Collection[int] = (), folder: Path | None = None
) -> ShardIndex:
    """Read all ``files`` once and note where their samples are. Memory: 17 bytes a sample.

    Args:
        unpacked: numbers of files whose samples are written into ``folder``.
    """
    columns = array("Q"), array("I"), array("I"), array("B")
    counts = np.zeros(len(files), dtype=np.int64)
    last_word = time.monotonic()
    with open(folder / _SAMPLES, "wb") if folder is not None else contextlib.nullcontext() as samples:
        for number, file in enumerate(files):
            before = len(columns[0])
            most = 0
            if number in unpacked and samples is not None:
                most = samples.tell() + UNPACKED_BYTES + UNPACKED_TIMES * os.path.getsize(file)
            for span in scan(file, bad):
                if span.size >= 1 << 32:
                    raise DataError(f"{file}: a sample of {span.size:,} bytes; expected less than 4 GiB")
                offset = span.offset
                if most and samples is not None:
                    offset = samples.tell()
                    samples.write(span.data)
                    if samples.tell() > most:
                        raise DataError(
                            f"{file}: its samples have more than {UNPACKED_TIMES} times its size; expected text or "
                            "pictures, not a file made to fill the disk: unpack it yourself if it is meant so"
                        )
                for column, value in zip(columns, (offset, span.size, span.crc, span.tag), strict=True):
                    column.append(value)
            counts[number] = len(columns[0]) - before
            if time.monotonic() - last_word > 10:
                last_word = time.monotonic()
                logger.info("indexing: %d of %d files, %d samples", number + 1, len(files), len(columns[0]))
    records = np.empty(len(columns[0]), dtype=_RECORD)
    for name, column in zip(_RECORD.names or (), columns, strict=True):
        records[name] = np.frombuffer(column, dtype=column.typecode) if len(column) else []
    return ShardIndex(counts, records, bad.summary(), unpacked, folder)


def load_index(folder: Path) -> ShardIndex:
    """An index from its folder, memory-mapped.

    Raises:
        DataError, OSError, ValueError, KeyError, TypeError: it is not there, or damaged.
    """
    header = read_json(folder / _HEADER, DataError)
    counts = np.array(header["counts"], dtype=np.int64)
    records = np.memmap(folder / _RECORDS, dtype=_RECORD, mode="r", shape=(int(counts.sum()),))
    index = ShardIndex(counts, records, header["left_out"], header["unpacked"], folder)
    if index.digest != header["digest"]:
        raise ValueError(f"{folder} is damaged: its digest is {index.digest}, expected {header['digest']}")
    return index


def _identity(files: Sequence[Path], kind: str) -> tuple[str, int]:
    """(name of an index, bytes of the files)."""
    identity = hashlib.sha256(f"{_VERSION}\n{kind}\n".encode())
    size = 0
    for file in files:
        name = os.path.abspath(file)
        try:
            status = os.stat(file)
        except OSError:  # its reader will say so
            described = f"{name}\0gone\n"
        else:
            size += status.st_size
            # The last change of permissions is part of it: it decides about readable and unreadable shards.
            described = f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}\n"
        identity.update(described.encode("utf-8", "surrogateescape"))
    return identity.hexdigest()[:32], size


def _from_folder(
    files: Sequence[Path], key: str, scan: Scan, bad: Callable[[], BadSamples], folder: Path
) -> ShardIndex:
    """The index ``key`` in ``folder``, made by one of the processes that ask for it."""
    path = folder / key
    if (index := _loaded(path)) is not None:
        return index
    unpacked = [number for number, file in enumerate(files) if is_compressed(file)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / f"{key}.lock"):
            return _loaded(path) or _made(files, path, scan, bad(), unpacked)
    except OSError as error:
        if (index := _loaded(path)) is not None:
            return index
        if unpacked:
            raise DataError(
                f"{files[unpacked[0]]} is compressed and cannot be unpacked into {folder} ({error}); unpack it "
                "yourself, or name a folder that can be written, for example with model.data.index_folder"
            ) from error
        logger.warning(
            "the index of the prompt files cannot be kept in %s (%s): every process makes its own; name a folder that "
            "can be written, for example with model.data.index_folder",
            folder,
            error,
        )
        return build_index(files, scan, bad())


def _loaded(path: Path) -> ShardIndex | None:
    with contextlib.suppress(DataError, OSError, ValueError, KeyError, TypeError):
        return load_index(path)
    return None


def _made(files: Sequence[Path], path: Path, scan: Scan, bad: BadSamples, unpacked: Sequence[int]) -> ShardIndex:
    """Make the folder ``path``: whole, or not at all."""
    for left_over in path.parent.glob(f".{path.name}-*.partial"):  # of a process that was killed here
        shutil.rmtree(left_over, ignore_errors=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", suffix=".partial", dir=path.parent) as partial:
        new = Path(partial) / "index"
        new.mkdir()
        index = build_index(files, scan, bad, unpacked, new)
        if len(index) == 0:
            return index
        index.records.tofile(new / _RECORDS)
        header = {"counts": index.counts.tolist(), "unpacked": list(unpacked), "left_out": index.left_out,
                  "digest": index.digest}  # fmt: skip
        (new / _HEADER).write_text(json.dumps(header))
        if _loaded(path) is None:  # else somebody was faster, where locks do not work
            shutil.rmtree(path, ignore_errors=True)  # damaged
            new.rename(path)
    seconds = time.monotonic() - started
    logger.info("indexed %d samples of %d files in %.1f s: %s", len(index), len(files), seconds, path)
    return load_index(path)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a file lock, where the file system can lock; after ``LOCK_SECONDS`` go on without."""
    from filelock import FileLock

    lock = FileLock(path, timeout=LOCK_SECONDS, fallback_to_soft=False)
    try:
        lock.acquire()
    except OSError as error:
        logger.warning("%s cannot be locked (%s): indexing here, whoever else does", path, error)
    try:
        yield
    finally:
        lock.release()
