"""The samples of one epoch by their rows, and what is put in the place of those that can no longer be read.

Few files are open at a time, the system is asked to read ahead where a file is read on and on, and no FIFO is waited
for.
"""

from __future__ import annotations

import logging
import os
import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from nemo_aligner_diffusion.data.bad_samples import BadSampleError, warn_of
from nemo_aligner_diffusion.data.epoch_order import Rows
from nemo_aligner_diffusion.data.shard_index import checksum
from nemo_aligner_diffusion.errors import DataError
from nemo_aligner_diffusion.formats.files import open_regular

if TYPE_CHECKING:
    from nemo_aligner_diffusion.data.sample_stream import SampleStream

logger = logging.getLogger(__name__)

MAX_OPEN_FILES = 96  # more than the lanes of an order, less than the limit of any system
READ_AHEAD_BYTES = 1 << 20  # asked of the system at a time, for each open file
LARGEST_READ_AHEAD = 1 << 16  # bytes; larger samples are worth a read of their own
REPLACEMENT_TRIES = 1_000  # samples drawn in place of one that cannot be read, before giving up


@dataclass
class _Opened:
    stream: IO[bytes]  # unbuffered
    asked_up_to: int = 0  # the system was asked to read ahead up to this byte


class SpanReader:
    """Reads spans of ``files``; one instance belongs to one process."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self._open: OrderedDict[int, _Opened] = OrderedDict()  # by file number, the latest used last

    def read(self, file: int, offset: int, size: int, crc: int) -> bytes:
        """``size`` bytes at ``offset`` of file number ``file``.

        Raises:
            DataError: the file is gone, cannot be read, or does not hold there what it held when it was indexed.
        """
        path = self.files[file]
        try:
            opened = self._opened(file, path)
            descriptor = opened.stream.fileno()
            if size <= LARGEST_READ_AHEAD and offset + size > opened.asked_up_to:
                # Shuffled reading looks like random access to the system, which would fetch page after page.
                os.posix_fadvise(descriptor, offset, READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
                opened.asked_up_to = offset + READ_AHEAD_BYTES
            data = os.pread(descriptor, size, offset)
        except OSError as error:
            self._forget(file)
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
        if len(data) < size:
            self._forget(file)
            raise DataError(f"{path} is truncated: it was longer when it was indexed; copy it again")
        if crc and checksum(data) != crc:
            self._forget(file)
            raise DataError(
                f"{path} is damaged or was changed since it was indexed (at byte {offset:,}); copy it again, and leave "
                "the files of a running training alone"
            )
        return data

    def _opened(self, file: int, path: Path) -> _Opened:
        opened = self._open.get(file)
        if opened is not None:
            self._open.move_to_end(file)
            return opened
        if len(self._open) >= MAX_OPEN_FILES:
            self._forget(next(iter(self._open)))
        opened = self._open[file] = _Opened(open_regular(path, buffering=0))
        return opened

    def _forget(self, file: int) -> None:
        opened = self._open.pop(file, None)
        if opened is not None:
            opened.stream.close()

    def close(self) -> None:
        for file in list(self._open):
            self._forget(file)


class EpochReader:
    """The samples of one epoch by row; what became unreadable is replaced and counted, or an error."""

    def __init__(self, stream: SampleStream, spans: SpanReader, epoch: int, worker: int | None) -> None:
        assert stream.index is not None
        self.stream, self.index, self.spans, self.epoch = stream, stream.index, spans, epoch
        self.who = f"data rank {stream.rank}" + (f", worker {worker}" if worker is not None else "")
        self.lost: set[int] = set()  # files that something could not be read from
        self.replaced = 0

    def located(self, rows: Rows) -> Iterator[tuple[int, ...]]:
        """(file, offset, size, crc, tag) of each row."""
        found = self.index.records[rows]
        return zip(
            self.index.files_of(rows).tolist(),
            *(found[name].tolist() for name in ("offset", "size", "crc", "tag")),
            strict=True,
        )

    def sample(self, position: int, row: tuple[int, ...]) -> Any:
        """The sample of global index ``position``: the one at ``row``, or what replaces it."""
        # Every sample is tried, those of a lost file, too: what a rank gets must not depend on what it met before.
        try:
            return self._read(position, *row)
        except DataError as error:
            if self.stream.on_bad_shard == "error" or isinstance(error, BadSampleError):
                raise DataError(f"{error} ({self.who}, sample {position} of the run)") from error
            self._lose(row[0], error)
        self.replaced += 1
        self.stream.replaced += 1
        draw = random.Random(f"{self.stream.seed}/{position}/replacement")
        for _ in range(REPLACEMENT_TRIES):
            (other,) = self.located(np.array([draw.randrange(len(self.index))]))
            try:
                return self._read(position, *other)
            except DataError as error:
                self._lose(other[0], error)
        raise DataError(
            f"{self.stream.named()}: {len(self.lost)} of {len(self.stream.files)} files have become unreadable and no "
            f"other sample was found in {REPLACEMENT_TRIES:,} tries ({self.who}); is the disk there?"
        )

    def _read(self, position: int, file: int, offset: int, size: int, crc: int, tag: int) -> Any:
        self.stream.reading(file, position)
        return self.stream.parse(self.spans.read(file, offset, size, crc), tag, self.stream.files[file])

    def _lose(self, file: int, error: DataError) -> None:
        if file not in self.lost:
            self.lost.add(file)
            logger.warning("%s; what cannot be read is replaced by other %ss (%s)", error, self.stream.noun, self.who)

    def report_skipped(self, speaker: bool) -> None:
        """Count what the index left out, at the beginning of the epoch; ``speaker``: say it, too."""
        stream, index = self.stream, self.index
        stream.skipped += index.bad_samples
        if speaker:
            if stream.start_sample // len(index) == self.epoch:
                warn_of(index.messages + index.notes, index.bad_samples)
            stream.report_skipped(self.epoch, index.bad_samples, index.bad_shards, len(index))

    def report_replaced(self) -> None:
        """Count what was replaced, at the end of the epoch."""
        if self.replaced:
            logger.warning(
                "epoch %d: replaced %d %ss of %d shards that became unreadable (%s)",
                self.epoch,
                self.replaced,
                self.stream.noun,
                len(self.lost),
                self.who,
            )
