"""Parts of documentation pages that a program writes, between two comments."""

from __future__ import annotations

import sys
from pathlib import Path


def renewed(page: str, part: str) -> str:
    """``page`` with ``part`` in the place of what stands between the comments in ``part``'s first and last line."""
    begin, *_, end = part.splitlines()
    before, rest = page.split(begin)
    return before + part + rest.split(end)[1]


def write(part: str) -> None:
    """Put ``part`` into the page that the command line names."""
    path = Path(sys.argv[1])
    path.write_text(renewed(path.read_text("utf-8"), part), "utf-8")
