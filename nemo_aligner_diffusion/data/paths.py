"""From what a user writes for "where the prompts are" to the list of files that hold them."""

from __future__ import annotations

import glob
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from braceexpand import braceexpand

from nemo_aligner_diffusion.errors import DataError, printable

logger = logging.getLogger(__name__)

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
TEXT_SUFFIX = ".txt"
MAX_FILES = 1_000_000  # a brace range beyond this is a typing error, and would fill the memory before anything is read

PathSpec = str | os.PathLike[str] | Sequence["str | os.PathLike[str]"]


def expand_paths(spec: PathSpec, check: bool = True) -> list[Path]:
    """Return the prompt files that ``spec`` names, every one checked to exist and not to be empty.

    Without ``check`` a brace range may name files that are not there, and files may be empty or unreadable: all of them
    are in the result, for a caller who passes over what it cannot read.

    ``spec`` is one of, or a list or a comma-separated string of:

    - a file: a tar shard (plain or gzipped) or a ``.txt`` with one prompt a line;
    - a folder: all its ``*.tar``, ``*.tar.gz``, ``*.tgz``, subfolders included, sorted; its ``*.txt`` where it has
      no shard. Hidden files and folders are left out (half-written shards are there);
    - a glob such as ``shards/*.tar`` (``**`` descends), sorted;
    - a brace range such as ``prompts-{0000..0127}.tar`` or ``{train,extra}.tar``, in the order written.

    A file that exists under the literal name wins over the reading as a pattern. The order is part of what a seed
    means, so it never depends on the file system. A file named twice is read once, with a warning.

    >>> expand_paths("shards/prompts-{0000..0127}.tar, more/*.tar.gz")  # doctest: +SKIP

    Raises:
        DataError: nothing was given; a path is missing, empty or unreadable; a folder or glob holds no prompt file.
    """
    if spec is None or isinstance(spec, str | os.PathLike):
        items: Sequence[object] = [] if spec is None or not str(spec).strip() else [spec]
    elif isinstance(spec, Sequence):
        items = spec
    else:
        raise DataError(f"the prompt path is {spec!r} ({type(spec).__name__}); expected a path or a list of paths")
    if not items:
        raise DataError(
            "no prompt path was given; expected a shard, a folder, a glob, a brace range or a list of these"
        )

    files: list[Path] = []
    for item in items:
        if not isinstance(item, str | os.PathLike):
            raise DataError(f"the list of prompt paths holds {item!r} ({type(item).__name__}); expected only paths")
        text = os.fspath(item)
        if not text.strip():
            raise DataError(f"the list of prompt paths holds an empty path: {list(map(str, items))}")
        for part in _split_at_commas(text):
            files.extend(_expand_one(part, check))
            if len(files) > MAX_FILES:
                raise DataError(f"{text} names more than {MAX_FILES:,} files; name a folder or a smaller range")
    return _unique(files)


def is_text_file(path: Path) -> bool:
    """Whether the file holds one prompt a line (by its name), rather than being a shard."""
    return path.name.lower().endswith(TEXT_SUFFIX)


def _split_at_commas(text: str) -> list[str]:
    """Split at commas outside braces; a comma in the name of a file that exists is no separator."""
    if os.path.exists(os.path.expanduser(text)):
        return [text]
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def _expand_one(text: str, check: bool) -> list[Path]:
    text = os.path.expanduser(text)
    if "://" in text or text.startswith("pipe:"):
        # webdataset would run a shell command for these; a training configuration should never be able to.
        raise DataError(f"{text} is not a local path; copy the shards to a disk that every node can read and name that")
    if os.path.exists(text):
        return _file_or_folder(Path(text), check)
    names = list(_expand_braces(text))
    missing = {name: None for name in names if not glob.has_magic(name) and not os.path.exists(name)}
    if missing and (check or len(missing) == len(names)):
        if len(names) == 1:
            raise DataError(
                f"{text} does not exist ({_nearest_existing(Path(text))}); expected a shard, a folder, or a glob"
            )
        shown = ", ".join(list(missing)[:3]) + (", …" if len(missing) > 3 else "")
        raise DataError(
            f"{text} names {len(names)} files, of which {len(missing)} do not exist: {shown}; "
            "correct the range or copy the missing shards"
        )
    files: list[Path] = []
    for name in names:
        if name in missing:
            files.append(Path(name))
            continue
        matches = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        if not matches:
            raise DataError(f"{name} matches nothing; expected a glob that matches at least one shard or .txt file")
        for match in matches:
            files.extend(_file_or_folder(Path(match), check))
    return files


def _expand_braces(text: str) -> Iterator[str]:
    # braceexpand holds a whole range in memory before it gives the first name, so its length is checked before.
    ranges = [abs(int(last) - int(first)) + 1 for first, last in re.findall(r"\{(-?\d+)\.\.(-?\d+)", text)]
    if math.prod(ranges) > MAX_FILES:
        raise DataError(f"{text} names more than {MAX_FILES:,} files; correct the range")
    try:
        for count, name in enumerate(braceexpand(text), start=1):
            if count > MAX_FILES:
                raise DataError(f"{text} names more than {MAX_FILES:,} files; correct the range")
            yield name
    except ValueError as error:
        raise DataError(f"{text}: unbalanced braces; expected a range such as prompts-{{0000..0127}}.tar") from error


def _file_or_folder(path: Path, check: bool) -> list[Path]:
    if path.is_dir():
        found = sorted(
            file
            for file in path.rglob("*")
            if file.name.lower().endswith((*SHARD_SUFFIXES, TEXT_SUFFIX))
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
            and file.is_file()
        )
        # Beside shards, a .txt is a licence or a readme more often than a list of prompts.
        files = [file for file in found if not is_text_file(file)] or found
        if len(files) < len(found):
            logger.info("%s: its %d .txt files are passed over beside the shards", path, len(found) - len(files))
        if not files:
            raise DataError(
                f"the folder {path} holds no prompt file; expected {', '.join(SHARD_SUFFIXES)}, or {TEXT_SUFFIX} with "
                "one prompt a line (prompts_to_shards.py turns such a .txt into shards)"
            )
    elif path.is_file():
        files = [path]
    else:
        raise DataError(f"{path} is neither a file nor a folder; expected a shard, a .txt, or a folder of them")
    for file in files if check else []:
        try:
            size = file.stat().st_size
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}") from error
        if size == 0:
            raise DataError(f"{file} is empty (0 bytes); expected a tar shard or a .txt with prompts: copy it again")
        if not os.access(file, os.R_OK):
            raise DataError(f"{file} cannot be read: permission denied; make it readable for the user of this run")
    return files


def _nearest_existing(path: Path) -> str:
    """Say where the path stops being right, the thing one wants to know about a long mistyped path."""
    for parent in path.absolute().parents:
        if parent.is_dir():
            return f"the folder {parent} does exist"
    return "no part of it exists"


def _unique(files: list[Path]) -> list[Path]:
    unique: dict[str, Path] = {}
    for file in files:
        key = os.path.abspath(file)
        if key in unique:
            logger.warning(
                "%s is named more than once among the prompt paths; it is read once an epoch", printable(file)
            )
        unique.setdefault(key, file)
    return list(unique.values())
