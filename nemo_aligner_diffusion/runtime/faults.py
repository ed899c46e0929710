"""What becomes of a run of several processes when one of them throws, dies, hangs or is slow.

The watching is :mod:`nemo_aligner_diffusion.runtime.health`; here it meets the configuration, Lightning's hooks,
the run directory and the screen. With one process none of it is started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch

from nemo_aligner_diffusion.errors import AlignerError, OutputError, first_line
from nemo_aligner_diffusion.parallel.strategy import layout_of
from nemo_aligner_diffusion.runtime.csv_table import CSVTable
from nemo_aligner_diffusion.runtime.directory import FULL_DISK, RunDirectory
from nemo_aligner_diffusion.runtime.files import write_atomic
from nemo_aligner_diffusion.runtime.health import Fault, HealthClient, HealthServer, Launch, Limits, Progress
from nemo_aligner_diffusion.runtime.health import launch as launching
from nemo_aligner_diffusion.runtime.health.progress import waited_seconds
from nemo_aligner_diffusion.runtime.health.stragglers import StragglerReport, StragglerWatch
from nemo_aligner_diffusion.runtime.health.verdict import Watch
from nemo_aligner_diffusion.runtime.settings import FaultToleranceSettings, MachineSettings, WatchSettings

log = logging.getLogger(__name__)

FAULT_FILE = "fault.txt"
STRAGGLER_COLUMNS = ("step", "median_seconds", "slowest_rank", "slowest_host", "slowest_seconds", "factor")
_CLOSING_SECONDS = 300.0  # that rank 0 has for export and report after an error
_FRAMES = 3  # innermost frames of a traceback that the screen shows; the file has all
_FULL_DISK_WORDS = ("No space left on device", "os error 28", "Disk quota exceeded", "File too large")
# what gloo, NCCL and torch's stores say when the other side is gone: seldom the reason, nearly always a consequence
_OTHER_SIDE_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "gloo",
    "Gloo",
    "NCCL",
    "c10d",
)


class RunWatch:
    """A run's health: every rank's position, and what to do about a fault.

    Args:
        launch: this process.
        progress: marks of the main thread; None: nobody watches.
    """

    def __init__(self, launch: Launch, progress: Progress | None) -> None:
        self.launch = launch
        self.progress = progress
        self.client: HealthClient | None = None
        self.server: HealthServer | None = None
        self.directory: RunDirectory | None = None
        self._said: BaseException | None = None
        self._named: set[int] = set()
        self.report_interval = 60.0

    @classmethod
    def start(cls, machine: MachineSettings, section: WatchSettings) -> RunWatch:
        """Threads and sockets of a run, where it has more than one process."""
        launch = launching.find_launch(machine.world_size, machine.devices_per_node)
        if launch.world_size == 1 or not section.create_fault_tolerance_callback:
            if launch.world_size > 1 and section.create_straggler_detection_callback and launch.rank == 0:
                log.warning(
                    "slow ranks are not looked for: exp_manager.create_straggler_detection_callback needs "
                    "exp_manager.create_fault_tolerance_callback=true, whose heartbeats tell how fast each rank is"
                )
            return cls(launch, None)
        settings = section.fault_tolerance
        limits = Limits(
            first=_seconds(settings.initial_rank_heartbeat_timeout),
            later=_seconds(settings.rank_heartbeat_timeout),
            calculate=settings.calculate_timeouts,
            safety_factor=settings.safety_factor,
            least=settings.minimum_heartbeat_timeout,
        )
        watch = cls(launch, Progress(limits))
        watch.report_interval = float(section.straggler_detection_params.report_time_interval)
        interval, silence = float(settings.workload_check_interval), float(settings.silence_timeout)
        if launch.rank == 0:
            watch.server = watch._build_server(machine, section, interval, silence, limits.first)
            watch.server.start()
        assert watch.progress is not None
        watch.client = HealthClient(launch, watch.progress, interval, silence, watch.write_down)
        watch.client.start()
        faulthandler.register(signal.SIGUSR2, all_threads=False)  # a stack even where the interpreter is held
        return watch

    def _build_server(
        self, machine: MachineSettings, watched: WatchSettings, interval: float, silence: float, first: float
    ) -> HealthServer:
        section, now = watched.straggler_detection_params, time.monotonic()
        stragglers = None
        if watched.create_straggler_detection_callback:
            stragglers = StragglerWatch(section.report_time_interval, section.gpu_relative_perf_threshold, now)
        return HealthServer(
            self.launch,
            machine.num_nodes > 1,
            Watch(self.launch.world_size, silence, first, now),
            interval,
            stragglers,
            self.write_straggler_report,
            section.stop_if_detected,
        )

    def phase(self, name: str) -> None:
        """What the main thread does from here on, in words for the user."""
        if self.progress is not None:
            self.progress.mark(name)

    def joined(self) -> None:
        """The process group is there."""
        if self.client is not None:
            self.client.settle()

    def callbacks(self) -> list[pl.Callback]:
        """For the Trainer, behind the callbacks that make collective calls."""
        return [] if self.progress is None else [HealthCallback(self, self.report_interval / 4)]

    def failed(self, error: Exception) -> None:
        """Print an error of this process, unless another rank's fault explains it. Returns on rank 0 only.

        The other ranks have nothing to close and end here: on the way out, libraries may wait for ranks that are gone.
        """
        if self.client is None or self._said is not None:
            return
        reason, code = _reason(error), error.exit_code if isinstance(error, AlignerError) else 1
        said = isinstance(error, AlignerError) and error.said
        details = "".join(traceback.format_exception(error))
        place = self.progress.position().place if self.progress is not None else ""
        first = self.client.failed(reason, details, code, _other_side_gone(error), said)
        self._said = error
        if first:
            self._tell(error, place, reason, details, code)
        if self.launch.rank != 0:
            self.client.wait_for_rank_0()
        self.client.end_process(code, within=0.0 if self.launch.rank else _CLOSING_SECONDS)

    def _tell(self, error: Exception, place: str, reason: str, details: str, code: int) -> None:
        assert self.client is not None
        fault = Fault("error", self.client.member, place, reason, details, code)
        lines = [fault.headline]
        if not isinstance(error, AlignerError):
            frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
            lines += [f"  {frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in frames]
            if self.directory is not None:
                lines += [f"  the whole traceback: {self.directory.path / FAULT_FILE}"]
        if launching.claim_first_word(reason):  # ranks that could not ask rank 0 may have the same to say
            print("\n".join(lines), file=sys.stderr, flush=True)
        launching.write_error_file("\n".join(lines))
        if self.launch.rank == 0:
            with contextlib.suppress(Exception):
                self.write_down(fault)

    def write_down(self, fault: Fault) -> None:
        """``fault.txt``, and ``failed`` in ``run.json``. On one rank; not always the first."""
        if self.directory is None:
            return
        lines = [fault.headline, "", "where every rank was, and for how long:", *fault.places]
        if fault.details:
            lines += ["", fault.details.rstrip()]
        file = self.directory.path / FAULT_FILE
        earlier = (
            file.read_text(encoding="utf-8") + "\n" if file.exists() else ""
        )  # a run may be resumed, and fail again
        write_atomic(file, earlier + "\n".join(lines) + "\n")
        step = self.progress.step if self.progress is not None else None
        dataclasses.replace(self.directory, is_writer=True).finish("failed", step=step, error=fault.headline)

    def write_straggler_report(self, report: StragglerReport) -> None:
        """A row of ``stragglers.csv``, and a warning for a rank that has newly become slow. In the server's thread."""
        if self.directory is not None:
            row = (
                report.step,
                report.median,
                report.slowest.rank,
                report.slowest.host,
                report.seconds,
                report.seconds / report.median,
            )
            table = CSVTable(self.directory.path / "stragglers.csv", STRAGGLER_COLUMNS)
            table.append(dict(zip(STRAGGLER_COLUMNS, row, strict=True)))
        for member, seconds in report.stragglers:
            if member.rank not in self._named:
                log.warning(
                    "%s is slow: %.3g s of its own work a step, %.1f × the median of %.3g s; all ranks wait for it",
                    member,
                    seconds,
                    seconds / report.median,
                    report.median,
                )
        self._named = {member.rank for member, _ in report.stragglers}

    def close(self) -> None:
        """The process ends as it should: the others need not miss it."""
        if self.client is not None:
            self.client.close()
        if self.server is not None:
            self.server.close()


class HealthCallback(pl.Callback):
    """Marks a fit's way for the :class:`RunWatch`, and times the rank's own work in each optimizer step.

    Own work is reading data, forward and backward passes; what follows waits for the other ranks, and collective
    calls that say so (:func:`~nemo_aligner_diffusion.runtime.health.waiting`) are taken out. Under tensor parallelism
    and FSDP the passes themselves keep the ranks in step: there a fixed piece of computing, now and then, is timed.

    Args:
        probe_interval: seconds between two of those.
    """

    def __init__(self, watch: RunWatch, probe_interval: float = 15.0) -> None:
        assert watch.progress is not None
        self.watch = watch
        self.probe_interval = probe_interval
        self._in_step = False
        self._probed = 0.0
        self.progress = watch.progress
        self._step = 0
        self._seconds = 0.0
        self._began = 0.0
        self._waited = 0.0
        self._previous_end: float | None = None
        self._cuda: list[tuple[Any, Any]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.progress.mark("setting up")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        self.progress.mark("data", self._step, in_training=True)
        layout = layout_of(trainer)
        self._in_step = layout.tensor > 1 or layout.fsdp
        self._probed = time.monotonic()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.progress.mark("forward pass", in_training=True)
        self._began = time.perf_counter()
        self._waited = waited_seconds()
        if self._previous_end is not None:
            self._seconds += self._began - self._previous_end
            self._previous_end = None
        if pl_module.device.type == "cuda":
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
            self._cuda.append(pair)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        self.progress.mark("backward pass", in_training=True)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.progress.mark("optimizer step", in_training=True)
        if self._cuda:
            self._cuda[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._began - (waited_seconds() - self._waited)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            if self._cuda:  # the gradient norm has been read since: the device is past both events
                self._cuda[-1][1].synchronize()
                self._seconds += sum(start.elapsed_time(end) for start, end in self._cuda) / 1000
                self._cuda = []
            if not self._in_step:
                self.progress.add_work(self._seconds)
            elif time.monotonic() - self._probed > self.probe_interval:
                self.progress.add_work(probe(pl_module.device))
                self._probed = time.monotonic()
            self._seconds = 0.0
        self.progress.mark("data", self._step, in_training=True)
        self._previous_end = time.perf_counter()

    def on_save_checkpoint(self, *args: Any) -> None:
        self.progress.mark("saving a checkpoint")
        self._previous_end = None

    def on_validation_start(self, *args: Any) -> None:
        self.progress.mark("validation")
        self._previous_end = None

    def on_validation_batch_end(self, *args: Any) -> None:
        self.progress.mark("validation")

    def on_validation_end(self, *args: Any) -> None:
        self.progress.mark("data", in_training=True)

    def on_train_end(self, *args: Any) -> None:
        self.progress.mark("ending the training")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Exception):  # before Lightning's own teardown, which may wait for the other ranks
            self.watch.failed(explained(exception, self.watch.directory))


def probe(device: torch.device) -> float:
    """Seconds that this rank's device takes for a fixed piece of computing (some milliseconds)."""
    cuda = device.type == "cuda"
    side = 4096 if cuda else 384
    matrix = torch.ones(side, side, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    product = torch.empty_like(matrix)
    seconds = 0.0
    for timed in (False, True):  # the first one finds caches and kernels
        if cuda:
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(8):
            torch.mm(matrix, matrix, out=product)
        if cuda:
            torch.cuda.synchronize(device)
        if timed:
            seconds = time.perf_counter() - started
    return seconds


@contextlib.contextmanager
def watched(machine: MachineSettings, section: WatchSettings) -> Iterator[RunWatch]:
    """Around a whole run. Errors come out as one clear :class:`AlignerError` where we know what they mean."""
    if machine.world_size > 1:  # a failed collective ends the process: torch's own
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    before, threading.excepthook = threading.excepthook, _of_a_thread
    watch = RunWatch.start(machine, section)
    try:
        yield watch
    except Exception as error:
        shown = explained(error, watch.directory)
        watch.failed(shown)
        if watch.client is not None:
            if not isinstance(shown, AlignerError):
                raise SystemExit(1) from None  # its traceback has been shown, once
            shown.said = True
        if shown is not error:
            raise shown from error
        raise
    finally:
        watch.close()
        threading.excepthook = before


def process_group_timeout(settings: FaultToleranceSettings) -> datetime.timedelta:
    """For collective calls: longer than any limit of ours, which say who is to blame where a timeout cannot."""
    longest = max(_seconds(settings.initial_rank_heartbeat_timeout), _seconds(settings.rank_heartbeat_timeout))
    return datetime.timedelta(seconds=min(longest + 600.0, 7 * 86400.0))


def began(watch: RunWatch, directory: RunDirectory) -> None:
    """The run has claimed its directory: from here on, faults are written there, and a restart resumes from it."""
    watch.directory = directory
    if watch.launch.rank == 0:
        launching.note("began")


def full_disk(error: BaseException, directory: RunDirectory | None) -> OutputError | None:
    """What to tell the user if this error is a full disk, whatever library met it."""
    for link in _chain(error):
        number = link.errno if isinstance(link, OSError) else None
        if number in FULL_DISK or any(words in str(link) for words in _FULL_DISK_WORDS):
            where = getattr(link, "filename", None) or (directory.path if directory is not None else "the disk")
            return OutputError(
                f"{where} could not be written: {first_line(link)}. Checkpoints written before are intact; make room "
                "and continue with exp_manager.resume_if_exists=True."
            )
    return None


def explained(error: Exception, directory: RunDirectory | None) -> Exception:
    """``error`` itself, or what it means to the user."""
    return error if isinstance(error, AlignerError) else full_disk(error, directory) or error


def _of_a_thread(caught: threading.ExceptHookArgs) -> None:
    """Instead of a traceback on the screen: TensorBoard writes in a thread of its own."""
    if caught.exc_value is not None and full_disk(caught.exc_value, None) is not None:
        name = caught.thread.name if caught.thread is not None else "a thread"
        log.warning("%s could not write what it should: %s", name, first_line(caught.exc_value))
    else:
        threading.__excepthook__(caught)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _other_side_gone(error: BaseException) -> bool:
    if isinstance(error, AlignerError):
        return False
    return any(
        isinstance(link, ConnectionError)
        or type(link).__name__.startswith("Dist")
        or any(words in str(link) for words in _OTHER_SIDE_GONE)
        for link in _chain(error)
    )


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, AlignerError) else f"{type(error).__name__}: {first_line(error, 2000)}"


def _seconds(value: float | None) -> float:
    return float("inf") if value is None else float(value)
