"""Worker processes for a :class:`.SampleStream`: errors arrive whole, and no worker can keep a run waiting for ever."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import struct
import threading
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from types import TracebackType
from typing import Any

import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from nemo_aligner_diffusion.data.sample_stream import SampleStream, check_whole, no_word
from nemo_aligner_diffusion.data.worker_signals import leave_signals_to_the_parent
from nemo_aligner_diffusion.errors import DataError, printable

logger = logging.getLogger(__name__)

WORKER_TIMEOUT_SECONDS = 600.0
SLOW_SHARE = 0.1  # of the timeout: a batch that takes longer is warned about
INLINE_BYTES = 1 << 16  # tensors up to this size leave a worker by value
_FIELDS = 3  # of a worker on the board: file number + 1, global sample index, since when (monotonic ns)


@dataclass(frozen=True)
class _Inline:
    """A small tensor of a batch on its way out of a worker, as what pickles by value.

    Handing over a tensor takes a file, a socket and an answer from the worker: a millisecond.
    """

    array: NDArray[Any]


@dataclass(frozen=True)
class _Failure:
    """A DataError on its way out of a worker. Raised there, it would arrive as a traceback in a string."""

    message: str


class _InWorker(IterableDataset[Any]):
    """The stream as a worker iterates it: a DataError becomes the last item instead of an exception.

    ``board``: shared memory in which each worker says what it is about to read.
    """

    def __init__(self, stream: SampleStream) -> None:
        super().__init__()
        self.stream = stream
        self.board: Any = None

    def __iter__(self) -> Iterator[Any]:
        worker, board = get_worker_info(), self.board
        pack = _packed if worker is not None else _as_it_is
        if board is not None:
            place = _FIELDS * (worker.id if worker is not None else 0)
            write = struct.Struct("qqq").pack_into

            def reading(file: int, sample: int) -> None:
                write(board, 8 * place, file + 1, sample, time.monotonic_ns())

            self.stream.reading = reading
        try:
            yield from map(pack, self.stream)
        except DataError as error:
            yield _Failure(str(error))
        finally:
            self.stream.reading = no_word


class StreamLoader(DataLoader[Any]):
    """A DataLoader over a :class:`.SampleStream` (attribute ``stream``); DataErrors arrive whole from workers.

    Args:
        num_workers: processes that read beside this one; 0 reads here.
        worker_timeout_seconds: a batch that does not come within this time ends the iteration with a DataError that
            names the worker and what it reads; a tenth of it gives a warning. 0: wait for ever. Without workers there
            are warnings only: nothing can interrupt a read of this process.

    Attributes:
        worker_processes: process ids of the latest iteration's workers.

    Raises:
        DataError: while iterating, as the stream does; also for a worker that is late or was killed.
    """

    def __init__(
        self, stream: SampleStream, num_workers: int = 0, worker_timeout_seconds: float = WORKER_TIMEOUT_SECONDS
    ) -> None:
        check_whole("num_workers", num_workers, 0)
        if not worker_timeout_seconds >= 0:
            raise DataError(f"worker_timeout_seconds is {worker_timeout_seconds}; expected 0 (for ever) or more")
        # With a generator of its own the loader leaves torch's global random state alone, which resuming relies on.
        super().__init__(
            _InWorker(stream),
            batch_size=None,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            worker_init_fn=leave_signals_to_the_parent,
            generator=torch.Generator(),
        )
        self.stream = stream
        self.worker_timeout_seconds = worker_timeout_seconds
        self.worker_processes: list[int] = []

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # Shared memory settles how processes are started: not without workers, which is for the program to decide.
        size = _FIELDS * max(self.num_workers, 1)
        board = get_context().RawArray("q", size) if self.num_workers else array("q", bytes(8 * size))
        assert isinstance(self.dataset, _InWorker)
        self.dataset.board = board
        batches = super().__iter__()
        self.worker_processes = [worker.pid for worker in getattr(batches, "_workers", ())]
        try:
            with _Watch(self, board) as watch:
                while True:
                    problem: Exception | None = None
                    with watch.waiting():
                        try:
                            batch = next(batches)
                        except StopIteration:
                            return
                        except (RuntimeError, OSError, EOFError) as error:
                            problem = self._explained(error, watch)
                    if problem is not None or watch.late is not None:
                        # Raised here, it does not keep the other workers alive by its context.
                        raise problem or DataError(watch.late)
                    if isinstance(batch, _Failure):
                        raise DataError(batch.message)
                    yield _unpacked(batch)
        finally:
            self.dataset.board = None
            with contextlib.suppress(RuntimeError):  # about workers that were just killed
                del batches  # ends the workers

    def _explained(self, error: Exception, watch: _Watch) -> Exception:
        """What ``error``, raised while waiting for a batch, is about."""
        if watch.late is not None:  # the watch killed the worker; this process noticed in one way or another
            return DataError(watch.late)
        if str(error).startswith("DataLoader worker (pid"):
            how = " ".join(str(error).split()).removeprefix("DataLoader worker ").rstrip(".")
            return DataError(
                f"a data worker of data rank {self.stream.rank} is gone: {how}; was it killed for lack of memory? "
                "Fewer model.data.num_workers need less"
            )
        return error


class _Watch:
    """A thread that warns while the training waits long for a batch, and kills a worker that is too late.

    DataLoader's own timeout does not serve: a tensor is handed over by its worker, and a worker that stopped after it
    announced one would be waited for without end. Killing it ends every kind of waiting.

    Attributes:
        late: the error message about the worker that was killed.
    """

    def __init__(self, loader: StreamLoader, board: Any) -> None:
        self.loader, self.board = loader, board
        self.late: str | None = None
        self._turn = 0  # which worker's batch comes next
        self._since: float | None = None
        self._warned = False
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="data watch", daemon=True)

    def __enter__(self) -> _Watch:
        if self.loader.worker_timeout_seconds > 0:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        self._since, self._warned = time.monotonic(), False
        try:
            yield
        finally:
            with self._changed:
                self._since = None
                self._turn = (self._turn + 1) % max(self.loader.num_workers, 1)

    def _run(self) -> None:
        limit = self.loader.worker_timeout_seconds
        tick = min(limit * SLOW_SHARE / 4, 1.0)
        looked = time.monotonic()
        with self._changed:
            while not self._ended:
                self._changed.wait(tick)
                now = time.monotonic()
                slept, looked = now - looked - tick, now
                if self._since is None or self.late is not None:
                    continue
                if slept > tick:  # this process was stopped (a batch system may suspend a job), its workers as well
                    self._since = min(self._since + slept, now)
                waited = now - self._since
                if waited > limit and self.loader.num_workers:
                    self._kill()
                elif waited > limit * SLOW_SHARE and not self._warned:
                    self._warned = True
                    who = self._worker() if self.loader.num_workers else "reading here"
                    rank = self.loader.stream.rank
                    logger.warning(
                        "data rank %d has waited %.0f s for a batch: %s; %s", rank, waited, who, self._state()
                    )

    def _kill(self) -> None:
        self.late = (
            f"{self._worker()} of data rank {self.loader.stream.rank} did not give its next batch within "
            f"{self.loader.worker_timeout_seconds:g} s and was killed; {self._state()}; look at the disk, or allow "
            "more time with model.data.worker_timeout_seconds"
        )
        with contextlib.suppress(OSError):
            os.kill(self.loader.worker_processes[self._turn], signal.SIGKILL)  # a stopped process takes no other signal

    def _worker(self) -> str:
        return f"data worker {self._turn} (process {self.loader.worker_processes[self._turn]})"

    def _state(self) -> str:
        """What the worker whose turn it is reads."""
        file, sample, since = self.board[_FIELDS * self._turn : _FIELDS * (self._turn + 1)]
        if file == 0:
            return "it has not begun to read"
        seconds = (time.monotonic_ns() - since) / 1e9
        position = f" for sample {sample} of the run" if sample >= 0 else ""
        return f"it last read {printable(self.loader.stream.files[file - 1])}{position}, {seconds:.0f} s ago"


def _as_it_is(batch: Any) -> Any:
    return batch


def _packed(batch: Any) -> Any:
    if not isinstance(batch, dict):
        return batch
    return {
        name: _Inline(value.numpy()) if isinstance(value, torch.Tensor) and value.nbytes <= INLINE_BYTES else value
        for name, value in batch.items()
    }


def _unpacked(batch: Any) -> Any:
    if not isinstance(batch, dict):
        return batch
    return {
        name: torch.from_numpy(value.array) if isinstance(value, _Inline) else value for name, value in batch.items()
    }
