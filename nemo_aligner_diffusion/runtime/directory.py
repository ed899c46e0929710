"""The directory of one run: where it is, whether it may be used, and what was done in it. Imports no torch."""

from __future__ import annotations

import datetime
import errno
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import socket
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_aligner_diffusion.errors import OutputError, first_line
from nemo_aligner_diffusion.formats.files import parse_json, read_bytes
from nemo_aligner_diffusion.formats.yaml_reader import read_yaml
from nemo_aligner_diffusion.keys import flatten
from nemo_aligner_diffusion.runtime.claim import Claim
from nemo_aligner_diffusion.runtime.files import atomic_path, remove_leftovers, write_atomic
from nemo_aligner_diffusion.runtime.settings import RunDirectorySettings
from nemo_aligner_diffusion.runtime.slurm import SlurmJob

log = logging.getLogger(__name__)

STATE_FILE = "run.json"
CONFIG_FILE = "config.yaml"
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNUSABLE = (*_FULL_DISK, errno.EROFS, errno.EIO, errno.ESTALE)
_DENIED = (errno.EACCES, errno.EPERM)
# what libraries that are not written in Python make of these
_UNUSABLE_WORDS = (
    *("No space left on device", "os error 28", "Disk quota exceeded", "File too large"),
    *("Read-only file system", "os error 30"),
)
_STATE_TYPES: dict[str, Any] = {
    **dict.fromkeys(("status", "started", "host"), str),
    **dict.fromkeys(("finished", "error"), (str, type(None))),
    "pid": int,
    **dict.fromkeys(("step", "threads"), (int, type(None))),
    "slurm": (dict, type(None)),
    "history": list,
}
# beginnings of keys that are no change of a run: where it is, that it resumes, why its family was chosen
_NO_CHANGE = (
    *("exp_manager.resume_", "exp_manager.explicit_log_dir", "exp_manager.exp_dir", "exp_manager.version"),
    "model.family_because",
)
CHECKPOINT_PATTERN = re.compile(r"step_(\d+)")
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


def resolve_run_directory(section: RunDirectorySettings, now: datetime.datetime | None = None) -> Path:
    """The run directory as NeMo's ``exp_manager`` chooses it.

    ``explicit_log_dir`` as it is; else ``exp_dir/name/version`` with ``exp_dir`` ``./nemo_experiments`` by default and
    ``version`` the date and time. With ``resume_if_exists`` there is no version folder, so that the next run finds it.
    """
    if section.explicit_log_dir:
        return Path(section.explicit_log_dir).expanduser().absolute()
    directory = Path(section.exp_dir or "nemo_experiments").expanduser() / section.name
    version = section.version or os.environ.get("NEMO_EXPM_VERSION")
    if not version and not section.resume_if_exists:
        version = (now or datetime.datetime.now()).strftime("%Y-%m-%d_%H-%M-%S")
    return (directory / version if version else directory).absolute()


@dataclass
class RunDirectory:
    """A directory that has been checked and claimed for this run.

    Attributes:
        path: absolute; exists and is writable (on rank 0).
        previous: ``run.json`` of the run that this one continues, or ``{}``.
        is_writer: whether this process (rank 0) writes files.
        has_begun: whether anything of this run is in it.
    """

    path: Path
    previous: dict[str, Any] = field(default_factory=dict)
    is_writer: bool = True
    has_begun: bool = field(default=False, init=False)
    _claim: Claim | None = None
    _made: list[Path] = field(default_factory=list)  # folders that were not there, innermost first

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
        cls, path: Path, resume: bool = False, may_start_anew: bool = False, is_writer: bool = True
    ) -> RunDirectory:
        """Check, create and claim the directory. Cheap, and meant to come before anything heavy is loaded.

        Only rank 0 looks and writes; the others would see what rank 0 has just begun.

        Args:
            path: from :func:`resolve_run_directory`.
            resume: go on with what is there (``exp_manager.resume_if_exists``).
            may_start_anew: where there is nothing to resume (``exp_manager.resume_ignore_no_checkpoint``).
            is_writer: whether this is rank 0.

        Raises:
            OutputError: the place cannot be written to; another run has it; it holds an earlier run and ``resume`` is
                false; or ``resume`` finds no checkpoint and ``may_start_anew`` is false.
        """
        if not is_writer:
            return cls(path=path, is_writer=False)
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        directory = cls(path, _claim=_claim(path), _made=made)
        try:
            directory._check_contents(resume, may_start_anew)
        except BaseException:
            directory.release()
            raise
        return directory

    def _check_contents(self, resume: bool, may_start_anew: bool) -> None:
        path, previous = self.path, read_state(self.path)
        found = _describe_contents(path, previous)
        if found and not resume:
            raise OutputError(
                f"{path} already holds {found}. Nothing was changed. Continue it with "
                "exp_manager.resume_if_exists=True, choose another exp_manager.explicit_log_dir, or remove the "
                "directory to start over."
            )
        if resume and not checkpoint_files(self.checkpoints):
            if not may_start_anew:
                raise OutputError(
                    f"exp_manager.resume_if_exists=True, but {self.checkpoints} holds no checkpoint"
                    f"{f' ({path} holds {found})' if found else ''}. To start from step 0 there, add "
                    "exp_manager.resume_ignore_no_checkpoint=True; to start a new run, leave out resume_if_exists."
                )
            previous = {}
        if resume and not previous and (path / STATE_FILE).exists() and checkpoint_files(self.checkpoints):
            log.warning("%s cannot be read: what it said of earlier runs is lost", path / STATE_FILE)
        self.previous = previous

    def release(self, files: Iterable[str] = ()) -> None:
        """Give the directory back; a run that has not begun leaves no trace.

        Args:
            files: names of what a start that failed before its run began has put there.
        """
        if self._claim is None:
            return
        if not self.has_begun:
            for name in files:
                path = self.path / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self._claim.release()
        self._claim = None
        if not self.has_begun:
            for folder in self._made:
                with suppress(OSError):  # there is something in it: somebody else's
                    folder.rmdir()

    def changed_keys(self, config: str) -> dict[str, tuple[Any, Any]]:
        """Keys whose value differs from the ``config.yaml`` already here: ``{dotted key: (there, now)}``.

        Call it before :meth:`begin`, to tell the user of a resumed run what is no longer the same. What says where the
        run is and that it resumes is left out, and what an earlier version had no key for.

        Args:
            config: YAML, as for :meth:`begin`.
        """
        from omegaconf import OmegaConf

        path = self.path / CONFIG_FILE
        if not path.exists():
            return {}
        try:
            found = read_yaml(path)
        except (OSError, ValueError) as error:
            log.warning("%s cannot be read (%s): whether settings have changed is not known", path, first_line(error))
            return {}
        trees: list[Any] = [found, OmegaConf.to_container(OmegaConf.create(config))]
        there, now = (flatten(tree, dotted=True) if isinstance(tree, dict) else {} for tree in trees)
        return {
            key: (there.get(key), now.get(key))
            for key in sorted({*there, *now})
            if there.get(key) != now.get(key) and not key.startswith(_NO_CHANGE)
            if not _same_path(there.get(key), now.get(key))  # as an earlier version wrote it
            if key in there or now.get(key)  # a key that an earlier version did not know, and that does nothing
        }

    def begin(self, config: str, argv: Sequence[str] | None = None, threads: int | None = None) -> None:
        """Write ``config.yaml`` and ``run.json`` with status ``running``, the command line and versions.

        Args:
            config: YAML.
            threads: of this process, which a start that resumes takes, too: another number rounds differently.
        """
        self.has_begun = True
        if not self.is_writer:
            return
        for folder in (self.checkpoints, self.samples):
            folder.mkdir(exist_ok=True)
        for folder in (self.path, self.checkpoints, self.samples, self.export):
            remove_leftovers(folder)  # of a run that was killed
        write_atomic(self.path / CONFIG_FILE, config)
        history = list(self.previous.get("history", []))
        if self.previous:
            history.append({key: self.previous.get(key) for key in ("status", "started", "finished", "step")})
        self._write_state(
            {
                "status": "running",
                **_holder(),
                "finished": None,
                "step": None,
                "command": list(sys.argv if argv is None else argv),
                "python": platform.python_version(),
                "platform": platform.platform(),
                "threads": threads,
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
            with atomic_path(self.path / STATE_FILE) as temporary:
                temporary.write_text(text, encoding="utf-8")
        except OSError as error:
            if error.errno not in _FULL_DISK or not (self.path / STATE_FILE).exists():
                raise
            # no room for a second file: how the run ended is worth more than the old text in the block that is there
            with open(self.path / STATE_FILE, "r+", encoding="utf-8") as file:
                file.write(text)
                file.truncate()


def _same_path(typed: Any, absolute: Any) -> bool:
    texts = isinstance(typed, str) and isinstance(absolute, str)
    return texts and os.path.abspath(os.path.expanduser(typed)) == absolute


def read_state(path: Path) -> dict[str, Any]:
    """``run.json`` of a directory; ``{}`` if there is none or it is unreadable. What is of another type is left out."""
    try:
        state = parse_json(read_bytes(path / STATE_FILE))
    except (OSError, ValueError):
        return {}
    if not isinstance(state, dict):
        return {}
    state = {key: value for key, value in state.items() if isinstance(value, _STATE_TYPES.get(key, object))}
    if "history" in state:
        state["history"] = [entry for entry in state["history"] if isinstance(entry, dict)]
    return state


def checkpoint_files(folder: Path) -> list[tuple[int, Path]]:
    """``(step, its folder)`` of the complete checkpoints in ``checkpoints/``, oldest first."""
    if not folder.is_dir():
        return []
    matches = ((CHECKPOINT_PATTERN.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
    return sorted((int(match.group(1)), file) for match, file in matches if match)


def package_versions() -> dict[str, str]:
    """Versions of the packages whose numbers end up in the results; those not installed are left out."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _claim(path: Path) -> Claim:
    try:
        while True:
            path.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # another start that failed has just taken the folder away
                return Claim(path, _holder())
    except OSError as error:
        raise OutputError(
            f"the results directory {path} cannot be written to: {error.strerror or error}. Give a place that can, "
            "with exp_manager.explicit_log_dir=..."
        ) from error


def _holder() -> dict[str, Any]:
    """This process, as ``run.json`` and the claim of a directory name it."""
    job = SlurmJob.from_environment(os.environ)
    return {
        "started": _now(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "slurm": None if job is None else {"job": job.job_id, "restarts": job.restarts, "nodes": job.nodes},
    }


def unusable_disk(error: BaseException, folder: Path | None) -> OutputError | None:
    """What to tell the user if this error is a disk that is full, read-only or failing, whatever library met it.

    Args:
        folder: the run directory; any failure to write there counts.
    """
    link: BaseException | None = error
    while link is not None:
        number, file = (link.errno, link.filename) if isinstance(link, OSError) else (None, None)
        ours = folder is not None and isinstance(file, str) and Path(file).is_relative_to(folder)
        if number in _UNUSABLE or (ours and number in _DENIED) or any(words in str(link) for words in _UNUSABLE_WORDS):
            return OutputError(
                f"{file or folder or 'the disk'} could not be written: {first_line(link)}. Checkpoints written before "
                "are intact; make room, or the place writable, and continue with exp_manager.resume_if_exists=True."
            )
        link = link.__cause__ or link.__context__
    return None


def _describe_contents(path: Path, previous: Mapping[str, Any]) -> str:
    """What an earlier run left that is worth keeping, in words; empty if it did not get that far."""
    checkpoints = [file for _, file in checkpoint_files(path / "checkpoints")]
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


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
