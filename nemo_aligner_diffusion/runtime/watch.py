"""What becomes of a run of several processes when one of them throws, dies, hangs or is slow.

The watching is :mod:`nemo_aligner_diffusion.runtime.health`; here it meets the run directory and the screen. With one
process none of it is started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import logging
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta

from nemo_aligner_diffusion.errors import AlignerError, ConfigurationError, OutputError, first_line
from nemo_aligner_diffusion.runtime.directory import RunDirectory, unusable_disk
from nemo_aligner_diffusion.runtime.ending import is_first_to_say, leave, write_error_file
from nemo_aligner_diffusion.runtime.files import write_atomic
from nemo_aligner_diffusion.runtime.health.client import HealthClient
from nemo_aligner_diffusion.runtime.health.messages import Fault
from nemo_aligner_diffusion.runtime.health.progress import Progress
from nemo_aligner_diffusion.runtime.health.server import HealthServer
from nemo_aligner_diffusion.runtime.health.stragglers import StragglerWatch
from nemo_aligner_diffusion.runtime.health.verdict import Watch
from nemo_aligner_diffusion.runtime.memory import out_of_memory
from nemo_aligner_diffusion.runtime.process import Process, check_agrees, this_process
from nemo_aligner_diffusion.runtime.settings import MachineSettings, WatchSettings

log = logging.getLogger(__name__)

FAULT_FILE = "fault.txt"
_CLOSING_SECONDS = 300.0  # that rank 0 has for export and report after an error
_FRAMES = 3  # innermost frames of a traceback that the screen shows; the file has all
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

    Attributes:
        progress: marks of the main thread; None: nobody watches.
        directory: of the run, once that has begun; faults are written there from then on.
    """

    def __init__(self, process: Process, settings: WatchSettings) -> None:
        self.process = process
        self.settings = settings
        limits = settings.fault_tolerance
        # for collective calls: longer than any limit of ours, which say who is to blame where a timeout cannot
        longest = max(limits.longest_pause(None), limits.longest_pause(math.inf))
        self.collective_timeout = timedelta(seconds=min(longest + 600.0, 7 * 86400.0))
        is_watched = process.world_size > 1 and settings.create_fault_tolerance_callback
        self.progress = Progress(limits) if is_watched else None
        self.client: HealthClient | None = None
        self.server: HealthServer | None = None
        self.directory: RunDirectory | None = None
        self._reported: BaseException | None = None
        unwatched = process.world_size > 1 and not is_watched
        if unwatched and settings.create_straggler_detection_callback and process.is_rank_zero:
            log.warning(
                "slow ranks are not looked for: exp_manager.create_straggler_detection_callback needs "
                "exp_manager.create_fault_tolerance_callback=true, whose heartbeats tell how fast each rank is"
            )

    def serve(self) -> str:
        """On rank 0, before the processes meet: what to tell the others then. Empty: nobody watches."""
        if self.progress is None or not self.process.is_rank_zero:
            return ""
        limits = self.settings.fault_tolerance
        watch = Watch(self.process.world_size, limits.silence_timeout)
        stragglers = None
        if self.settings.create_straggler_detection_callback:
            stragglers = StragglerWatch(self.settings.straggler_detection_params, time.monotonic())
        self.server = HealthServer(self.process.is_one_node, watch, limits.workload_check_interval, stragglers)
        self.server.start()
        return self.server.address

    def begin(self, address: str, host: str) -> None:
        """The processes have met: be watched from here on.

        Args:
            address: what rank 0's :meth:`serve` gave.
            host: rank 0's.
        """
        if self.progress is None or not address:
            return
        ranks = self.settings.fault_tolerance
        times = ranks.workload_check_interval, ranks.silence_timeout
        self.client = HealthClient(self.process, address, host, self.progress, *times, self.write_down)
        self.client.start()
        faulthandler.register(signal.SIGUSR2, all_threads=False)  # a stack even where the interpreter is held
        self.client.settle()

    def phase(self, name: str) -> None:
        """What the main thread does from here on, in words for the user."""
        if self.progress is not None:
            self.progress.mark(name)

    def failed(self, error: Exception) -> None:
        """Print an error of this process, unless another rank's fault explains it. Returns on rank 0 only.

        The other ranks have nothing to close and end here: on the way out, libraries may wait for ranks that are gone.
        """
        if self.client is None or self.progress is None or self._reported is not None:
            return
        reason, code = _reason(error), error.exit_code if isinstance(error, AlignerError) else 1
        is_said = isinstance(error, AlignerError) and error.said
        details = "".join(traceback.format_exception(error))
        place = self.progress.position().place
        first = self.client.failed(reason, details, code, _other_side_gone(error), is_said)
        self._reported = error
        if first:
            self._report(error, Fault("error", self.client.member, place, reason, details, code))
        if not self.process.is_rank_zero:
            self.client.wait_for_rank_0()
            self.client.close()
            leave(code)
        last = threading.Timer(_CLOSING_SECONDS, leave, (code,))  # closing work may wait for ranks that are gone
        last.daemon = True
        last.start()

    def _report(self, error: Exception, fault: Fault) -> None:
        lines = [fault.headline]
        if not isinstance(error, AlignerError):
            frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
            lines += [f"  {frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in frames]
            if self.directory is not None:
                lines += [f"  the whole traceback: {self.directory.path / FAULT_FILE}"]
        if is_first_to_say(fault.reason):  # ranks that could not ask rank 0 may have the same to say
            print("\n".join(lines), file=sys.stderr, flush=True)
        write_error_file("\n".join(lines))
        if self.process.is_rank_zero:
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
        # a run may be resumed, and fail again
        earlier = file.read_text(encoding="utf-8", errors="replace") + "\n" if file.exists() else ""
        write_atomic(file, earlier + "\n".join(lines) + "\n")
        step = self.progress.step if self.progress is not None else None
        dataclasses.replace(self.directory, is_writer=True).finish("failed", step=step, error=fault.headline)

    def close(self) -> None:
        """The process ends as it should: the others need not miss it."""
        if self.client is not None:
            self.client.close()
        if self.server is not None:
            self.server.close()


@contextlib.contextmanager
def watched(machine: MachineSettings, section: WatchSettings) -> Iterator[RunWatch]:
    """Around a whole run. Errors come out as one clear :class:`AlignerError` where we know what they mean.

    Raises:
        ConfigurationError: the processes that were started are not those configured, or nobody has started them.
    """
    process = this_process()
    if process.launcher:
        check_agrees(process, machine.devices_per_node, machine.num_nodes)
    elif machine.world_size > 1:
        raise ConfigurationError(
            f"trainer.devices × trainer.num_nodes = {machine.world_size}, but no launcher has started the processes: "
            "start the program with torchrun or srun, or by its own command line, which starts them itself"
        )
    if process.launcher == "environment":  # which says nothing of machines
        process = dataclasses.replace(process, local_world_size=machine.devices_per_node)
    if process.world_size > 1:  # a failed collective ends the process: torch's own
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    before, threading.excepthook = threading.excepthook, _of_a_thread
    watch = RunWatch(process, section)
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


def explained(error: Exception, directory: RunDirectory | None) -> Exception:
    """``error`` itself, or what it means to the user."""
    if isinstance(error, AlignerError) and not (isinstance(error, OutputError) and directory is not None):
        return error  # nothing of the run was there to be written
    if isinstance(error, OutputError) and "resume_if_exists" in str(error):
        return error  # it says already how to go on
    return unusable_disk(error, directory.path if directory is not None else None) or out_of_memory(error) or error


def _of_a_thread(caught: threading.ExceptHookArgs) -> None:
    """Instead of a traceback on the screen: TensorBoard writes in a thread of its own."""
    if caught.exc_value is not None and unusable_disk(caught.exc_value, None) is not None:
        name = caught.thread.name if caught.thread is not None else "a thread"
        log.warning("%s could not write what it should: %s", name, first_line(caught.exc_value))
    else:
        threading.__excepthook__(caught)


def _other_side_gone(error: BaseException) -> bool:
    if isinstance(error, AlignerError):
        return False
    link: BaseException | None = error
    while link is not None:
        if (
            isinstance(link, ConnectionError)
            or type(link).__name__.startswith("Dist")
            or any(words in str(link) for words in _OTHER_SIDE_GONE)
        ):
            return True
        link = link.__cause__ or link.__context__
    return False


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, AlignerError) else f"{type(error).__name__}: {first_line(error, 2000)}"
