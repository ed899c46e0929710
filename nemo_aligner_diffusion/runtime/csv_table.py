"""A CSV file that grows by a row at a time and survives what a run may meet."""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_aligner_diffusion.runtime.files import write_atomic

log = logging.getLogger(__name__)


class CSVTable:
    """A CSV file that grows by a row at a time; a process that is killed loses none of them.

    Floats are written with ``repr``: reading them back gives the same bits. A column that first appears later is added
    on the right, and empty in the rows before.

    Args:
        path: the file; its folder exists.
        columns: the first columns, in this order, always there.
    """

    def __init__(self, path: Path, columns: Iterable[str]) -> None:
        self.path = Path(path)
        self.columns = list(columns)
        existing = self._read()
        if existing:
            self.columns += [name for name in existing[0] if name not in self.columns]

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; keys not seen before become columns."""
        new = [name for name in row if name not in self.columns]
        self.columns += new
        if new or not self.path.exists():
            self._rewrite(self._read())
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            file.write(self._format([row.get(name) for name in self.columns]))

    def drop(self, unwanted: Callable[[int], bool]) -> int:
        """Remove the rows for whose step ``unwanted(step)`` is true, and any damaged one; returns how many.

        The end of a file that a power failure has cut is damage that is expected; any other is named in a warning, and
        the file as it was is kept beside the new one.
        """
        rows, torn, damaged = self._read_all()
        kept = [row for row in rows if not unwanted(int(row["step"]))]
        if damaged:
            aside = self.path.with_name(f"{self.path.name}.damaged")
            with contextlib.suppress(OSError):
                shutil.copyfile(self.path, aside)
            log.warning("%s: %d damaged rows are left out; the file as it was is %s", self.path, damaged, aside.name)
        if torn or damaged or len(kept) != len(rows):
            self._rewrite(kept)
        return len(rows) + torn + damaged - len(kept)

    def steps(self) -> set[int]:
        """The steps that have a row."""
        return {int(row["step"]) for row in self._read()}

    def sync(self) -> None:
        """Have every row on disk, so that a checkpoint which comes after them cannot outlive them."""
        with contextlib.suppress(OSError), open(self.path, "rb+") as file:  # not there yet; or it cannot be synced
            os.fsync(file.fileno())

    def _read(self) -> list[dict[str, str]]:
        return self._read_all()[0]

    def _read_all(self) -> tuple[list[dict[str, str]], int, int]:
        try:
            return read_rows(self.path)
        except OSError:
            return [], 0, 0

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        lines = [self._format(self.columns)] + [self._format([row.get(n, "") for n in self.columns]) for row in rows]
        write_atomic(self.path, "".join(lines))

    @staticmethod
    def _format(values: Iterable[Any]) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow([_cell(value) for value in values])
        return text.getvalue()


def read_rows(path: Path) -> tuple[list[dict[str, str]], int, int]:
    """The rows that have a step and all their cells; whether the last line is cut; how many others are damaged."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    torn = 1 if lines and not lines[-1].endswith("\n") else 0
    rows = list(csv.DictReader(lines[: len(lines) - torn]))
    whole = [row for row in rows if _is_whole(row)]
    if rows and not _is_whole(rows[-1]) and None in rows[-1].values():  # cut, and the next start wrote a line end
        rows, torn = rows[:-1], torn + 1
    return whole, torn, len(rows) - len(whole)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return repr(float(value)) if isinstance(value, float) else str(value)


def _is_whole(row: Mapping[str | None, str | None]) -> bool:
    """As many cells as the header has, none with bytes that were no UTF-8, and a step."""
    if None in row or not all(isinstance(cell, str) and "\ufffd" not in cell for cell in row.values()):
        return False
    return (row.get("step") or "").isdecimal()
