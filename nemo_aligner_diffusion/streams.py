"""A program's screen: it outlives who reads it (``nad-train | head``), and no text from outside acts on a terminal."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from typing import Any, TextIO

from nemo_aligner_diffusion.errors import printable

_READER_GONE = (errno.EPIPE, errno.EIO)  # of a pipe, and of a terminal


def take_screen() -> None:
    """For a whole program, from here on: warnings are printable, and what nobody can read any more goes nowhere."""
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)
    log_to_stderr()


def log_to_stderr() -> None:
    """Show warnings, and what loggers of their own level say, unless the program around has its own way."""
    if not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(PrintableFormatter("%(message)s"))
        logging.basicConfig(level=logging.WARNING, handlers=[handler])


class PrintableFormatter(logging.Formatter):
    """Lines of printable characters: a message may quote a name from somebody else's file."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(printable(line, 4_000) for line in super().format(record).split("\n"))


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
