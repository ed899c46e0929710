"""Samples into webdataset shards: equal samples give equal bytes, and a shard under its name is always whole."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from nemo_aligner_diffusion.data.paths import SHARD_SUFFIXES
from nemo_aligner_diffusion.data.prompt_files import clean_prompt
from nemo_aligner_diffusion.errors import DataError, OutputError

DEFAULT_SAMPLES_PER_SHARD = 10_000

Sample = Sequence[tuple[str, bytes]]  # (member name, content), the names alike up to the first dot


@dataclass(frozen=True)
class WrittenShards:
    """What was written: the shards in order, the samples in them, their size on disk in bytes."""

    paths: list[Path]
    samples: int
    bytes: int


def write_prompt_shards(
    prompts: Iterable[str],
    output: str | os.PathLike[str],
    samples_per_shard: int | None = None,
    bytes_per_shard: int | None = None,
    gzip: bool = False,
    prefix: str = "prompts",
    overwrite: bool = False,
) -> WrittenShards:
    """Write ``prompts`` as ``output/prompts-0000.tar``, ``…-0001.tar``, … (``.tar.gz`` with ``gzip``), one member each.

    Members are called ``000000000.txt``, counted through all shards, and hold the prompt as UTF-8 (without line breaks
    at its end). Time stamps, owners and modes are constant, so equal prompts give equal bytes. ``prompts`` is read once
    and streamed. The shards are written into a hidden folder in ``output`` and renamed when all are complete and on
    disk: an error or a crash before that leaves the shards there as they were.

    Args:
        samples_per_shard: prompts a shard; 10,000 where neither this nor ``bytes_per_shard`` is given.
        bytes_per_shard: alternatively, the most bytes of a shard before compression: 1,024 for each prompt of at most
            512, tar's header included, and the end, padded to 10,240; at least one prompt whatever this says.
        overwrite: replace the shards of this ``prefix`` in ``output``, all of them, also those with higher numbers.

    Raises:
        DataError: a prompt is unusable (names its number, from 0), or there is none.
        OutputError: ``output`` cannot be written, or holds shards of this prefix already and ``overwrite`` is not set.
    """
    return write_sample_shards(
        _members(prompts), output, "prompt", samples_per_shard, bytes_per_shard, gzip, prefix, overwrite
    )


def write_sample_shards(
    samples: Iterable[Sample],
    output: str | os.PathLike[str],
    noun: str,
    samples_per_shard: int | Sequence[int] | None,
    bytes_per_shard: int | None,
    gzip: bool,
    prefix: str,
    overwrite: bool,
) -> WrittenShards:
    """Write samples of several members each; the rest as :func:`write_prompt_shards`.

    Args:
        noun: what one is called.
        samples_per_shard: also of each shard.

    Raises:
        DataError: there is no sample, or an argument is impossible; what ``samples`` raises passes through.
        OutputError: ``output`` cannot be written, or holds shards of this prefix already and ``overwrite`` is not set.
    """
    if samples_per_shard is not None and bytes_per_shard is not None:
        raise DataError("both samples_per_shard and bytes_per_shard were given; expected one of them")
    for name, value in (("samples_per_shard", samples_per_shard), ("bytes_per_shard", bytes_per_shard)):
        if isinstance(value, int) and value < 1:
            raise DataError(f"{name} is {value}; expected at least 1")
    if not re.fullmatch(r"[\w][\w.-]*", prefix):
        raise DataError(f"prefix is {prefix!r}; expected letters, digits, '_', '-' and '.', as part of a file name")
    if bytes_per_shard is None and samples_per_shard is None:
        samples_per_shard = DEFAULT_SAMPLES_PER_SHARD

    folder = Path(output)
    before = _existing_shards(folder, prefix)
    if before and not overwrite:
        raise OutputError(
            f"{folder} holds {len(before)} shard(s) named {prefix}-*, {before[0].name} first; choose another folder or "
            "prefix, or ask for overwriting"
        )
    numbered = iter(samples)
    first = next(numbered, None)  # also finds an unusable input before a folder is made
    if first is None:
        raise DataError(f"there is no {noun} to write; expected at least one")
    numbered = chain([first], numbered)

    new_folder = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{prefix}-", suffix=".partial", dir=folder))
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written: {error.strerror}; choose a folder this user may write"
        ) from error
    try:
        written = list(_write_all(numbered, partial, samples_per_shard, bytes_per_shard, gzip))
        paths = [folder / name for name in shard_names(len(written), prefix, gzip)]
        for (path, _), final in zip(written, paths, strict=True):
            os.replace(path, final)
        for stale in set(before) - set(paths):
            stale.unlink()
        return WrittenShards(paths, sum(count for _, count in written), sum(path.stat().st_size for path in paths))
    except OSError as error:
        raise OutputError(
            f"writing shards to {folder} failed: {error.strerror or error}; free space and retry"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if new_folder and not any(folder.iterdir()):
            folder.rmdir()


def shard_names(count: int, prefix: str, gzip: bool) -> list[str]:
    """Names of ``count`` shards, with as many digits as make them sort as numbers, four at least."""
    digits = max(4, len(str(count - 1)))
    return [f"{prefix}-{number:0{digits}d}{'.tar.gz' if gzip else '.tar'}" for number in range(count)]


def _existing_shards(folder: Path, prefix: str) -> list[Path]:
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; expected a folder for the shards, existing or not")
    ending = "|".join(map(re.escape, SHARD_SUFFIXES))
    shard = re.compile(rf"{re.escape(prefix)}-\d+({ending})")
    try:
        return sorted(path for path in folder.iterdir() if shard.fullmatch(path.name)) if folder.exists() else []
    except OSError as error:
        raise OutputError(f"{folder} cannot be listed: {error.strerror}") from error


def _members(prompts: Iterable[str]) -> Iterator[Sample]:
    """The one member of each prompt."""
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise DataError(f"prompt {number} is {prompt!r} ({type(prompt).__name__}); expected a string")
        try:
            yield [(f"{number:09d}.txt", clean_prompt(prompt).encode())]
        except ValueError as error:
            raise DataError(f"prompt {number} {error}") from error


def tar_sample(sample: Sample) -> bytes:
    """The blocks that hold a sample in a tar; mode 0644, time 0, owner 0."""
    blocks = []
    for name, content in sample:
        header = tarfile.TarInfo(name)
        header.size = len(content)
        blocks += [header.tobuf(tarfile.USTAR_FORMAT), content, bytes(-len(content) % tarfile.BLOCKSIZE)]
    return b"".join(blocks)


def _write_all(
    samples: Iterator[Sample],
    folder: Path,
    most_samples: int | Sequence[int] | None,
    most_bytes: int | None,
    compress: bool,
) -> Iterator[tuple[Path, int]]:
    """Write shard after shard; yield each with its number of samples once it is complete and on disk."""
    blocks = map(tar_sample, samples)
    waiting = next(blocks, None)
    number = 0
    while waiting is not None:
        path = folder / f"{number}.tar"
        count = used = 0
        most = most_samples[number] if isinstance(most_samples, Sequence) else most_samples
        with open(path, "wb") as file:
            # no name and no time in the header, where they would make equal shards differ
            with gzip.GzipFile("", "wb", 6, file, mtime=0) if compress else nullcontext(file) as stream:
                while waiting is not None:
                    if count and (count == most or (most_bytes and _padded(used + len(waiting)) > most_bytes)):
                        break
                    stream.write(waiting)
                    used += len(waiting)
                    count += 1
                    waiting = next(blocks, None)
                stream.write(bytes(_padded(used) - used))
            file.flush()
            os.fsync(file.fileno())
        yield path, count
        number += 1


def _padded(size: int) -> int:
    """Bytes of a tar of ``size`` bytes of members, with its end marker."""
    return -(-(size + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
