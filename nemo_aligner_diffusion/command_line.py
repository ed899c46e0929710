"""How every command reads its options."""

from __future__ import annotations

import argparse
import math
from typing import NoReturn

from nemo_aligner_diffusion.errors import ConfigurationError


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
