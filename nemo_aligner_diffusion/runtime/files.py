"""Whole files or none: everything the evaluation writes goes through a temporary file beside its target."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from nemo_aligner_diffusion.errors import OutputError


def write_atomic(path: str | Path, data: bytes | str) -> Path:
    """Write ``data`` (text as UTF-8) to ``path`` so that a reader sees the old file or the new one, never a part.

    Missing parent folders are made.

    Raises:
        OutputError: the folder cannot be made or written to.
    """
    path = Path(path)
    payload = data.encode("utf-8") if isinstance(data, str) else data
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(payload)
        # mkstemp makes private files; pictures and reports are for everyone the umask allows.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; give a folder this user may write to, on a disk with room"
        ) from error
    return path


def _umask() -> int:
    current = os.umask(0o022)  # there is no call that only reads it
    os.umask(current)
    return current
