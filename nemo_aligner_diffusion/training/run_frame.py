"""What surrounds a training run, whatever it trains: processes, directory, resuming, signals, requeueing, the end."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from nemo_aligner_diffusion.errors import AlignerError, first_line
from nemo_aligner_diffusion.parallel.broadcast import gather, on_every_process
from nemo_aligner_diffusion.parallel.layout import Layout
from nemo_aligner_diffusion.parallel.module import ParallelModule
from nemo_aligner_diffusion.parallel.strategy import LaunchedProcesses, ParallelStrategy
from nemo_aligner_diffusion.runtime.directory import RunDirectory, read_state, resolve_run_directory
from nemo_aligner_diffusion.runtime.join import AgentNotes, choose_threads, find_device, join
from nemo_aligner_diffusion.runtime.process import Process, left_over
from nemo_aligner_diffusion.runtime.signals import Interrupted, Interruption, run_then_close
from nemo_aligner_diffusion.runtime.slurm import Requeue
from nemo_aligner_diffusion.runtime.watch import RunWatch, explained, watched
from nemo_aligner_diffusion.training.callbacks.health import HealthCallback
from nemo_aligner_diffusion.training.callbacks.interruption import InterruptionCallback
from nemo_aligner_diffusion.training.callbacks.metrics import build_loggers
from nemo_aligner_diffusion.training.callbacks.missed_validation import MissedValidation
from nemo_aligner_diffusion.training.checkpoints.callback import TrainingCheckpoint
from nemo_aligner_diffusion.training.checkpoints.resume import ResumePoint, check_fits, check_moments, find_resume_point
from nemo_aligner_diffusion.training.settings import LoopSettings, ProgramSettings

log = logging.getLogger(__name__)

_BEGUN = "begun"  # a note for the next start by torchrun: this run's directory is in use


@dataclass
class RunFrame:
    """A run that has its processes and its directory: :meth:`open` it, build, :meth:`begin`, :meth:`carry_out`.

    Attributes:
        device: this process's.
        resume: the checkpoint to go on from, if any.
        inputs: names of files that were put into the directory before the run began.
        trainer: from :meth:`make_trainer`.
    """

    settings: ProgramSettings
    watch: RunWatch
    interruption: Interruption
    device: torch.device
    directory: RunDirectory
    resume: ResumePoint | None
    notes: AgentNotes
    inputs: list[str] = field(default_factory=list, init=False)
    trainer: pl.Trainer = field(init=False)
    _requeue: Requeue | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._ending = InterruptionCallback(self.interruption, self.settings.exp_manager.max_time_per_run)

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, settings: ProgramSettings, interruption: Interruption, enter: Callable[[str], None] = lambda phase: None
    ) -> Iterator[RunFrame]:
        """Join the other processes; find the directory, and what it holds. Comes before anything heavy is loaded.

        On leaving, the directory is given back; a run that has not begun leaves no trace there.

        Args:
            interruption: takes signals already.
            enter: called with the name of what the start has come to.

        Raises:
            OutputError, CheckpointError: the directory, or what is in it, cannot be used.
        """
        with watched(settings.trainer, settings.exp_manager) as watch:
            enter("process group")
            watch.phase("joining the process group")
            process = watch.process
            device = find_device(process, settings.trainer.lightning_devices, settings.trainer.accelerator)
            if message := left_over(process):
                log.warning("%s", message)
            join(process, device, watch)
            notes = AgentNotes(process)
            # one named after the time has one name in all processes, also after torchrun has started them again
            path = Path(notes.get("directory") or gather(str(resolve_run_directory(settings.exp_manager)))[0])
            if process.is_rank_zero:
                notes.set("directory", str(path))
            if _is_restart(process, notes):
                settings = settings.resuming()
            enter("run directory")
            section = settings.exp_manager
            resumes, anew = section.resume_if_exists, section.resume_ignore_no_checkpoint
            directory = on_every_process(lambda: RunDirectory.prepare(path, resumes, anew, process.is_rank_zero))
            inputs: list[str] = []
            threads = torch.get_num_threads()
            try:
                resume = find_resume_point(directory.checkpoints) if resumes else None
                before = directory.previous.get("threads") if resume is not None else None
                choose_threads(settings.trainer.threads, before, device, process)
                frame = cls(settings, watch, interruption, device, directory, resume, notes)
                inputs = frame.inputs
                if resume is not None:
                    on_every_process(frame._tell_of_changes)
                yield frame
            finally:
                torch.set_num_threads(threads)  # a program may make several runs, and work of its own
                directory.release(inputs)

    def _tell_of_changes(self) -> None:
        if not self.directory.is_writer:
            return
        changed = self.directory.changed_keys(self.settings.recorded())
        self.settings.check_resumes(changed)
        changed.pop("model.family", None)  # whose defaults it has: they are compared themselves
        for key, (before, now) in changed.items():
            log.warning("resuming with %s = %s; it was %s", key, now, before)
        if "model.seed" in changed:
            log.warning(
                "model.seed has changed: what is drawn at random and the order of the samples are the new seed's from "
                "here on; weights and moments go on from the checkpoint"
            )

    def begin(self, module: torch.nn.Module, optimizer: str) -> None:
        """Take the directory into use, now that everything has been built.

        Args:
            module: what is trained, still whole; the checkpoint must fit it.
            optimizer: ``model.optim.name``; it must be able to go on with the checkpoint's state.

        Raises:
            CheckpointError: it does not. Nothing has been written.
        """
        if self.resume is not None:
            check_fits(self.resume, module)
            check_moments(self.resume.optimizer, optimizer)
        self.directory.begin(self.settings.recorded(), threads=torch.get_num_threads())
        self.watch.directory = self.directory
        if self.directory.is_writer:
            self.notes.set(_BEGUN, "1")
            log.info("run directory: %s", self.directory.path)
        section = self.settings.exp_manager
        self._requeue = Requeue.for_this_run(section, section, self.directory.is_writer)
        self.interruption.patient = self._requeue is not None

    def make_trainer(
        self,
        loop: LoopSettings,
        layout: Layout,
        accumulation: int,
        callbacks: list[pl.Callback],
        *,
        validates: bool,
        saves: bool = True,
        validate_again: bool = False,
    ) -> pl.Trainer:
        """Lightning's Trainer as all runs have it, with what ends, saves, resumes and watches a fit.

        Args:
            loop: the section that holds ``max_steps``, ``val_check_interval`` (optimizer steps) …
            accumulation: micro-batches an optimizer step.
            callbacks: the run's own; the others come behind them.
            saves: whether there are checkpoints.
            validate_again: see :class:`MissedValidation`.
        """
        machine, experiment, resume = self.settings.trainer, self.settings.exp_manager, self.resume
        interval = loop.val_check_interval if validates else 0
        callbacks = [
            *callbacks,
            self._ending,
            MissedValidation(self.directory.path, interval, always=validate_again),
        ]
        if saves:
            kept = vars(experiment.checkpoint_callback_params)
            callbacks.append(TrainingCheckpoint(self.directory.checkpoints, loop.save_interval, resume=resume, **kept))
        if self.watch.progress is not None:
            callbacks.append(HealthCallback(self.watch))
        self.trainer = pl.Trainer(
            accelerator=machine.accelerator,
            devices=machine.lightning_devices,
            num_nodes=machine.num_nodes,
            precision=machine.lightning_precision,  # type: ignore[arg-type]
            strategy="auto" if layout.is_single else ParallelStrategy(layout, self.watch.collective_timeout),
            max_steps=loop.max_steps,
            max_epochs=1,  # one pass of the loader is all passes over the samples
            accumulate_grad_batches=accumulation,
            gradient_clip_val=loop.gradient_clip_val or None,
            val_check_interval=interval * accumulation or None,
            check_val_every_n_epoch=None,
            limit_val_batches=loop.limit_val_batches if interval else 0,
            num_sanity_val_steps=0,
            log_every_n_steps=machine.log_every_n_steps,
            logger=build_loggers(
                experiment, self.settings.name, self.directory.path, 0 if resume is None else resume.step
            ),
            callbacks=callbacks,
            plugins=[LaunchedProcesses(self.watch.process)],
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_checkpointing=saves,
            inference_mode=machine.precision != "fp8",  # in which torchao's tensors cannot be reshaped
        )
        return self.trainer

    def fit(self, module: ParallelModule, data: pl.LightningDataModule, seed: int) -> None:
        """Train, from the checkpoint on if there is one; ``seed``: of this process's dropout and the like."""
        torch.manual_seed(seed)
        checkpoint = None if self.resume is None else str(self.resume.path)
        self.trainer.fit(module, datamodule=data, ckpt_path=checkpoint)

    def validate(self, module: ParallelModule, data: pl.LightningDataModule) -> None:
        """The last step, unless it has been; not of a run that was ended before its time."""
        if module.validated_step != self.trainer.global_step and not self.cut_short:
            self.trainer.validate(module, datamodule=data, verbose=False)

    @property
    def cut_short(self) -> bool:
        """Whether training was ended before its time, by a signal or by ``exp_manager.max_time_per_run``."""
        return self.interruption.stopped_training or self._ending.out_of_time

    def record(self, **figures: Any) -> None:
        """How the run ended, for ``run.json``."""
        step = self.trainer.global_step
        out_of_time = self._ending.out_of_time and step < self.trainer.max_steps
        status = "interrupted" if self.interruption.requested or out_of_time else "finished"
        self.directory.finish(status, step=step, **figures)

    def report(self, write: Callable[[], Path]) -> None:
        """Write the report; without one a run that has ended well has still ended well."""
        if not self.directory.is_writer:
            return
        try:
            log.info("report: %s", write())
        except Exception as error:
            log.error("everything but the report is complete; it could not be written: %s", first_line(error))
            ended = read_state(self.directory.path).get("status", "finished")
            self.directory.finish(ended, report_error=first_line(error))

    def carry_out(
        self, train: Callable[[], None], closing: list[Callable[[], None]], salvage: Callable[[], None] = lambda: None
    ) -> int:
        """Train, close, and give this process's exit code.

        Args:
            train: :meth:`fit`.
            closing: what follows it: :meth:`validate`, export, :meth:`record`, :meth:`report`.
            salvage: saves what was learnt when an error of the user's, or of the numbers, has ended training.

        Raises:
            Interrupted: a signal came before training began; nothing has been closed.
        """
        trainer = self.trainer
        try:
            steps = [self._marked(step) for step in closing]
            code = run_then_close(self.interruption, train, steps, self._leave)
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

    def _leave(self) -> bool:
        """Whether the run goes on in another start of its Slurm job."""
        requeue, trainer = self._requeue, self.trainer
        if requeue is None or trainer.global_step >= trainer.max_steps:
            return False
        if not (self.interruption.stopped_training or (self._ending.out_of_time and requeue.on_max_time)):
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


def _is_restart(process: Process, notes: AgentNotes) -> bool:
    """Whether torchrun has started the processes again: then the run goes on in its own directory."""
    if process.restart == 0 or notes.get(_BEGUN) is None:
        return False  # what a first attempt refused to touch, a second one does not touch either
    if process.is_rank_zero:
        log.warning("torchrun has started the processes again (restart %d): resuming this run", process.restart)
    return True
