"""``parquet_to_shards.py`` and ``folder_to_shards.py``: preferences in other forms into preference shards.

Both stream: memory holds one batch of rows. Neither imports torch; parquet files need the extra ``parquet`` (pyarrow).
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_aligner_diffusion.command_line import command
from nemo_aligner_diffusion.data.prompt_files import clean_prompt
from nemo_aligner_diffusion.errors import ConfigurationError, DataError
from nemo_aligner_diffusion.formats.files import read_bytes
from nemo_aligner_diffusion.formats.pictures import MAX_PICTURE_BYTES, decode_picture, picture_format
from nemo_aligner_diffusion.reward_training.preference_shards import (
    PreferencePair,
    check_label,
    write_preference_shards,
)

ROWS_AT_ONCE = 64  # of a parquet row group; pictures of 200 kB make that 25 MB
SHOWN = 5  # unusable rows named one by one


@dataclass
class Rows:
    """The usable rows of the input, with what was left out.

    ``skip_bad``: leave an unusable row out and list it in ``bad``, decoding every picture whole to find it; else the
    first one is an error, and pictures are looked at by their headers only.
    """

    skip_bad: bool = False
    bad: list[str] = field(default_factory=list)
    without_label: int = 0

    def pair(self, origin: str, make: Callable[[], PreferencePair]) -> PreferencePair | None:
        try:
            pair = make()
            clean_prompt(pair.prompt)
            for picture in pair.pictures:
                decode_picture(picture) if self.skip_bad else picture_format(picture)
            return pair
        except ValueError as error:
            message = f"{origin} {error}"
            if not self.skip_bad:
                raise DataError(f"{message} (or --skip-bad-rows); nothing was written") from error
            self.bad.append(message)
            return None


def parquet_pairs(files: Sequence[Path], columns: dict[str, str], rows: Rows) -> Iterator[PreferencePair]:
    """The pairs of Pick-a-Pic-like parquet files, read by row groups.

    Args:
        columns: names of ``image_0``, ``image_1``, ``prompt``, ``label_0`` in the files. Pictures are bytes, or structs
            with ``bytes`` (Hugging Face's Image). Where the files have ``label_1`` it must be the complement; where
            they have ``has_label``, rows without one are left out.

    Raises:
        ConfigurationError: pyarrow is not installed.
        DataError: a file is no parquet, lacks a column, or holds an unusable row.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ConfigurationError(
            "reading parquet files needs pyarrow: pip install 'nemo-aligner-diffusion[parquet]', or pip install pyarrow"
        ) from error
    for path in files:
        try:
            with parquet.ParquetFile(path) as file:
                there = file.schema_arrow.names
                missing = [name for name in columns.values() if name not in there]
                if missing:
                    raise DataError(
                        f"{path} has no column {', '.join(missing)}; its columns are {', '.join(there)}. Name yours "
                        "with --image-0, --image-1, --prompt, --label-0"
                    )
                wanted = [*columns.values(), *(name for name in ("label_1", "has_label") if name in there)]
                number = 0
                for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=wanted):
                    for row in batch.to_pylist():
                        pair = _parquet_row(row, f"{path}: row {number}", columns, rows)
                        number += 1
                        if pair is not None:
                            yield pair
        except (OSError, ValueError, TypeError) as error:  # pyarrow's errors derive from these
            raise DataError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from error


def _parquet_row(row: dict[str, Any], origin: str, columns: dict[str, str], rows: Rows) -> PreferencePair | None:
    if row.get("has_label") is False:
        rows.without_label += 1
        return None

    def make() -> PreferencePair:
        pictures = []
        for name in (columns["image_0"], columns["image_1"]):
            data = row[name].get("bytes") if isinstance(row[name], dict) else row[name]
            if not isinstance(data, bytes) or not data:
                raise ValueError(f"has no picture in {name}; expected encoded bytes, not {type(data).__name__}")
            pictures.append(data)
        prompt = row[columns["prompt"]]
        if not isinstance(prompt, str):
            raise ValueError(f"has no prompt in {columns['prompt']}; expected text, not {type(prompt).__name__}")
        label = check_label(row[columns["label_0"]], row.get("label_1"))
        return PreferencePair((pictures[0], pictures[1]), prompt, label, origin)

    return rows.pair(origin, make)


def folder_pairs(folder: Path, table: Path, columns: dict[str, str], rows: Rows) -> Iterator[PreferencePair]:
    """The pairs that a CSV lists: picture files relative to ``folder``, prompt, label of the first.

    Raises:
        DataError: the CSV is missing, lacks a column, or holds an unusable row.
    """
    try:
        with open(table, encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            there = reader.fieldnames or []
            missing = [name for name in columns.values() if name not in there]
            if missing:
                raise DataError(
                    f"{table} has no column {', '.join(missing)}; its columns are {', '.join(there) or 'none'}. Name "
                    "yours with --image-0, --image-1, --prompt, --label-0"
                )
            for row in reader:
                pair = _folder_row(row, folder, f"{table}: line {reader.line_num}", columns, rows)
                if pair is not None:
                    yield pair
    except UnicodeDecodeError as error:
        raise DataError(
            f"{table} is not UTF-8 (byte 0x{error.object[error.start]:02x} at position {error.start}); convert it, for "
            "example with iconv -f latin1 -t utf-8"
        ) from error
    except (OSError, csv.Error) as error:
        raise DataError(f"{table} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _folder_row(
    row: dict[str, str | None], folder: Path, origin: str, columns: dict[str, str], rows: Rows
) -> PreferencePair | None:
    def make() -> PreferencePair:
        values = {name: row[column] for name, column in columns.items()}
        if any(value is None for value in values.values()) or None in row:
            raise ValueError("has not as many fields as the header; quote texts that contain commas")
        pictures = [_read_picture(folder, str(values[name])) for name in ("image_0", "image_1")]
        text = str(values["label_0"]).strip()
        try:
            share = float(text)
        except ValueError:
            raise ValueError(f"has the label_0 {text[:40]!r}; expected 1, 0, or 0.5 for a tie") from None
        return PreferencePair((pictures[0], pictures[1]), str(values["prompt"]), check_label(share), origin)

    return rows.pair(origin, make)


def _read_picture(folder: Path, name: str) -> bytes:
    path = folder / name
    try:
        return read_bytes(path, MAX_PICTURE_BYTES)
    except OSError as error:
        raise ValueError(f"names {path}, which cannot be read: {error.strerror or error}") from error


@command(interrupted="interrupted; nothing was written")
def parquet_main(argv: Sequence[str]) -> int:
    """``parquet_to_shards.py``; returns the exit status."""
    arguments = parquet_parser().parse_args(argv)
    return _convert(arguments, lambda rows: parquet_pairs(_parquet_files(arguments.input), _columns(arguments), rows))


@command(interrupted="interrupted; nothing was written")
def folder_main(argv: Sequence[str]) -> int:
    """``folder_to_shards.py``; returns the exit status."""
    arguments = folder_parser().parse_args(argv)
    return _convert(arguments, lambda rows: folder_pairs(arguments.folder, arguments.table, _columns(arguments), rows))


def parquet_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="parquet_to_shards.py",
        description="Turn Pick-a-Pic-like parquet files into preference shards, streaming by row groups.",
        epilog="example: parquet_to_shards.py data/train-*.parquet preferences/train (needs the extra parquet)",
    )
    parser.add_argument("input", nargs="+", type=Path, help=".parquet files, or folders of them")
    _add_common(parser, {"image_0": "jpg_0", "image_1": "jpg_1", "prompt": "caption", "label_0": "label_0"})
    return parser


def folder_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="folder_to_shards.py",
        description="Turn a folder of pictures and a CSV (image_0,image_1,prompt,label_0) into preference shards.",
        epilog="example: folder_to_shards.py pictures/ pictures/labels.csv preferences/train",
    )
    parser.add_argument("folder", type=Path, help="folder that the CSV's file names start from")
    parser.add_argument("table", type=Path, help="CSV, UTF-8, with a header; label_0 is 1, 0, 0.5 (a tie) or a share")
    _add_common(parser, {name: name for name in ("image_0", "image_1", "prompt", "label_0")})
    return parser


def _parquet_files(given: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in given:
        found = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        if not found:
            raise DataError(f"the folder {path} holds no .parquet file")
        files += found
    return files


def _columns(arguments: argparse.Namespace) -> dict[str, str]:
    return {name: getattr(arguments, name) for name in ("image_0", "image_1", "prompt", "label_0")}


def _add_common(parser: argparse.ArgumentParser, columns: dict[str, str]) -> None:
    parser.add_argument("output", type=Path, help="folder for the shards; made if missing")
    for name, column in columns.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", default=column, metavar="COLUMN", help="default: %(default)s"
        )
    parser.add_argument("--samples-per-shard", type=int, metavar="N", help="pairs a shard (default: 1000)")
    parser.add_argument("--prefix", default="preferences", help="start of the shards' names (default: %(default)s)")
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave out and report unusable rows")
    parser.add_argument("--overwrite", action="store_true", help="replace all shards of this prefix in the folder")


def _convert(arguments: argparse.Namespace, pairs: Callable[[Rows], Iterator[PreferencePair]]) -> int:
    rows = Rows(arguments.skip_bad_rows)
    ties = 0

    def counted() -> Iterator[PreferencePair]:
        nonlocal ties
        for pair in pairs(rows):
            ties += abs(pair.label[0] - pair.label[1]) <= 1e-6
            yield pair

    started = time.perf_counter()
    written = write_preference_shards(
        counted(),
        arguments.output,
        samples_per_shard=arguments.samples_per_shard,
        prefix=arguments.prefix,
        overwrite=arguments.overwrite,
    )
    names = written.paths[0].name + (f" … {written.paths[-1].name}" if len(written.paths) > 1 else "")
    print(f"pairs          {written.samples:,} in {time.perf_counter() - started:.2f} s, {ties:,} of them ties")
    print(f"shards         {len(written.paths):,} ({names}, {written.bytes:,} bytes) in {arguments.output}")
    if rows.without_label:
        print(f"without label  {rows.without_label:,} left out")
    print(f"unusable rows  {len(rows.bad):,}{' left out' if rows.bad else ''}")
    for message in rows.bad[:SHOWN]:
        print(f"  {message}")
    if len(rows.bad) > SHOWN:
        print(f"  … and {len(rows.bad) - SHOWN:,} more")
    return 0
