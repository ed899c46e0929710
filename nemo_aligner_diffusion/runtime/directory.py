"""The directory of one run: where it is, whether it may be used, and what was done in it. Imports no torch."""

from __future__ import annotations

import datetime
import errno
import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_aligner_diffusion.errors import OutputError
from nemo_aligner_diffusion.formats.files import parse_json, read_bytes
from nemo_aligner_diffusion.formats.yaml_reader import read_yaml
from nemo_aligner_diffusion.runtime.slurm import SlurmJob, is_interactive

STATE_FILE = "run.json"
FOLDERS = ("checkpoints", "samples")
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HOW_TO_RESUME = ("exp_manager.resume_", "exp_manager.explicit_log_dir", "exp_manager.exp_dir", "exp_manager.version")
CHECKPOINT_PATTERN = re.compile(r"step_(\d+)")
OLD_CHECKPOINT_PATTERN = re.compile(r"step_\d+\.ckpt")  # single files, before there were folders
UNFINISHED = ".tmp"  # what a write that was cut short leaves ends so, and begins with a dot
PACKAGES = (
    "nemo-aligner-diffusion",
    "torch",
    "pytorch-lightning",
    "diffusers",
    "transformers",
    "peft",
    "safetensors",
    "webdataset",
    "omegaconf",
    "hydra-core",
    "numpy",
)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary neighbour of ``path`` to write to; on leaving it is flushed to disk and takes ``path``'s place.

    Whoever looks sees the old file or the complete new one. On an exception nothing remains.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=UNFINISHED, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
        sync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by a UTF-8 file with this text, completely or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def process_rank() -> int:
    """This process's rank from the launcher's environment (torchrun, Slurm, Lightning), before torch is imported."""
    # on every node of a Slurm step there is a LOCAL_RANK of 0, if the job script exports one
    in_step = "SLURM_STEP_ID" in os.environ and not is_interactive(os.environ)
    ranks = ("SLURM_PROCID", "LOCAL_RANK") if in_step else ("LOCAL_RANK", "SLURM_PROCID")
    for name in ("RANK", *ranks, "JSM_NAMESPACE_RANK"):
        value = os.environ.get(name)
        if value is not None:
            return int(value)
    return 0


def resolve_run_directory(
    exp_manager: Mapping[str, Any], default_name: str = "default", now: datetime.datetime | None = None
) -> Path:
    """The run directory as NeMo's ``exp_manager`` chooses it.

    ``explicit_log_dir`` as it is; else ``exp_dir/name/version`` with ``exp_dir`` ``./nemo_experiments`` by default and
    ``version`` the date and time. With ``resume_if_exists`` there is no version folder, so that the next run finds it.
    """
    explicit = exp_manager.get("explicit_log_dir")
    if explicit:
        return Path(str(explicit)).expanduser().absolute()
    base = Path(str(exp_manager.get("exp_dir") or "nemo_experiments")).expanduser()
    directory = base / str(exp_manager.get("name") or default_name)
    version = exp_manager.get("version") or os.environ.get("NEMO_EXPM_VERSION")
    if not version and not exp_manager.get("resume_if_exists"):
        version = (now or datetime.datetime.now()).strftime("%Y-%m-%d_%H-%M-%S")
        # processes that this one launches inherit it and agree on the directory
        os.environ["NEMO_EXPM_VERSION"] = version
    return (directory / str(version) if version else directory).absolute()


@dataclass
class RunDirectory:
    """A directory that has been checked and claimed for this run.

    Attributes:
        path: absolute; exists and is writable (on rank 0).
        previous: ``run.json`` of the run that this one continues, or ``{}``.
        is_writer: whether this process (rank 0) writes files.
    """

    path: Path
    previous: dict[str, Any] = field(default_factory=dict)
    is_writer: bool = True

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @classmethod
    def prepare(
        cls, exp_manager: Mapping[str, Any], default_name: str = "default", rank: int | None = None
    ) -> RunDirectory:
        """Resolve, check and create the directory. Cheap, and meant to come before anything heavy is loaded.

        Only rank 0 looks and writes; the others would see what rank 0 has just begun.

        Raises:
            OutputError: the place cannot be written to; it holds an earlier run and ``resume_if_exists`` is false; or
                ``resume_if_exists`` finds no checkpoint and ``resume_ignore_no_checkpoint`` is false.
        """
        path = resolve_run_directory(exp_manager, default_name)
        rank = process_rank() if rank is None else rank
        if rank != 0:
            return cls(path=path, is_writer=False)
        _check_writable(path)
        previous = read_state(path)
        found = _describe_contents(path, previous)
        resume = bool(exp_manager.get("resume_if_exists"))
        if _is_running(previous):
            job = (previous.get("slurm") or {}).get("job")
            owner = f"Slurm job {job}" if job else f"process {previous.get('pid')} on this machine"
            raise OutputError(
                f"{path} is in use: {owner} has been writing to it since "
                f"{previous.get('started')}. Wait for it, stop it, or choose another exp_manager.explicit_log_dir."
            )
        if found and not resume:
            raise OutputError(
                f"{path} already holds {found}. Nothing was changed. Continue it with "
                "exp_manager.resume_if_exists=True, choose another exp_manager.explicit_log_dir, or remove the "
                "directory to start over."
            )
        if resume and not (checkpoint_files(path / "checkpoints") or old_checkpoint_files(path / "checkpoints")):
            if not exp_manager.get("resume_ignore_no_checkpoint"):
                raise OutputError(
                    f"exp_manager.resume_if_exists=True, but {path / 'checkpoints'} holds no checkpoint"
                    f"{f' ({path} holds {found})' if found else ''}. To start from step 0 there, add "
                    "exp_manager.resume_ignore_no_checkpoint=True; to start a new run, leave out resume_if_exists."
                )
            previous = {}
        for folder in FOLDERS:
            (path / folder).mkdir(exist_ok=True)
        for place in (path, path / "checkpoints", path / "samples", path / "export"):
            remove_leftovers(place)  # of a run that was killed
        return cls(path=path, previous=previous)

    def write_config(self, cfg: Any) -> None:
        """Write ``config.yaml``: the configuration with every reference resolved."""
        if not self.is_writer:
            return
        from omegaconf import OmegaConf

        write_text_atomically(self.path / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))

    def changed_keys(self, cfg: Any) -> dict[str, tuple[Any, Any]]:
        """Keys whose value differs from the ``config.yaml`` already here: ``{dotted key: (there, now)}``.

        Call it before :meth:`write_config`, to tell the user of a resumed run what is no longer the same. What says
        where the run is and that it resumes is left out.
        """
        from omegaconf import OmegaConf

        try:
            there = _flatten(read_yaml(self.path / "config.yaml"))
        except (OSError, ValueError):
            return {}
        now = _flatten(OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(cfg, resolve=True))))
        return {
            key: (there.get(key), now.get(key))
            for key in sorted({*there, *now})
            if there.get(key) != now.get(key) and not key.startswith(_HOW_TO_RESUME)
        }

    def begin(self, argv: Sequence[str] | None = None) -> None:
        """Write ``run.json`` with status ``running``, the command line and the versions of what computes."""
        if not self.is_writer:
            return
        history = list(self.previous.get("history", []))
        if self.previous:
            history.append({key: self.previous.get(key) for key in ("status", "started", "finished", "step")})
        job = SlurmJob.from_environment(os.environ)
        self._write_state(
            {
                "status": "running",
                "started": _now(),
                "finished": None,
                "step": None,
                "command": list(sys.argv if argv is None else argv),
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "slurm": None if job is None else {"job": job.job_id, "restarts": job.restarts, "nodes": job.nodes},
                "python": platform.python_version(),
                "platform": platform.platform(),
                "packages": package_versions(),
                "history": history,
            }
        )

    def steps_before(self) -> list[int | None]:
        """Optimizer steps at the end of each earlier run in this directory, oldest first; None where it was killed."""
        return [entry.get("step") for entry in (*self.previous.get("history", []), self.previous) if entry]

    def finish(self, status: str = "finished", **more: Any) -> None:
        """Record how it ended: ``finished``, ``interrupted`` or ``failed``; ``more`` (``step=…, error=…``) is added."""
        if not self.is_writer:
            return
        self._write_state({**read_state(self.path), "status": status, "finished": _now(), **more})

    def _write_state(self, state: dict[str, Any]) -> None:
        text = json.dumps(state, indent=2, ensure_ascii=False) + "\n"
        try:
            write_text_atomically(self.path / STATE_FILE, text)
        except OSError as error:
            if error.errno not in FULL_DISK or not (self.path / STATE_FILE).exists():
                raise
            # no room for a second file: how the run ended is worth more than the old text in the block that is there
            with open(self.path / STATE_FILE, "r+", encoding="utf-8") as file:
                file.write(text)
                file.truncate()


def read_state(path: Path) -> dict[str, Any]:
    """``run.json`` of a directory; ``{}`` if there is none or it is unreadable."""
    try:
        state = parse_json(read_bytes(path / STATE_FILE))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def checkpoint_files(folder: Path) -> list[tuple[int, Path]]:
    """``(step, its folder)`` of the complete checkpoints in ``checkpoints/``, oldest first."""
    if not folder.is_dir():
        return []
    matches = ((CHECKPOINT_PATTERN.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
    return sorted((int(match.group(1)), file) for match, file in matches if match)


def old_checkpoint_files(folder: Path) -> list[Path]:
    """Checkpoints of earlier versions of this program, single files, which this one does not read; oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if OLD_CHECKPOINT_PATTERN.fullmatch(path.name))


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


def package_versions() -> dict[str, str]:
    """Versions of the packages whose numbers end up in the results; those not installed are left out."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _check_writable(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        raise OutputError(
            f"the results directory {path} cannot be written to: {error.strerror or error}. Give a place that can, "
            "with exp_manager.explicit_log_dir=..."
        ) from error


def _describe_contents(path: Path, previous: Mapping[str, Any]) -> str:
    """What an earlier run left that is worth keeping, in words; empty if it did not get that far."""
    checkpoints = [file for _, file in checkpoint_files(path / "checkpoints")]
    checkpoints = checkpoints or old_checkpoint_files(path / "checkpoints")
    rows = _rows(path / "metrics.csv")
    if not (checkpoints or rows or (path / "export").is_dir()):
        return ""  # it stopped at its configuration or data: nothing to lose, so correcting the command is enough
    status = str(previous.get("status", ""))
    name = {"finished": "a finished run", "interrupted": "an interrupted run", "failed": "a failed run"}.get(status)
    parts = [f"{rows} step{'s' if rows != 1 else ''} in metrics.csv"] if rows else []
    if checkpoints:
        parts.append(f"last checkpoint {checkpoints[-1].name}")
    if previous.get("finished"):
        parts.append(f"ended {previous['finished']}")
    return (name or "an unfinished run") + (f" ({', '.join(parts)})" if parts else "")


def _rows(path: Path) -> int:
    try:
        with open(path, "rb") as file:
            return max(sum(1 for line in file if line.strip()) - 1, 0)
    except OSError:
        return 0


def _is_running(state: Mapping[str, Any]) -> bool:
    """Whether the process that claimed the directory is still alive: its Slurm job, or itself on this machine."""
    if state.get("status") != "running":
        return False
    job = (state.get("slurm") or {}).get("job")
    if job is not None:
        mine = SlurmJob.from_environment(os.environ)
        if mine is not None and mine.job_id == job:
            return False  # an earlier start of this very job, which was put back into the queue
        running = SlurmJob(str(job)).is_running()  # on whatever node
        if running is not None:
            return running
    if state.get("host") != socket.gethostname():
        return False
    pid = state.get("pid")
    if not isinstance(pid, int) or pid <= 0 or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _looks_like_python(pid)


def _looks_like_python(pid: int) -> bool:
    """Process numbers are reused (every container starts at 1): where /proc tells, trust only a Python process."""
    try:
        return b"python" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def sync_directory(path: Path) -> None:
    # A rename is on disk only when the directory is; some file systems cannot sync one, which must not stop a run.
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        with suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def remove_if_not_begun(path: Path, files: Iterable[str] = ()) -> None:
    """Take away what a start that failed before its run began has put into ``path``: ``files``, and empty folders."""
    if path.is_dir() and not (path / STATE_FILE).exists():
        for name in files:
            (path / name).unlink(missing_ok=True)
        for place in (*(path / folder for folder in FOLDERS), path):
            with suppress(OSError):  # there is something in it: somebody else's
                place.rmdir()
