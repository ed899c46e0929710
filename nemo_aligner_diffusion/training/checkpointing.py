"""Resumable checkpoints: what was trained and the state of training, nothing of the frozen base.

A checkpoint is written at the end of an optimizer step, into ``checkpoints/step_NNNNNN.ckpt``; ``checkpoints/last``
names the newest. It holds the trained parameters, the optimizer, the schedule, Lightning's loops, the callbacks
(EMA among them) and the random state of each rank, and loads with ``weights_only=True``. The noise of a step is keyed
by (seed, step, sample), and the data position is ``step * global_batch_size``: neither needs saving.
"""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint

from nemo_aligner_diffusion.errors import CheckpointError, OutputError
from nemo_aligner_diffusion.training.run_directory import (
    atomic_path,
    checkpoint_files,
    write_text_atomically,
)

log = logging.getLogger(__name__)

LAST_MARKER = "last"
SCORES_FILE = "scores.json"
_KEY = "nemo_aligner_diffusion"
# config.yaml holds the settings; as objects in a checkpoint they would need an unsafe load
_SETTINGS = (
    "hyper_parameters",
    "hparams_name",
    "hparams_type",
    "datamodule_hyper_parameters",
    "datamodule_hparams_name",
    "datamodule_hparams_type",
)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes straight to a temporary neighbour, syncs and renames; reads tensors and plain values only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                torch.save(checkpoint, temporary)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            raise OutputError(
                f"the checkpoint {path} could not be written: {error}. Is the disk full? Earlier checkpoints are "
                "intact; make room and continue with exp_manager.resume_if_exists=True."
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return torch.load(path, map_location="cpu", weights_only=True)


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint that can be read.

    Attributes:
        path: give it to ``trainer.fit(ckpt_path=...)``.
        step: optimizer steps it has behind it; ``step * global_batch_size`` samples are consumed.
        shapes: of the trained parameters, by name.
        skipped: newer checkpoints that could not be read, with the reason.
    """

    path: Path
    step: int
    shapes: Mapping[str, tuple[int, ...]]
    skipped: tuple[tuple[Path, str], ...] = ()


def find_resume_point(folder: Path) -> ResumePoint | None:
    """The newest checkpoint in ``checkpoints/`` that is undamaged, or None if there is none at all.

    A damaged one (truncated, altered, not ours) is passed over with a warning, for the one before.

    Raises:
        CheckpointError: there are checkpoints, and none of them can be read.
    """
    skipped: list[tuple[Path, str]] = []
    for _, path in reversed(checkpoint_files(folder)):
        try:
            step, shapes = _inspect(path)
        except Exception as error:  # whatever a damaged file makes zipfile, pickle and torch raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            skipped.append((path, reason))
            continue
        for damaged, reason in skipped:
            log.warning("%s cannot be read (%s); resuming from %s instead", damaged, reason, path.name)
        return ResumePoint(path=path, step=step, shapes=shapes, skipped=tuple(skipped))
    if skipped:
        listed = "; ".join(f"{path.name}: {reason}" for path, reason in skipped)
        raise CheckpointError(
            f"none of the {len(skipped)} checkpoints in {folder} can be read ({listed}). Restore one, or remove the "
            "folder and start again with exp_manager.resume_ignore_no_checkpoint=True."
        )
    return None


def _inspect(path: Path) -> tuple[int, dict[str, tuple[int, ...]]]:
    with zipfile.ZipFile(path) as archive:  # torch.save writes a zip with check sums, which torch.load(mmap) skips
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"its member {damaged} is damaged")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if _KEY not in checkpoint:
        raise ValueError("it was not written by this program")
    return int(checkpoint["global_step"]), {n: tuple(t.shape) for n, t in checkpoint["state_dict"].items()}


class TrainingCheckpoint(Checkpoint):
    """Saves every ``every_n_optimizer_steps``, at the last step, and where the run is stopped.

    Resuming continues bit for bit on one process: the callback also carries the random state from the end of one
    training batch to the beginning of the next, past validation and whatever else draws random numbers in between.

    Lightning puts it behind all other callbacks, so metrics are written and averages updated before a step is saved.
    It puts :class:`AtomicCheckpointIO` into the strategy and sets ``strict_loading = False`` on the module, since the
    frozen base is not in the file; that every trained parameter *is*, with its shape, is checked in ``setup``.

    Args:
        folder: ``run_dir/checkpoints``.
        every_n_optimizer_steps: ``None``, 0 or negative: only at the end.
        keep_last_n: how many of the newest to keep; ``None``: all. At least two survive a damaged last one.
        save_top_k: keep besides these the best by validation reward (those of steps that were validated).
        resume: what :func:`find_resume_point` gave, if the fit resumes from it.
    """

    def __init__(
        self,
        folder: Path,
        every_n_optimizer_steps: int | None = None,
        keep_last_n: int | None = 2,
        save_top_k: int = 0,
        resume: ResumePoint | None = None,
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.every_n_optimizer_steps = every_n_optimizer_steps or 0
        self.keep_last_n = keep_last_n if keep_last_n is None or keep_last_n > 0 else None
        self.save_top_k = save_top_k
        self.resume = resume
        self._step = 0
        self._saved_step = -1
        self._random_state: torch.Tensor | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        pl_module.strict_loading = False
        if self.resume is not None:
            check_fits(self.resume, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        self._saved_step = self._step if self.resume is not None else -1
        if trainer.is_global_zero:
            for step, path in checkpoint_files(self.folder):
                if step > self._step:  # damaged, or of a past that this run does not continue: keep, but never load
                    path.rename(path.with_suffix(".ckpt.unused"))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._random_state is not None:
            _set_random_state(self._random_state, pl_module.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._random_state = _get_random_state(pl_module.device)
        step = trainer.global_step
        if step == self._step:
            return
        self._step = step
        due = self.every_n_optimizer_steps > 0 and step % self.every_n_optimizer_steps == 0
        if due or trainer.should_stop or 0 <= trainer.max_steps <= step:
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # the data ended before max_steps
        if trainer.global_step > 0 and trainer.global_step != self._saved_step:
            self.save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        reward = getattr(pl_module, "last_validation", {}).get("reward")
        if self.save_top_k <= 0 or reward is None or not trainer.is_global_zero or trainer.sanity_checking:
            return
        if trainer.global_step == self._saved_step:
            scores = {**self._scores(), trainer.global_step: float(reward)}
            write_text_atomically(self.folder / SCORES_FILE, json.dumps(scores, indent=1) + "\n")
            self._prune()

    def save(self, trainer: pl.Trainer) -> Path:
        """Write the checkpoint of the current optimizer step; call it on all ranks."""
        step = trainer.global_step
        path = self.folder / f"step_{step:06d}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        self._saved_step = step
        if trainer.is_global_zero:
            write_text_atomically(self.folder / LAST_MARKER, path.name + "\n")
            self._prune()
            log.info("saved %s", path)
        return path

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        trained = set(_trained_shapes(pl_module))
        checkpoint["state_dict"] = {name: t for name, t in checkpoint["state_dict"].items() if name in trained}
        for key in _SETTINGS:
            checkpoint.pop(key, None)
        mine = self._random_state if self._random_state is not None else _get_random_state(pl_module.device)
        states = trainer.strategy.all_gather(mine.to(pl_module.device)).reshape(trainer.world_size, -1)
        checkpoint[_KEY] = {"format": 1, "world_size": trainer.world_size, "random_states": states.cpu()}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        saved = checkpoint.get(_KEY, {})
        states = saved.get("random_states")
        if states is None:
            return
        if saved["world_size"] == trainer.world_size:
            self._random_state = states[trainer.global_rank].clone()
        elif trainer.is_global_zero:
            log.warning(
                "resuming on %d processes what ran on %d: not bit for bit the same run",
                trainer.world_size,
                saved["world_size"],
            )

    def _scores(self) -> dict[int, float]:
        try:
            return {
                int(step): float(score) for step, score in json.loads((self.folder / SCORES_FILE).read_text()).items()
            }
        except (OSError, ValueError):
            return {}

    def _prune(self) -> None:
        if self.keep_last_n is None:
            return
        files = checkpoint_files(self.folder)
        scores = self._scores() if self.save_top_k > 0 else {}
        ranked = sorted((step for step, _ in files if step in scores), key=lambda step: scores[step], reverse=True)
        kept = {step for step, _ in files[-self.keep_last_n :]} | set(ranked[: self.save_top_k])
        for step, path in files:
            if step not in kept:
                path.unlink(missing_ok=True)


def check_fits(resume: ResumePoint, module: torch.nn.Module) -> None:
    """Compare a checkpoint with what this run trains.

    Raises:
        CheckpointError: naming the parameters that are missing, extra, or of another shape.
    """
    expected = _trained_shapes(module)
    missing = sorted(set(expected) - set(resume.shapes))
    extra = sorted(set(resume.shapes) - set(expected))
    other = [
        f"{name} is {list(resume.shapes[name])} there and {list(shape)} here"
        for name, shape in expected.items()
        if name in resume.shapes and tuple(resume.shapes[name]) != shape
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        for what, names in (("not in it", missing), ("not trained here", extra), ("of another shape", other))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"the checkpoint {resume.path} does not fit this configuration: {'; '.join(problems)}. Resume with the "
            "settings in its config.yaml (model.peft above all), or give another exp_manager.explicit_log_dir."
        )


def _trained_shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    named = module.named_parameters(remove_duplicate=False)  # a shared parameter has several names in a state dict
    return {name: tuple(parameter.shape) for name, parameter in named if parameter.requires_grad}


def _get_random_state(device: torch.device) -> torch.Tensor:
    """torch's generators as one vector of bytes: the host's, then the device's if it is CUDA."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def _set_random_state(state: torch.Tensor, device: torch.device) -> None:
    size = torch.get_rng_state().numel()
    torch.set_rng_state(state[:size].clone())
    if device.type == "cuda" and state.numel() > size:
        torch.cuda.set_rng_state(state[size:].clone(), device)
