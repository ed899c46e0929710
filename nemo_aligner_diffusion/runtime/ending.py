"""The end of a process that has joined others: at once, and with the exit code that it is to have."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import sys


def end(code: int) -> None:
    """End this process at once if it has joined others; returns if not. For when nothing is left to be done.

    gloo's threads let go of Python objects after the last message: in an interpreter that is closing, they abort the
    process (exit code 134) or wait forever.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return
    for child in multiprocessing.active_children():  # data workers
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


class EndAtExit:
    """Calls :func:`end` behind all that is registered with ``atexit`` from now on: loggers, which send what they have.

    Attributes:
        code: the exit status; ``None``, or an exception that nobody caught, leaves the end to the interpreter.
    """

    def __init__(self) -> None:
        self.code: int | None = None
        atexit.register(self._end)

    def _end(self) -> None:
        if self.code is not None and getattr(sys, "last_type", None) is None:
            end(self.code)
