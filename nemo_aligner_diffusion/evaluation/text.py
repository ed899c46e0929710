"""Words and numbers as grids and pages show them."""

from __future__ import annotations

import functools
import logging
import math
import textwrap
from pathlib import Path

from PIL import ImageFont

log = logging.getLogger(__name__)

_MINUS = "\N{MINUS SIGN}"


def format_number(value: float) -> str:
    """Four significant digits without exponent where that is readable: ``21.43``, ``-0.0312``, ``1.2e-07``."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else f"{_MINUS}∞")
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    decimals = max(0, min(4, 3 - magnitude))
    text = f"{value:.{decimals}f}" if -4 <= magnitude <= 6 else f"{value:.1e}"
    return f"{_MINUS}{text[1:]}" if text.startswith("-") else text


def format_gain(gain: float, beside: float) -> str:
    """A signed difference with as many decimals as :func:`format_number` gives the number it stands beside."""
    written = format_number(beside)
    if not math.isfinite(gain) or "e" in written:
        return format_number(gain)
    decimals = len(written.partition(".")[2])
    return f"{gain:+.{decimals}f}".replace("-", _MINUS)


def ends_of(window: int) -> str:
    """What two means over ``window`` steps are of."""
    return f"first and last {window} steps" if window > 1 else "first and last step"


@functools.lru_cache(maxsize=64)
def font(size: int, bold: bool = False, path: str | None = None) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib ships it (so that no system font is needed), or the font of ``path``; pixels."""
    return ImageFont.truetype(path or _own_font(bold), size)


def _own_font(bold: bool) -> str:
    import matplotlib

    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"DejaVuSans{'-Bold' if bold else ''}.ttf"))


def fit_text(
    text: str, width: int, size: int, max_lines: int, bold: bool = False
) -> tuple[str, ImageFont.FreeTypeFont]:
    """``text`` in lines of at most ``width`` pixels, and the font that has its characters.

    That is DejaVu Sans, or for scripts that it lacks (Japanese, say) the system's font that has most of them. What no
    font has is written as an escape, ``\\u732b``: it can be looked up, a box cannot.
    """
    text = " ".join(text.split())[: max_lines * max(width, 1)]  # no character is narrower than a pixel
    path = _font_with(frozenset(text), bold)
    known = _characters(path)
    legible = "".join(c if ord(c) in known and c.isprintable() else ascii(c)[1:-1] for c in text)
    face = font(size, bold, path)
    return "\n".join(wrap_text(legible, width, face, max_lines)), face


@functools.lru_cache(maxsize=256)
def _font_with(text: frozenset[str], bold: bool) -> str:
    wanted = {ord(character) for character in text}
    best = _own_font(bold)
    if wanted <= _characters(best):
        return best
    from matplotlib.font_manager import findSystemFonts

    best = max([best, *sorted(findSystemFonts())], key=lambda path: len(wanted & _characters(path)))
    missing = "".join(sorted(chr(code) for code in wanted - _characters(best)))
    if missing:
        log.warning(
            "no font here has %s: grids show %s in their place; install one, such as Debian's fonts-noto-cjk",
            ascii(missing[:20]),
            ascii(missing[0])[1:-1],
        )
    return best


@functools.cache
def _characters(path: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError, UnicodeError):  # a system has fonts of many kinds
        return frozenset()


def wrap_text(text: str, width: int, face: ImageFont.FreeTypeFont, max_lines: int) -> list[str]:
    """Break ``text`` into at most ``max_lines`` lines of ``width`` pixels; a rest that does not fit ends in ``…``."""
    for characters in range(int(4 * width / face.size), 0, -1):  # an "i" is a little wider than a quarter of the size
        lines = textwrap.wrap(text, characters, max_lines=max_lines, placeholder="…")
        if all(face.getlength(line) <= width for line in lines):
            return lines
    return []
