"""The command that turns text files with one prompt a line into webdataset shards."""

from __future__ import annotations

import argparse
import hashlib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nemo_aligner_diffusion.command_line import command
from nemo_aligner_diffusion.data.paths import expand_paths, is_text_file
from nemo_aligner_diffusion.data.prompt_files import MAX_PROMPT_BYTES, clean_prompt
from nemo_aligner_diffusion.data.shards import DEFAULT_SAMPLES_PER_SHARD, write_prompt_shards
from nemo_aligner_diffusion.errors import DataError
from nemo_aligner_diffusion.formats.files import decode_utf8, open_regular, text_lines

SHOWN = 5  # unusable lines named one by one in the report


@dataclass
class PromptLines:
    """The prompts of text files, one a line and streamed, with a count of what was left out.

    Empty lines are left out. An unusable line (not UTF-8, too long) is an error, or with ``skip_bad`` left out and
    listed in ``bad``. With ``drop_duplicates`` a prompt comes once; that keeps a hash of each (some 100 bytes).
    """

    files: Sequence[Path]
    skip_bad: bool = False
    drop_duplicates: bool = False
    empty: int = 0
    duplicates: int = 0
    bad: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[str]:
        seen: set[bytes] = set()
        for path in self.files:
            try:
                with open_regular(path) as stream:
                    for number, (_, line) in enumerate(text_lines(stream, MAX_PROMPT_BYTES + 3), start=1):
                        if not line.strip():
                            self.empty += 1
                            continue
                        try:
                            prompt = clean_prompt(decode_utf8(line))
                        except ValueError as error:
                            message = f"{path}: line {number} {error}"
                            if not self.skip_bad:
                                raise DataError(f"{message} (or --skip-bad-lines); nothing was written") from error
                            self.bad.append(message)
                            continue
                        if self.drop_duplicates:
                            digest = hashlib.blake2b(prompt.encode(), digest_size=16).digest()
                            if digest in seen:
                                self.duplicates += 1
                                continue
                            seen.add(digest)
                        yield prompt
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


@command(interrupted="interrupted; nothing was written")
def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    arguments = _parser().parse_args(argv)
    started = time.perf_counter()
    files = expand_paths(arguments.input)
    for path in files:
        if not is_text_file(path):
            raise DataError(f"{path} is no .txt file; expected text files with one prompt a line")
    lines = PromptLines(files, arguments.skip_bad_lines, arguments.drop_duplicates)
    written = write_prompt_shards(
        lines,
        arguments.output,
        samples_per_shard=arguments.samples_per_shard,
        bytes_per_shard=arguments.bytes_per_shard,
        gzip=arguments.gzip,
        prefix=arguments.prefix,
        overwrite=arguments.overwrite,
    )
    seconds = time.perf_counter() - started
    names = written.paths[0].name + (f" … {written.paths[-1].name}" if len(written.paths) > 1 else "")
    print(f"prompts written    {written.samples:,} in {seconds:.2f} s ({written.samples / seconds:,.0f} prompts/s)")
    print(f"shards             {len(written.paths):,} ({names}, {written.bytes:,} bytes) in {arguments.output}")
    print(f"empty lines        {lines.empty:,} left out")
    duplicates = f"{lines.duplicates:,} dropped" if arguments.drop_duplicates else "kept (see --drop-duplicates)"
    print(f"duplicates         {duplicates}")
    print(f"unusable lines     {len(lines.bad):,}{' left out' if lines.bad else ''}")
    for message in lines.bad[:SHOWN]:
        print(f"  {message}")
    if len(lines.bad) > SHOWN:
        print(f"  … and {len(lines.bad) - SHOWN:,} more")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prompts_to_shards.py",
        description="Turn .txt files with one prompt a line into webdataset shards; same prompts, same bytes.",
        epilog="example: prompts_to_shards.py prompts.txt shards/ --samples-per-shard 2000 --gzip",
    )
    parser.add_argument("input", nargs="+", help=".txt files, folders of them, globs or brace ranges")
    parser.add_argument("output", help="folder for the shards; made if missing")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--samples-per-shard",
        type=_positive,
        metavar="N",
        help=f"prompts a shard (default: {DEFAULT_SAMPLES_PER_SHARD})",
    )
    size.add_argument(
        "--bytes-per-shard",
        type=_bytes,
        metavar="SIZE",
        help="instead: the most bytes of a shard before compression, such as 64M (K, M, G are powers of 1024)",
    )
    parser.add_argument("--gzip", action="store_true", help="compress the shards (.tar.gz)")
    parser.add_argument("--prefix", default="prompts", help="start of the shards' names (default: %(default)s)")
    parser.add_argument("--drop-duplicates", action="store_true", help="write a repeated prompt once")
    parser.add_argument(
        "--skip-bad-lines",
        action="store_true",
        help="leave out and report lines that are not UTF-8 instead of stopping",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace all shards of this prefix in the folder")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)(i?B)?", text, re.IGNORECASE)
    if match is None or int(match[1]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 500000, 64M or 1G")
    return int(match[1]) * 1024 ** " KMG".index(match[2].upper() or " ")
