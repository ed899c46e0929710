"""Resumable checkpoints: what was trained and the state of training, nothing of the frozen base.

A checkpoint is written at the end of an optimizer step, into the folder ``checkpoints/step_NNNNNN``;
``checkpoints/last`` names the newest. It holds the trained parameters, the optimizer's state by parameter name, the
schedule, Lightning's loops, the callbacks (EMA among them) and the random state of each rank, as whole tensors
under plain names and a JSON document (:mod:`.io`), so it can be read under any layout. The noise of a step
is keyed by (seed, step, sample), and the data position is ``step * global_batch_size``: neither needs saving.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from torch.optim.lr_scheduler import LambdaLR

from nemo_aligner_diffusion.errors import OutputError
from nemo_aligner_diffusion.parallel.broadcast import gather
from nemo_aligner_diffusion.parallel.strategy import layout_of
from nemo_aligner_diffusion.runtime.directory import checkpoint_files
from nemo_aligner_diffusion.runtime.files import remove_leftovers, write_atomic
from nemo_aligner_diffusion.training.checkpoints.files import mark_last, remove
from nemo_aligner_diffusion.training.checkpoints.io import FolderCheckpointIO
from nemo_aligner_diffusion.training.checkpoints.resume import RUN_STATE, ResumePoint, trained_parameters
from nemo_aligner_diffusion.training.checkpoints.tree import WEIGHTS
from nemo_aligner_diffusion.training.optimizers import restored_state, saved_state

log = logging.getLogger(__name__)

SCORES_FILE = "scores.json"
# how long the processes of a failing run wait for a save in the background, of which a dead process may be part
_PATIENCE_SECONDS = 5.0


class TrainingCheckpoint(Checkpoint):
    """Saves every ``every_n_optimizer_steps``, at the last step, and where the run is stopped.

    Resuming under the same layout continues bit for bit: the callback also carries the random state from the end of
    one training batch to the beginning of the next, past validation and whatever else draws random numbers in between.

    Lightning puts it behind all other callbacks, so metrics are written and averages updated before a step is saved.
    It puts :class:`.FolderCheckpointIO` into the strategy and sets ``strict_loading = False`` on the module, since the
    frozen base is not in the checkpoint; that every trained parameter *is*, :func:`.check_fits` says before.

    Args:
        folder: ``run_dir/checkpoints``.
        every_n_optimizer_steps: ``None``, 0 or negative: only at the end.
        keep_last_n: how many of the newest to keep; ``None``: all. At least two survive a damaged last one.
        save_top_k: keep besides these the best by validation reward (those of steps that were validated); -1: all.
        resume: what :func:`find_resume_point` gave, if the fit resumes from it.
        async_save: go on training while a checkpoint is written. A save that fails stops the run all the same, at the
            next optimizer step that finds out.
    """

    def __init__(
        self,
        folder: Path,
        every_n_optimizer_steps: int | None = None,
        keep_last_n: int | None = 2,
        save_top_k: int = 0,
        resume: ResumePoint | None = None,
        async_save: bool = False,
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.every_n_optimizer_steps = every_n_optimizer_steps or 0
        self.keep_last_n = keep_last_n if keep_last_n is None or keep_last_n > 0 else None
        self.save_top_k = save_top_k
        self.resume = resume
        self.async_save = async_save
        self._io: FolderCheckpointIO | None = None
        self._step = 0
        self._saved_step = -1 if resume is None else resume.step
        self._random_state: torch.Tensor | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._io = FolderCheckpointIO(pl_module, self.async_save)
            trainer.strategy.checkpoint_io = self._io
            pl_module.strict_loading = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # optimizers number their parameters in an order of their own; checkpoints name them
        for optimizer in trainer.optimizers:
            optimizer.register_load_state_dict_pre_hook(partial(_numbered, pl_module))
        if trainer.is_global_zero:
            self._tidy(self.resume.step if self.resume is not None else 0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        for config in trainer.lr_scheduler_configs if self.resume is not None else ():
            _follow_schedule(config.scheduler)  # type: ignore[arg-type]

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
        assert self._io is not None
        if self._io.is_writing and trainer.strategy.reduce_boolean_decision(self._io.is_written, all=True):
            self._complete(trainer)
        due = self.every_n_optimizer_steps > 0 and step % self.every_n_optimizer_steps == 0
        if due or trainer.should_stop or 0 <= trainer.max_steps <= step:
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # the data ended before max_steps
        if trainer.global_step > 0 and trainer.global_step != self._saved_step:
            self.save(trainer)
        self._complete(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._io is None or not self._io.is_writing:
            return
        try:
            self._io.wait(_PATIENCE_SECONDS if trainer.world_size > 1 else None)
        except OutputError as error:
            log.error("%s", error)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        reward = getattr(pl_module, "last_validation", {}).get("reward")
        if self.save_top_k <= 0 or reward is None or not trainer.is_global_zero:
            return
        if trainer.global_step == self._saved_step:
            scores = {**self._scores(), trainer.global_step: float(reward)}
            write_atomic(self.folder / SCORES_FILE, json.dumps(scores, indent=1) + "\n")
            self._prune()

    def save(self, trainer: pl.Trainer) -> Path:
        """Write the checkpoint of the current optimizer step, or begin to; call it on all ranks.

        Raises:
            OutputError: this one, or the one before in the background, could not be written.
        """
        self._complete(trainer)
        step = trainer.global_step
        path = self.folder / f"step_{step:06d}"
        trainer.save_checkpoint(path, weights_only=False)  # by ParallelStrategy the plugin is called on all ranks
        self._saved_step = step
        if not self.async_save:
            self._complete(trainer)
        return path

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[WEIGHTS] = {name: parameter.detach() for name, parameter in trained_parameters(pl_module).items()}
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        checkpoint["optimizer_states"] = [
            _named(state, [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]])
            for state, optimizer in zip(checkpoint["optimizer_states"], trainer.optimizers, strict=True)
        ]
        # How many validations Lightning has counted depends on where a run was interrupted; nothing reads it, since
        # MissedValidation sees to those that are due.
        loop = checkpoint["loops"]["fit_loop"]
        checkpoint["loops"]["fit_loop"] = {k: v for k, v in loop.items() if not k.startswith("epoch_loop.val_loop.")}
        mine = self._random_state if self._random_state is not None else _get_random_state(pl_module.device)
        checkpoint[RUN_STATE] = {**_layout(trainer), "random_states": torch.stack(gather(mine))}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        _recount(checkpoint, trainer.accumulate_grad_batches)
        saved = checkpoint.get(RUN_STATE, {})
        states = saved.get("random_states")
        if states is None:
            return
        now = _layout(trainer)
        if {key: saved.get(key, False) for key in now} == now:
            self._random_state = states[trainer.global_rank].clone()
        elif trainer.is_global_zero:
            log.warning(
                "resuming on %s what ran on %s: not bit for bit the same run, because sums are made in another order "
                "and dropout, if there is any, draws anew",
                _in_words(now),
                _in_words(saved),
            )

    def _complete(self, trainer: pl.Trainer) -> None:
        """Wait for the last save and see that it succeeded, on all ranks; then older ones may go."""
        if self._io is not None:
            self._io.wait()
        if trainer.is_global_zero:
            self._prune()

    def _tidy(self, start: int) -> None:
        """What a run that was killed had begun and not finished, in whatever order it does it."""
        for leftover in remove_leftovers(self.folder):
            log.info("removed %s, which an earlier run had not finished writing", self.folder / leftover)
        for step, path in checkpoint_files(self.folder):
            if step > start:  # damaged, or of a past that this run does not continue: keep, but never load
                unused = path.with_name(f"{path.name}.unused")
                remove(unused)
                path.rename(unused)
        if self.resume is not None:
            mark_last(self.resume.path)
        self._prune()

    def _scores(self) -> dict[int, float]:
        try:
            return {
                int(step): float(score) for step, score in json.loads((self.folder / SCORES_FILE).read_text()).items()
            }
        except (OSError, ValueError):
            return {}

    def _prune(self) -> None:
        if self.keep_last_n is None or self.save_top_k < 0:
            return
        files = checkpoint_files(self.folder)
        scores = self._scores() if self.save_top_k > 0 else {}
        ranked = sorted((step for step, _ in files if step in scores), key=lambda step: scores[step], reverse=True)
        kept = {step for step, _ in files[-self.keep_last_n :]} | set(ranked[: self.save_top_k])
        for step, path in files:
            if step not in kept:
                remove(path)


def _named(state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """An optimizer's state with its parameters' names instead of their numbers."""
    return {
        "state": {names[number]: saved_state(slots) for number, slots in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }


def _numbered(module: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`_named`, for the order that ``optimizer`` has now.

    What the groups are set to (learning rate, decay, moments) is as the configuration has it now, not as it was saved.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    saved = {key: value for group in state["param_groups"] for key, value in group.items()}
    number = {name: index for index, name in enumerate(name for group in groups for name in group)}
    held = dict(module.named_parameters())
    return {
        **state,
        "state": {number[name]: restored_state(slots, optimizer, held[name]) for name, slots in state["state"].items()},
        "param_groups": [
            {**saved, **now, "params": [number[name] for name in group]}
            for now, group in zip(optimizer.param_groups, groups, strict=True)
        ],
    }


def _follow_schedule(scheduler: LambdaLR) -> None:
    """Have a restored schedule give the rates of the configuration, from the peaks that it says, at the step restored.

    Its state brings along the peaks of the run that saved it, and the rate that was next there.
    """
    groups = scheduler.optimizer.param_groups
    peaks = [group["initial_lr"] for group in groups]
    rates = [peak * factor(scheduler.last_epoch) for peak, factor in zip(peaks, scheduler.lr_lambdas, strict=True)]
    scheduler.load_state_dict({**scheduler.state_dict(), "base_lrs": peaks, "_last_lr": rates})
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate


def _recount(checkpoint: dict[str, Any], accumulation: int) -> None:
    """Have Lightning's count of micro-batches fit ``accumulation``, so many of them an optimizer step.

    Another layout or ``model.micro_batch_size`` changes it. By that count Lightning tells where an optimizer step ends
    and when to validate: with the old one the first step would see a part of its samples.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    more = checkpoint["global_step"] * accumulation - progress["total"]["ready"]
    for counts in (progress["total"], progress["current"]):
        for kind in counts:
            counts[kind] += more


def _layout(trainer: pl.Trainer) -> dict[str, Any]:
    layout = layout_of(trainer)
    return {"world_size": trainer.world_size, "tensor_parallel_size": layout.tensor, "fsdp": layout.fsdp}


def _in_words(layout: Mapping[str, Any]) -> str:
    size, tensor = layout.get("world_size", 1), layout.get("tensor_parallel_size", 1)
    more = [f"tensor parallelism {tensor}"] * (tensor > 1) + ["FSDP"] * bool(layout.get("fsdp"))
    words = f"{size} process{'es' if size != 1 else ''}"
    return f"{words} ({', '.join(more)})" if more else words


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
