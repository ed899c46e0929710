"""A run outlives those who read its output: ``nad-train | head``, a terminal that is closed."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, TextIO

_READER_GONE = (errno.EPIPE, errno.EIO)  # of a pipe, and of a terminal


def outlive_readers() -> None:
    """From here on, what nobody can read any more goes nowhere, instead of ending the program with an error."""
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)


class _Lasting(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _READER_GONE:
                raise
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return memoryview(data).nbytes


def _lasting(stream: TextIO) -> TextIO:
    try:
        stream.flush()
        raw = _Lasting(stream.fileno(), "w", closefd=False)
    except (OSError, ValueError, AttributeError):  # closed, or not a file: a program's own
        return stream
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=stream.encoding, errors=stream.errors, line_buffering=True)
