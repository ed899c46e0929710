"""What surrounds a training run, whatever it trains: processes, directory, resuming, signals, requeueing, the end."""

from __future__ import annotations

import contextlib
import datetime
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch

from nemo_aligner_diffusion.errors import AlignerError, ConfigurationError
from nemo_aligner_diffusion.parallel.broadcast import gather, on_every_process
from nemo_aligner_diffusion.parallel.layout import Layout
from nemo_aligner_diffusion.parallel.strategy import ParallelStrategy
from nemo_aligner_diffusion.runtime.directory import RunDirectory
from nemo_aligner_diffusion.runtime.faults import RunWatch, began, explained, process_group_timeout
from nemo_aligner_diffusion.runtime.health import launch as launching
from nemo_aligner_diffusion.runtime.launch import is_launched, join
from nemo_aligner_diffusion.runtime.slurm import Requeue, lightning_plugins
from nemo_aligner_diffusion.training.callbacks.interruption import (
    Interrupted,
    Interruption,
    InterruptionCallback,
    RunTimer,
    run_then_close,
)
from nemo_aligner_diffusion.training.callbacks.metrics import build_loggers
from nemo_aligner_diffusion.training.callbacks.missed_validation import MissedValidation
from nemo_aligner_diffusion.training.checkpoints.callback import TrainingCheckpoint
from nemo_aligner_diffusion.training.checkpoints.resume import ResumePoint, find_resume_point
from nemo_aligner_diffusion.training.settings import ExperimentSettings, LoopSettings, ProgramSettings

log = logging.getLogger(__name__)


@dataclass
class RunFrame:
    """A run that has its processes and its directory: :meth:`open` it, build, :meth:`begin`, :meth:`carry_out`.

    Attributes:
        device: this process's.
        resume: the checkpoint to go on from, if any.
    """

    settings: ProgramSettings
    watch: RunWatch
    interruption: Interruption
    device: torch.device
    directory: RunDirectory
    resume: ResumePoint | None
    _requeue: Requeue | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._timer = RunTimer.from_settings(self.settings.exp_manager)

    @classmethod
    def open(
        cls,
        settings: ProgramSettings,
        watch: RunWatch,
        interruption: Interruption,
        enter: Callable[[str], None] = lambda phase: None,
    ) -> RunFrame:
        """Join the other processes; find the directory, and what it holds. Comes before anything heavy is loaded.

        Args:
            enter: told what the start has come to.

        Raises:
            ConfigurationError: nobody has started the other processes.
            OutputError, CheckpointError: the directory, or what is in it, cannot be used.
        """
        machine = settings.trainer
        if machine.world_size > 1 and not is_launched(os.environ):
            raise ConfigurationError(
                f"trainer.devices × trainer.num_nodes = {machine.world_size}, but no launcher has started the "
                "processes: start the program with torchrun or srun, or by its own command line, which starts "
                "them itself"
            )
        enter("process group")
        watch.phase("joining the process group")
        limit = process_group_timeout(settings.exp_manager.fault_tolerance)
        device = join(machine.lightning_devices, machine.num_nodes, machine.accelerator, limit)
        watch.joined()
        _agree_on_version(settings.exp_manager, watch)
        if _is_restart(watch):
            settings = settings.resuming()
        enter("run directory")
        directory = on_every_process(lambda: RunDirectory.prepare(settings.tree["exp_manager"], settings.name))
        resume = find_resume_point(directory.checkpoints) if settings.exp_manager.resume_if_exists else None
        if resume is not None and directory.is_writer:
            for key, (before, now) in directory.changed_keys(settings.tree).items():
                log.warning("resuming with %s = %s; it was %s", key, now, before)
        return cls(settings, watch, interruption, device, directory, resume)

    def begin(self) -> None:
        """Claim the directory, now that everything has been built."""
        self.directory.write_config(self.settings.tree)
        self.directory.begin()
        began(self.watch, self.directory)
        self._requeue = Requeue.from_config(self.settings.tree["exp_manager"], os.environ, self.directory.is_writer)
        self.interruption.patient = self._requeue is not None

    def callbacks(
        self, save_interval: int | None, validation_interval: int, validate_again: bool = False
    ) -> list[pl.Callback]:
        """What ends, saves, resumes and watches a fit; behind the callbacks of its own.

        Args:
            save_interval: optimizer steps between checkpoints; 0: only at the end; ``None``: there are none.
            validation_interval: optimizer steps between validations; 0: there are none.
            validate_again: see :class:`MissedValidation`.
        """
        checkpoint = None
        if save_interval is not None:
            checkpoint = TrainingCheckpoint(
                self.directory.checkpoints,
                every_n_optimizer_steps=save_interval or None,
                resume=self.resume,
                **self.settings.tree["exp_manager"]["checkpoint_callback_params"],
            )
        return [
            InterruptionCallback(self.interruption),
            MissedValidation(self.directory.path, validation_interval, always=validate_again),
            *([checkpoint] if checkpoint is not None else []),
            *([self._timer] if self._timer is not None else []),
            *self.watch.callbacks(),
        ]

    def trainer(
        self, loop: LoopSettings, layout: Layout, accumulation: int, callbacks: list[pl.Callback], validates: bool
    ) -> pl.Trainer:
        """Lightning's Trainer as all runs have it.

        Args:
            loop: the section that holds ``max_steps``, ``val_check_interval`` (optimizer steps) …
            accumulation: micro-batches an optimizer step.
        """
        machine, experiment = self.settings.trainer, self.settings.exp_manager
        limit = process_group_timeout(experiment.fault_tolerance)
        interval = loop.val_check_interval * accumulation if validates else 0
        return pl.Trainer(
            accelerator=machine.accelerator,
            devices=machine.lightning_devices,
            num_nodes=machine.num_nodes,
            precision=machine.lightning_precision,  # type: ignore[arg-type]
            strategy="auto" if layout.is_single else ParallelStrategy(layout, limit),
            max_steps=loop.max_steps,
            max_epochs=1,  # one pass of the loader is all passes over the samples
            accumulate_grad_batches=accumulation,
            gradient_clip_val=loop.gradient_clip_val or None,
            val_check_interval=interval or None,
            check_val_every_n_epoch=None,
            limit_val_batches=loop.limit_val_batches if interval else 0,
            num_sanity_val_steps=0,
            log_every_n_steps=machine.log_every_n_steps,
            logger=build_loggers(
                experiment, self.settings.name, self.directory.path, self.resume.step if self.resume is not None else 0
            ),
            callbacks=callbacks,
            plugins=lightning_plugins(),
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_checkpointing=any(isinstance(callback, TrainingCheckpoint) for callback in callbacks),
        )

    @property
    def cut_short(self) -> bool:
        """Whether training was ended before its time, by a signal or by ``exp_manager.max_time_per_run``."""
        return self.interruption.stopped_training or (self._timer is not None and self._timer.reached)

    def record(self, trainer: pl.Trainer, **figures: Any) -> None:
        """How the run ended, for ``run.json``."""
        out_of_time = self._timer is not None and self._timer.reached and trainer.global_step < trainer.max_steps
        status = "interrupted" if self.interruption.requested or out_of_time else "finished"
        self.directory.finish(status, step=trainer.global_step, **figures)

    def carry_out(
        self,
        trainer: pl.Trainer,
        max_steps: int,
        train: Callable[[], None],
        closing: list[Callable[[], None]],
        salvage: Callable[[], None] = lambda: None,
    ) -> int:
        """Train, close, and give this process's exit code.

        Args:
            max_steps: a run that has done so many is complete, and not put back into the queue.
            train: calls ``trainer.fit``.
            closing: what follows it: validation, export, :meth:`record`, report.
            salvage: saves what was learnt when an error of the user's, or of the numbers, has ended training.

        Raises:
            Interrupted: a signal came before training began; nothing has been closed.
        """
        try:
            steps = [self._marked(step) for step in closing]
            code = run_then_close(self.interruption, train, steps, lambda: self._leave(trainer, max_steps))
            if self.interruption.at_once:  # perhaps before it was recorded
                self.directory.finish("interrupted", step=trainer.global_step)
            code = code if self._requeue is None else self._requeue.exit_code(code)
            # one process says how it ended: at a status that is not 0, launchers end the others, perhaps at work still
            return code if trainer.is_global_zero else 0
        except Interrupted:
            self.directory.finish("interrupted")
            raise
        except Exception as error:
            with contextlib.suppress(OSError):  # the disk may be what failed
                self.directory.finish("failed", step=trainer.global_step, error=str(explained(error, self.directory)))
            if isinstance(error, AlignerError) and trainer.global_step > 0:
                with contextlib.suppress(Exception):
                    salvage()
            raise

    def _marked(self, step: Callable[[], None]) -> Callable[[], None]:
        """``step``, which tells the watch over ranks that it is under way: it may last longer than any training did."""

        @functools.wraps(step)
        def marked() -> None:
            self.watch.phase(step.__name__)
            step()

        return marked

    def _leave(self, trainer: pl.Trainer, max_steps: int) -> bool:
        """Whether the run goes on in another start of its Slurm job."""
        requeue = self._requeue
        ended = self.interruption.stopped_training or (self.cut_short and requeue is not None and requeue.on_max_time)
        if requeue is None or not ended or trainer.global_step >= max_steps:
            return False
        left = requeue.leave(
            self.interruption.reason or "exp_manager.max_time_per_run",
            lambda: self.directory.finish("interrupted", step=trainer.global_step),
            steps=[*self.directory.steps_before(), trainer.global_step],
        )
        if not self.interruption.at_once:  # else the processes stand at different places
            left = trainer.strategy.broadcast(left)
        if left:
            self.interruption.dismiss()
        return left


_LIGHTNING = ("pytorch_lightning", "lightning.pytorch", "lightning_fabric")
_PIPELINES = ("diffusers", "transformers")


def quiet() -> None:
    """Our own lines on the screen, and of the libraries only what concerns the user."""
    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("nemo_aligner_diffusion").setLevel(logging.INFO)
    _hush()


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Within, the libraries say only what concerns the user; for a run inside a program that logs as it likes."""
    levels = {name: logging.getLogger(name).level for name in (*_LIGHTNING, *_PIPELINES)}
    shown = [
        library for name in _PIPELINES if name in sys.modules
        and (library := sys.modules[name].utils.logging).is_progress_bar_enabled()
    ]  # fmt: skip
    try:
        with warnings.catch_warnings():
            _hush()
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for library in shown:
            library.enable_progress_bar()


def _hush() -> None:
    for noisy in _LIGHTNING:
        logging.getLogger(noisy).setLevel(logging.ERROR)
    for name in _PIPELINES:
        if name in sys.modules:
            library = sys.modules[name].utils.logging
            library.set_verbosity_error()
            library.disable_progress_bar()
    for pattern in (
        ".*does not have many workers.*",
        ".*isinstance.treespec.*",
        ".*IterableDataset.*__len__.*",
        ".*in eval mode at the start of training.*",  # frozen parts, on purpose
        ".*`srun` command is available.*",  # slurm.check_tasks says what matters
        ".*functional.all_gather is deprecated.*",  # Lightning's to mend
    ):
        warnings.filterwarnings("ignore", pattern)


def _agree_on_version(section: ExperimentSettings, watch: RunWatch) -> None:
    """A directory named after the time has one name in all processes, also after torchrun has started them again."""
    if section.explicit_log_dir or section.version or section.resume_if_exists:
        return
    mine = os.environ.get("NEMO_EXPM_VERSION") or launching.agree_on_version(
        watch.launch, datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    )
    os.environ["NEMO_EXPM_VERSION"] = gather(mine)[0]


def _is_restart(watch: RunWatch) -> bool:
    """Whether torchrun has started the processes again: then the run goes on in its own directory."""
    if watch.launch.restart == 0 or not launching.is_noted("began"):
        return False  # what a first attempt refused to touch, a second one does not touch either
    if watch.launch.rank == 0:
        log.warning("torchrun has started the processes again (restart %d): resuming this run", watch.launch.restart)
    return True
