"""How every command reads its options and ends: one line on stderr and an exit code for what the user can put right."""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from nemo_aligner_diffusion.errors import AlignerError, ConfigurationError
from nemo_aligner_diffusion.streams import take_screen


class Parser(argparse.ArgumentParser):
    """Mistakes in the options are errors as all others are; line breaks in the texts stay."""

    def __init__(self, description: str = "", epilog: str = "", **options: bool) -> None:
        super().__init__(
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,  # type: ignore[arg-type]
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}; {self.prog} --help lists all options")


def whole_number(text: str) -> int:
    """``type=`` of an option: at least 1."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def finite_number(text: str) -> float:
    """``type=`` of an option."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no finite number")
    return value


def command(interrupted: str) -> Callable[[Callable[[Sequence[str]], int]], Callable[..., int]]:
    """Decorator of a ``main(argv)`` that gives an exit code.

    ``argv`` defaults to the words after the command's name. An :class:`AlignerError` is printed as ``error: …`` and
    gives its own exit code; Ctrl-C prints ``interrupted`` and gives 130.

    Args:
        interrupted: what a user who pressed Ctrl-C should know, such as what became of the files.
    """

    def decorate(main: Callable[[Sequence[str]], int]) -> Callable[..., int]:
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
