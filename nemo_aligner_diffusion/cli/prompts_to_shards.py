"""The command that turns text files with one prompt a line into webdataset shards."""

from __future__ import annotations

import argparse
import hashlib
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemo_aligner_diffusion.command_line import Parser, whole_number
from nemo_aligner_diffusion.data.bad_samples import BadSamples
from nemo_aligner_diffusion.data.paths import expand_paths, is_text_file
from nemo_aligner_diffusion.data.prompt_files import read_lines
from nemo_aligner_diffusion.data.shards import DEFAULT_SAMPLES_PER_SHARD, WrittenShards, write_prompt_shards
from nemo_aligner_diffusion.errors import DataError
from nemo_aligner_diffusion.runtime.ending import command


def prompts_of(files: Sequence[Path], bad: BadSamples, drop_duplicates: bool, left_out: Counter[str]) -> Iterator[str]:
    """The prompts of text files, one a line and streamed.

    Args:
        bad: decides about lines that are not UTF-8 or too long.
        drop_duplicates: a prompt comes once; that keeps a hash of each (some 100 bytes).
        left_out: counts ``empty`` lines and ``duplicates``.
    """
    seen: set[bytes] = set()
    for path in files:
        for _, (prompt, *_) in read_lines(path, bad):
            digest = hashlib.blake2b(prompt.encode(), digest_size=16).digest() if drop_duplicates else b""
            if not prompt:
                left_out["empty"] += 1
            elif digest in seen:
                left_out["duplicates"] += 1
            else:
                if drop_duplicates:
                    seen.add(digest)
                yield prompt


@command(interrupted="interrupted; nothing was written")
def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    arguments = _parser().parse_args(argv)
    started = time.perf_counter()
    files = expand_paths(arguments.input)
    for path in files:
        if not is_text_file(path):
            raise DataError(f"{path} is no .txt file; expected text files with one prompt a line")
    bad = bad_rows(arguments.skip_bad_lines, "--skip-bad-lines")
    left_out = Counter[str]()
    written = write_prompt_shards(
        prompts_of(files, bad, arguments.drop_duplicates, left_out),
        arguments.output,
        samples_per_shard=arguments.samples_per_shard,
        bytes_per_shard=arguments.bytes_per_shard,
        gzip=arguments.gzip,
        prefix=arguments.prefix,
        overwrite=arguments.overwrite,
    )
    seconds = time.perf_counter() - started
    print(f"prompts written    {written.samples:,} in {seconds:.2f} s ({written.samples / seconds:,.0f} prompts/s)")
    print(f"empty lines        {left_out['empty']:,} left out")
    dropped = f"{left_out['duplicates']:,} dropped" if arguments.drop_duplicates else "kept (see --drop-duplicates)"
    print(f"duplicates         {dropped}")
    print_result(written, bad, "lines")
    return 0


def bad_rows(skip: bool, option: str) -> BadSamples:
    """What a converter does about an unusable line or row: stop before anything is written, or leave it out."""
    return BadSamples("skip" if skip else "error", advice=f"or {option}; nothing was written")


def print_result(written: WrittenShards, bad: BadSamples, noun: str) -> None:
    """Where the shards are, and which lines or rows were left out."""
    names = written.paths[0].name + (f" … {written.paths[-1].name}" if len(written.paths) > 1 else "")
    folder = written.paths[0].parent
    print(f"shards             {len(written.paths):,} ({names}, {written.bytes:,} bytes) in {folder}")
    print(f"unusable {noun:<10}{bad.count:,}{' left out' if bad.count else ''}")
    for message in bad.messages:
        print(f"  {message}")
    if bad.count > len(bad.messages):
        print(f"  … and {bad.count - len(bad.messages):,} more")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "Turn .txt files with one prompt a line into webdataset shards; same prompts, same bytes.",
        "example: prompts_to_shards.py prompts.txt shards/ --samples-per-shard 2000 --gzip",
    )
    parser.add_argument("input", nargs="+", help=".txt files, folders of them, globs or brace ranges")
    parser.add_argument("output", help="folder for the shards; made if missing")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--samples-per-shard",
        type=whole_number,
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
    parser.add_argument("--skip-bad-lines", action="store_true", help="leave out and report lines that are not UTF-8")
    parser.add_argument("--overwrite", action="store_true", help="replace all shards of this prefix in the folder")
    return parser


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)(i?B)?", text, re.IGNORECASE)
    if match is None or int(match[1]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 500000, 64M or 1G")
    return int(match[1]) * 1024 ** " KMG".index(match[2].upper() or " ")
