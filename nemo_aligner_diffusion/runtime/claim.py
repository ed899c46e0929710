"""A directory belongs to one run at a time: a lock that the kernel takes back when its holder ends, and who that is."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from nemo_aligner_diffusion.errors import OutputError
from nemo_aligner_diffusion.runtime.slurm import SlurmJob

CLAIM_FILE = ".claim"


class Claim:
    """Held from its making until :meth:`release`, or the end of the process.

    Args:
        folder: exists.
        holder: who claims it, for the message to others: ``host``, ``pid``, ``started``, ``slurm`` as in ``run.json``.

    Raises:
        OutputError: another process has it.
        OSError: it cannot be written to.
    """

    def __init__(self, folder: Path, holder: Mapping[str, Any]) -> None:
        self.folder = folder
        self._file, is_locked = self._open()
        earlier = _read(self._file)
        if _is_alive(earlier, is_locked):
            self._file.close()
            raise _in_use(folder, earlier)
        self._file.seek(0)
        self._file.truncate()
        json.dump(dict(holder), self._file)
        self._file.flush()

    def release(self) -> None:
        with contextlib.suppress(OSError):
            (self.folder / CLAIM_FILE).unlink(missing_ok=True)  # before the lock goes: afterwards it may be another's
        with contextlib.suppress(OSError):
            self._file.close()

    def _open(self) -> tuple[TextIO, bool]:
        """The file, and whether it is locked: some network file systems know no locks."""
        path = self.folder / CLAIM_FILE
        while True:
            file = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115 -- open as long as it is claimed
            is_locked = True
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                is_locked = False
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    holder = _read(file)
                    file.close()
                    raise _in_use(self.folder, holder) from None
            with contextlib.suppress(FileNotFoundError):  # its holder has just taken it away
                if os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
                    return file, is_locked
            file.close()


def _is_alive(holder: Mapping[str, Any], is_locked: bool) -> bool:
    """Whether who last claimed the directory is still there, where the lock does not tell.

    Args:
        is_locked: this process has the lock; the holder is not on this machine, then.
    """
    job, here, pid = _job(holder), holder.get("host") == socket.gethostname(), holder.get("pid")
    if here and is_locked:
        return False
    if job:
        mine = SlurmJob.from_environment(os.environ)
        if mine is not None and mine.job_id == job:
            return False  # an earlier start of this very job, which was put back into the queue
        return bool(SlurmJob(job).is_running())  # on whatever node
    if not here or not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def _in_use(folder: Path, holder: Mapping[str, Any]) -> OutputError:
    """What to tell who comes second."""
    job = _job(holder)
    machine = "this machine" if holder.get("host") == socket.gethostname() else holder.get("host")
    owner = f"Slurm job {job}" if job else f"process {holder.get('pid')} on {machine}" if holder else "another process"
    return OutputError(
        f"{folder} is in use: {owner} has been writing to it since {holder.get('started', 'a moment ago')}. Wait for "
        "it, stop it, or choose another exp_manager.explicit_log_dir."
    )


def _job(holder: Mapping[str, Any]) -> str:
    slurm = holder.get("slurm")
    return str(slurm.get("job") or "") if isinstance(slurm, dict) else ""


def _read(file: TextIO) -> dict[str, Any]:
    file.seek(0)
    try:
        holder = json.loads(file.read(10_000))
    except (ValueError, RecursionError, OSError):
        return {}
    return holder if isinstance(holder, dict) else {}
