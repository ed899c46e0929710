"""How every command ends: one line on stderr and an exit code, never a traceback for what the user can put right."""

from __future__ import annotations

import contextlib
import functools
import os
import select
import sys
from collections.abc import Callable, Sequence
from typing import Protocol

from nemo_aligner_diffusion.errors import AlignerError

NO_READER = 141  # what a shell says of a process that SIGPIPE ended


def output_is_gone() -> bool:
    """Whether whoever read the output has gone, as ``head`` does: then it goes nowhere, without a word at the exit."""
    try:
        descriptor = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # it is no file: a notebook's, a test's
        return False
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    pipe = select.poll()
    pipe.register(descriptor, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in pipe.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return True


class Main(Protocol):
    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


def command(interrupted: str) -> Callable[[Callable[[Sequence[str]], int]], Main]:
    """Decorator of a ``main(argv)`` that gives an exit code.

    ``argv`` defaults to the words after the command's name. An :class:`AlignerError` is printed as ``error: …`` and
    gives its own exit code; Ctrl-C prints ``interrupted`` and gives 130, an output that nobody reads any more 141.

    Args:
        interrupted: what a user who pressed Ctrl-C should know, such as what became of the files.
    """

    def decorate(main: Callable[[Sequence[str]], int]) -> Main:
        @functools.wraps(main)
        def guarded(argv: Sequence[str] | None = None) -> int:
            try:
                code = main(sys.argv[1:] if argv is None else argv)
                return NO_READER if output_is_gone() else code
            except SystemExit:  # argparse's, after its help
                output_is_gone()
                raise
            except BrokenPipeError:
                if not output_is_gone():
                    raise
                return NO_READER
            except AlignerError as error:
                print(f"error: {error}", file=sys.stderr)
                return error.exit_code
            except KeyboardInterrupt:
                print(interrupted, file=sys.stderr)
                return 130

        return guarded

    return decorate
