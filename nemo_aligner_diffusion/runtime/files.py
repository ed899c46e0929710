"""Whole files or none: what is written goes through a temporary neighbour, which then takes its place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nemo_aligner_diffusion.errors import OutputError

UNFINISHED = ".tmp"  # what a write that was cut short leaves ends so, and begins with a dot


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary neighbour of ``path`` to write to; on leaving it is flushed to disk and takes ``path``'s place.

    Whoever looks sees the old file or the complete new one, after a power failure too. On an exception nothing remains.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=UNFINISHED, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        give_usual_mode(temporary)
        os.replace(temporary, path)
        sync_directory(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A neighbour of ``path``, not there yet, to be made and filled; on leaving it takes ``path``'s place, whole.

    A folder that is there already is gone only then. On an exception nothing remains of the new one.
    """
    fresh, old = (path.with_name(f".{path.name}{middle}{UNFINISHED}") for middle in ("", ".old"))
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        yield fresh
        for file in fresh.rglob("*"):
            if file.is_file() and not file.is_symlink():
                give_usual_mode(file)
        if path.exists():
            path.rename(old)
        fresh.rename(path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def give_usual_mode(file: Path) -> None:
    """``tempfile`` makes files that only their owner can read; safetensors does, too."""
    umask = os.umask(0o022)  # there is no call that only reads it
    os.umask(umask)
    os.chmod(file, 0o666 & ~umask)


def write_atomic(path: str | Path, data: bytes | str) -> Path:
    """Replace ``path`` by a file with this content (text as UTF-8), completely or not at all; folders are made.

    Raises:
        OutputError: the folder cannot be made or written to.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; give a folder this user may write to, on a disk with room"
        ) from error
    return path


def sync_directory(path: Path) -> None:
    """A rename is on disk only when its directory is; some file systems cannot sync one, which must not stop a run."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_leftovers(folder: Path) -> list[str]:
    """Delete what writes that were cut short left in ``folder`` (not below it), and give their names."""
    if not folder.is_dir():
        return []
    leftovers = [path for path in folder.iterdir() if path.name.startswith(".") and path.name.endswith(UNFINISHED)]
    for path in leftovers:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return sorted(path.name for path in leftovers)
