"""Reading samples by their place: few open files, read-ahead where a file is read on and on, no waiting for FIFOs."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from nemo_aligner_diffusion.data.shard_index import checksum
from nemo_aligner_diffusion.errors import DataError
from nemo_aligner_diffusion.formats.files import open_regular

MAX_OPEN_FILES = 96  # more than the lanes of an order, less than the limit of any system
READ_AHEAD_BYTES = 1 << 20  # asked of the system at a time, for each open file
LARGEST_READ_AHEAD = 1 << 16  # bytes; larger samples are worth a read of their own


@dataclass
class _Opened:
    stream: IO[bytes]  # unbuffered
    asked_up_to: int = 0  # the system was asked to read ahead up to this byte


class SpanReader:
    """Reads spans of ``files``; one instance belongs to one process. A context manager: leaving it closes the files."""

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

    def __enter__(self) -> SpanReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in list(self._open):
            self._forget(file)
