"""The end of a command and its process: told once among several, at once, and with the exit code that it is to have."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from nemo_aligner_diffusion.errors import AlignerError, ConfigurationError
from nemo_aligner_diffusion.runtime.process import this_process
from nemo_aligner_diffusion.streams import take_screen

CLAIMS_VARIABLE = "NAD_CLAIMS"  # a folder of the processes that our own launcher has started


def write_error_file(message: str, local_rank: int | None = None) -> None:
    """Tell torchrun why: its summary then shows the reason instead of "To enable traceback see …".

    Args:
        local_rank: of the process of this machine that failed, if it is not this one. What it wrote itself stands.
    """
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not own or _launcher() != "torchrun":
        return
    path = Path(own) if local_rank is None else Path(own).parent.parent / str(local_rank) / Path(own).name
    if path.exists():
        return
    # torchrun's form: https://pytorch.org/docs/stable/elastic/errors.html; it sorts by the time of day
    extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
    text = json.dumps({"message": {"message": message, "extraInfo": extra}})
    with contextlib.suppress(OSError):  # a courtesy: the reason is on the screen already
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)


def is_first_to_say(text: str) -> bool:
    """True for one of the processes of this machine that have the same to say.

    Under torchrun and our own launcher; elsewhere (srun) always.
    """
    launcher, folder = _launcher(), None
    if launcher == "nad-train":
        folder = os.environ.get(CLAIMS_VARIABLE)
    elif launcher == "torchrun" and (own := os.environ.get("TORCHELASTIC_ERROR_FILE")):
        folder = str(Path(own).parent.parent)
    if not folder:
        return True
    try:
        (Path(folder) / f"said-{hashlib.sha256(text.encode()).hexdigest()[:16]}").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def _launcher() -> str:
    """Who stands behind the variables; another launcher's would make of an error one that has been told."""
    try:
        return this_process().launcher
    except ConfigurationError:  # perhaps the error that is to be told
        return ""


def leave(code: int) -> None:
    """End this process now, whatever its threads wait for, and its data workers with it."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def end(code: int) -> None:
    """End this process at once if it has joined others; returns if not. For when nothing is left to be done.

    gloo's threads let go of Python objects after the last message: in an interpreter that is closing, they abort the
    process (exit code 134) or wait forever.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    leave(code)


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


def command(interrupted: str) -> Callable[[Callable[[Sequence[str]], int]], Callable[..., int]]:
    """Decorator of a ``main(argv)`` that gives an exit code.

    ``argv`` defaults to the words after the command's name; the exit code then becomes the process's, and nothing of
    the caller's follows. An :class:`AlignerError` is printed as ``error: …``, by one of the processes that have it, and
    gives its own exit code; Ctrl-C prints ``interrupted`` and gives 130.

    Args:
        interrupted: what a user who pressed Ctrl-C should know, such as what became of the files.
    """

    def decorate(main: Callable[[Sequence[str]], int]) -> Callable[..., int]:
        @functools.wraps(main)
        def guarded(argv: Sequence[str] | None = None) -> int:
            if argv is None:
                take_screen()
            ending = EndAtExit()  # before anything that registers what is to come before it
            try:
                code = main(sys.argv[1:] if argv is None else argv)
                ending.code = code if argv is None else None
                return code
            except AlignerError as error:
                if not error.said and is_first_to_say(str(error)):
                    print(f"error: {error}", file=sys.stderr)
                write_error_file(f"error: {error}")
                end(error.exit_code)
                return error.exit_code
            except KeyboardInterrupt:
                print(interrupted, file=sys.stderr)
                return 130

        return guarded

    return decorate
