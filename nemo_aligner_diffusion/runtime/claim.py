"""A directory belongs to one run at a time: a lock that the kernel takes back when its holder ends, and who that is."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from nemo_aligner_diffusion.errors import OutputError
from nemo_aligner_diffusion.runtime.slurm import SlurmJob

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

CLAIM_FILE = ".claim"
_HELD = (errno.EAGAIN, errno.EACCES)


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
        self.is_locked = False
        self._file = self._lock()
        earlier = _read(self._file)
        if is_alive(earlier, self.is_locked):
            self._file.close()
            raise in_use(folder, earlier)
        self._file.seek(0)
        self._file.truncate()
        json.dump(dict(holder), self._file)
        self._file.flush()

    def release(self) -> None:
        with contextlib.suppress(OSError):
            (self.folder / CLAIM_FILE).unlink(missing_ok=True)  # before the lock goes: afterwards it may be another's
        with contextlib.suppress(OSError):
            self._file.close()

    def _lock(self) -> TextIO:
        path = self.folder / CLAIM_FILE
        while True:
            file = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115 -- open as long as it is claimed
            try:
                if fcntl is not None:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self.is_locked = True
            except OSError as error:
                if error.errno in _HELD:
                    holder = _read(file)
                    file.close()
                    raise in_use(self.folder, holder) from None
            with contextlib.suppress(FileNotFoundError):  # its holder has just taken it away
                if os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
                    return file
            file.close()


def is_alive(holder: Mapping[str, Any], have_lock: bool = False) -> bool:
    """Whether a process is still there: by its Slurm job, or on this machine.

    Args:
        holder: ``host``, ``pid``, ``slurm``.
        have_lock: the lock that it would hold is this process's; then it is not on this machine.
    """
    slurm = holder.get("slurm")
    job = slurm.get("job") if isinstance(slurm, dict) else None
    here = holder.get("host") == socket.gethostname()
    if job is not None and not (here and have_lock):
        mine = SlurmJob.from_environment(os.environ)
        if mine is not None and mine.job_id == job:
            return False  # an earlier start of this very job, which was put back into the queue
        running = SlurmJob(str(job)).is_running()  # on whatever node
        if running is not None:
            return running
    pid = holder.get("pid")
    if have_lock or not here or not isinstance(pid, int) or pid <= 0 or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:  # process numbers are reused (every container starts at 1): where /proc tells, trust only a Python process
        return b"python" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True


def in_use(folder: Path, holder: Mapping[str, Any]) -> OutputError:
    """What to tell who comes second."""
    slurm = holder.get("slurm")
    job = slurm.get("job") if isinstance(slurm, dict) else None
    here = holder.get("host") == socket.gethostname()
    machine = "this machine" if here else holder.get("host")
    owner = f"Slurm job {job}" if job else f"process {holder.get('pid')} on {machine}" if holder else "another process"
    return OutputError(
        f"{folder} is in use: {owner} has been writing to it since {holder.get('started', 'a moment ago')}. Wait for "
        "it, stop it, or choose another exp_manager.explicit_log_dir."
    )


def _read(file: TextIO) -> dict[str, Any]:
    file.seek(0)
    try:
        holder = json.loads(file.read(10_000))
    except (ValueError, RecursionError, OSError):
        return {}
    return holder if isinstance(holder, dict) else {}
