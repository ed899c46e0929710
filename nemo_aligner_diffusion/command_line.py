"""How every command ends: one line on stderr and an exit code, never a traceback for what the user can put right."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Protocol

from nemo_aligner_diffusion.errors import AlignerError
from nemo_aligner_diffusion.streams import take_screen


class Main(Protocol):
    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


def command(interrupted: str) -> Callable[[Callable[[Sequence[str]], int]], Main]:
    """Decorator of a ``main(argv)`` that gives an exit code.

    ``argv`` defaults to the words after the command's name. An :class:`AlignerError` is printed as ``error: …`` and
    gives its own exit code; Ctrl-C prints ``interrupted`` and gives 130.

    Args:
        interrupted: what a user who pressed Ctrl-C should know, such as what became of the files.
    """

    def decorate(main: Callable[[Sequence[str]], int]) -> Main:
        @functools.wraps(main)
        def guarded(argv: Sequence[str] | None = None) -> int:
            try:
                if argv is None:
                    take_screen()
                return main(sys.argv[1:] if argv is None else argv)
            except AlignerError as error:
                print(f"error: {error}", file=sys.stderr)
                return error.exit_code
            except KeyboardInterrupt:
                print(interrupted, file=sys.stderr)
                return 130

        return guarded

    return decorate
