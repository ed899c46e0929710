"""The bytes of a sample by their place in a file."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

from nemo_aligner_diffusion.errors import DataError
from nemo_aligner_diffusion.formats.files import open_regular

MAX_OPEN_FILES = 96  # more than the lanes of an order, less than the limit of any system


class Span(NamedTuple):
    """The bytes of one usable sample: ``crc`` is their CRC-32, or 0 for not known; ``tag`` is the reader's own.

    ``data`` are the bytes themselves, where the file is compressed: they cannot be read by their place there.
    """

    offset: int
    size: int
    crc: int
    tag: int
    data: bytes = b""


class SpanReader:
    """Reads spans of ``files``, few of which are open at a time; one instance belongs to one process."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self._open: dict[int, IO[bytes]] = {}  # by file number, unbuffered

    def read(self, file: int, offset: int, size: int, crc: int) -> bytes:
        """``size`` bytes at ``offset`` of file number ``file``.

        Raises:
            DataError: the file is gone, cannot be read, or does not hold there what it held when it was indexed.
        """
        path = self.files[file]
        try:
            if file not in self._open:
                if len(self._open) >= MAX_OPEN_FILES:
                    self.close()
                self._open[file] = open_regular(path, buffering=0)
            data = os.pread(self._open[file].fileno(), size, offset)
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

    def _forget(self, file: int) -> None:
        stream = self._open.pop(file, None)
        if stream is not None:
            stream.close()

    def close(self) -> None:
        for file in list(self._open):
            self._forget(file)


def checksum(data: bytes) -> int:
    """What :class:`Span` calls ``crc``."""
    return zlib.crc32(data)
