"""``parquet_to_shards.py`` and ``folder_to_shards.py``: preferences in other forms into preference shards.

Both stream: memory holds one batch of rows. Neither imports torch; parquet files need the extra ``parquet`` (pyarrow).
"""

from __future__ import annotations

import argparse
import csv
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nemo_aligner_diffusion.cli.prompts_to_shards import bad_rows, print_result
from nemo_aligner_diffusion.command_line import Parser, whole_number
from nemo_aligner_diffusion.data.bad_samples import BadSamples
from nemo_aligner_diffusion.data.preferences.shards import (
    PreferencePair,
    read_label,
    write_preference_shards,
)
from nemo_aligner_diffusion.data.prompt_files import clean_prompt
from nemo_aligner_diffusion.errors import ConfigurationError, DataError
from nemo_aligner_diffusion.formats.files import read_bytes
from nemo_aligner_diffusion.formats.pictures import MAX_PICTURE_BYTES, decode_picture, picture_format
from nemo_aligner_diffusion.runtime.ending import command

ROWS_AT_ONCE = 64  # of a parquet row group; pictures of 200 kB make that 25 MB
FIELDS = ("image_0", "image_1", "prompt", "label_0")


class Row(NamedTuple):
    """A preference as it was found: its place, for messages, and its fields by the names of :data:`FIELDS`.

    Pictures are encoded bytes, structs with ``bytes`` (Hugging Face's Image) or files. With ``label_1``, it must be the
    complement.
    """

    origin: str
    values: Mapping[str, Any]


def parquet_rows(paths: Sequence[Path], columns: Mapping[str, str], left_out: Counter[str]) -> Iterator[Row]:
    """The rows of Pick-a-Pic-like parquet files, read by row groups.

    Args:
        paths: files, or folders of them.
        columns: field -> name of its column.
        left_out: counts rows whose ``has_label`` is false.

    Raises:
        ConfigurationError: pyarrow is not installed.
        DataError: a file is no parquet or lacks a column.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ConfigurationError(
            "reading parquet files needs pyarrow: pip install 'nemo-aligner-diffusion[parquet]', or pip install pyarrow"
        ) from error
    for path in paths:
        files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        if not files:
            raise DataError(f"the folder {path} holds no .parquet file")
        for file in files:
            try:
                with parquet.ParquetFile(file) as opened:
                    there = opened.schema_arrow.names
                    _check_columns(file, columns, there)
                    wanted = [*columns.values(), *(name for name in ("label_1", "has_label") if name in there)]
                    number = 0
                    for batch in opened.iter_batches(batch_size=ROWS_AT_ONCE, columns=wanted):
                        for row in batch.to_pylist():
                            values = {**row, **{name: row[column] for name, column in columns.items()}}
                            if row.get("has_label") is False:
                                left_out["without label"] += 1
                            else:
                                yield Row(f"{file}: row {number}", values)
                            number += 1
            except (OSError, ValueError, TypeError) as error:  # pyarrow's errors derive from these
                raise DataError(f"{file} cannot be read as parquet: {str(error).splitlines()[0]}") from error


def table_rows(folder: Path, table: Path, columns: Mapping[str, str]) -> Iterator[Row]:
    """The rows of a CSV whose pictures are files, named relative to ``folder``.

    Raises:
        DataError: the CSV is missing, no UTF-8, or lacks a column.
    """
    try:
        with open(table, encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, restval="", restkey="more")
            _check_columns(table, columns, reader.fieldnames or [])
            for row in reader:
                values = {name: row[column] for name, column in columns.items()}
                pictures = {name: folder / values[name] for name in ("image_0", "image_1")}
                short = "" in values.values() or "more" in row
                yield Row(f"{table}: line {reader.line_num}", {} if short else {**values, **pictures})
    except UnicodeDecodeError as error:
        raise DataError(
            f"{table} is not UTF-8 (byte 0x{error.object[error.start]:02x} at position {error.start}); convert it, for "
            "example with iconv -f latin1 -t utf-8"
        ) from error
    except (OSError, csv.Error) as error:
        raise DataError(f"{table} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _check_columns(file: Path, columns: Mapping[str, str], there: Sequence[str]) -> None:
    missing = [name for name in columns.values() if name not in there]
    if missing:
        raise DataError(
            f"{file} has no column {', '.join(missing)}; its columns are {', '.join(there) or 'none'}. Name yours with "
            "--image-0, --image-1, --prompt, --label-0"
        )


def usable_pairs(rows: Iterable[Row], bad: BadSamples) -> Iterator[PreferencePair]:
    """The pairs in ``rows``; where ``bad`` skips, every picture is decoded whole, else its header is read."""
    for row in rows:
        try:
            pair = _pair(row)
            for picture in pair.pictures:
                decode_picture(picture) if bad.policy == "skip" else picture_format(picture)
        except ValueError as error:
            bad(f"{row.origin} {error}")
            continue
        yield pair


def _pair(row: Row) -> PreferencePair:
    values = row.values
    if not values:
        raise ValueError("has not as many fields as the header, or an empty one; quote texts that contain commas")
    first, second = (_picture(values[name], name) for name in ("image_0", "image_1"))
    prompt, label = values["prompt"], read_label(values["label_0"], values.get("label_1"))
    if not isinstance(prompt, str):
        raise ValueError(f"has no prompt; expected text, not {type(prompt).__name__}")
    return PreferencePair((first, second), clean_prompt(prompt), label, row.origin)


def _picture(value: Any, name: str) -> bytes:
    if isinstance(value, Path):
        try:
            return read_bytes(value, MAX_PICTURE_BYTES)
        except OSError as error:
            raise ValueError(f"names {value}, which cannot be read: {error.strerror or error}") from error
    data = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(data, bytes) or not data:
        raise ValueError(f"has no picture as {name}; expected encoded bytes, not {type(data).__name__}")
    return data


@command(interrupted="interrupted; nothing was written")
def parquet_main(argv: Sequence[str]) -> int:
    """``parquet_to_shards.py``; returns the exit status."""
    arguments = parquet_parser().parse_args(argv)
    left_out = Counter[str]()
    return _convert(arguments, parquet_rows(arguments.input, _columns(arguments), left_out), left_out)


@command(interrupted="interrupted; nothing was written")
def folder_main(argv: Sequence[str]) -> int:
    """``folder_to_shards.py``; returns the exit status."""
    arguments = folder_parser().parse_args(argv)
    return _convert(arguments, table_rows(arguments.folder, arguments.table, _columns(arguments)), Counter())


def parquet_parser() -> argparse.ArgumentParser:
    parser = Parser(
        "Turn Pick-a-Pic-like parquet files into preference shards, streaming by row groups.",
        "example: parquet_to_shards.py data/train-*.parquet preferences/train (needs the extra parquet)",
    )
    parser.add_argument("input", nargs="+", type=Path, help=".parquet files, or folders of them")
    return _with_common(parser, ("jpg_0", "jpg_1", "caption", "label_0"))


def folder_parser() -> argparse.ArgumentParser:
    parser = Parser(
        "Turn a folder of pictures and a CSV (image_0,image_1,prompt,label_0) into preference shards.",
        "example: folder_to_shards.py pictures/ pictures/labels.csv preferences/train",
    )
    parser.add_argument("folder", type=Path, help="folder that the CSV's file names start from")
    parser.add_argument("table", type=Path, help="CSV, UTF-8, with a header; label_0 is 1, 0, 0.5 (a tie) or a share")
    return _with_common(parser, FIELDS)


def _with_common(parser: argparse.ArgumentParser, columns: Sequence[str]) -> argparse.ArgumentParser:
    parser.add_argument("output", type=Path, help="folder for the shards; made if missing")
    for name, column in zip(FIELDS, columns, strict=True):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, default=column, metavar="COLUMN", help="default: %(default)s")
    parser.add_argument("--samples-per-shard", type=whole_number, metavar="N", help="pairs a shard (default: 1000)")
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave out and report unusable rows")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier shards in the folder")
    return parser


def _columns(arguments: argparse.Namespace) -> dict[str, str]:
    return {name: getattr(arguments, name) for name in FIELDS}


def _convert(arguments: argparse.Namespace, rows: Iterator[Row], left_out: Counter[str]) -> int:
    started = time.perf_counter()
    bad = bad_rows(arguments.skip_bad_rows, "--skip-bad-rows")
    written = write_preference_shards(
        usable_pairs(rows, bad),
        arguments.output,
        samples_per_shard=arguments.samples_per_shard,
        overwrite=arguments.overwrite,
    )
    print(f"pairs written      {written.samples:,} in {time.perf_counter() - started:.2f} s")
    for reason, count in left_out.items():
        print(f"{reason:<19}{count:,} left out")
    print_result(written, bad, "rows")
    return 0
