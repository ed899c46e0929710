"""Worker processes for a :class:`.SampleStream`: errors arrive whole, and no worker can keep a run waiting for ever."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from nemo_aligner_diffusion.data.sample_reader import SampleReader
from nemo_aligner_diffusion.data.sample_stream import SampleStream, check_whole
from nemo_aligner_diffusion.errors import DataError, printable

logger = logging.getLogger(__name__)

WORKER_TIMEOUT_SECONDS = 600.0
PARTS_OF_TIMEOUT = 10  # waited for one after the other: the first to pass in vain is a warning
_ENDING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})


class _InWorker(IterableDataset[Any]):
    """The stream as a worker iterates it.

    A DataError becomes the last item: raised, it would arrive as a traceback in a string. Tensors leave as arrays, by
    value: handing one over takes a file, a socket and an answer from the worker, which may have been stopped since.
    """

    def __init__(self, stream: SampleStream) -> None:
        super().__init__()
        self.stream = stream

    def __iter__(self) -> Iterator[Any]:
        try:
            for batch in self.stream:
                yield {
                    name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in batch.items()
                }
        except DataError as error:
            yield DataError(str(error))


class StreamLoader(DataLoader[Any]):
    """A DataLoader over a :class:`.SampleStream` (attribute ``stream``); DataErrors arrive whole from workers.

    Args:
        num_workers: processes that read beside this one; 0 reads here.
        worker_timeout_seconds: a batch that does not come within this time ends the iteration with a DataError that
            names the worker and what it was to read; a tenth of it gives a warning. 0: wait for ever, as without
            workers: nothing can interrupt a read of this process.

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
            timeout=worker_timeout_seconds / PARTS_OF_TIMEOUT if num_workers else 0,
            collate_fn=_as_it_is,
            worker_init_fn=leave_signals_to_the_parent,
            generator=torch.Generator(),
        )
        self.stream = stream
        self.worker_timeout_seconds = worker_timeout_seconds
        self.worker_processes: list[int] = []

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.num_workers == 0:
            yield from self.stream
            return
        batches: Any = super().__iter__()
        self.worker_processes = [worker.pid for worker in batches._workers]
        try:
            for number in count():
                batch = self._next(batches, number)
                if batch is None:
                    return
                if isinstance(batch, DataError):
                    raise batch
                yield {n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in batch.items()}
        finally:
            with contextlib.suppress(RuntimeError):  # about a worker that was just killed
                del batches  # ends the workers

    def _next(self, batches: Any, number: int) -> Any:
        """Batch ``number``, a DataError in its place, or None at the end.

        Raised in here, an error would keep the workers alive by the frames of its context.
        """
        turn = number % self.num_workers
        worker = f"data worker {turn} (process {self.worker_processes[turn]})"
        for part in range(PARTS_OF_TIMEOUT):
            try:
                return next(batches, None)
            except RuntimeError as error:
                said = " ".join(str(error).split())
                if said.startswith("DataLoader worker (pid"):
                    how = said.removeprefix("DataLoader worker ").rstrip(".")
                    return DataError(
                        f"a data worker of data rank {self.stream.rank} is gone: {how}; was it killed for lack of "
                        "memory? Fewer model.data.num_workers need less"
                    )
                if not said.startswith("DataLoader timed out"):
                    raise
            if part == 0:
                logger.warning(
                    "data rank %d has waited %.1f s for a batch of %s: %s",
                    self.stream.rank,
                    self.timeout,
                    worker,
                    self._awaited(number),
                )
        with contextlib.suppress(RuntimeError):  # torch tells of every death
            batches._workers[turn].kill()  # a stopped process takes no other signal
            batches._workers[turn].join(1)
        return DataError(
            f"{worker} of data rank {self.stream.rank} did not give its next batch within "
            f"{self.worker_timeout_seconds:g} s and was killed; it was to read {self._awaited(number)}; look at the "
            "disk, or allow more time with model.data.worker_timeout_seconds"
        )

    def _awaited(self, number: int) -> str:
        reader, positions = SampleReader(self.stream), self.stream.positions(number)
        files = sorted({reader.index.file_of(reader.row(position)) for position in positions})
        named = ", ".join(printable(self.stream.files[file]) for file in files[:3]) + (", …" if len(files) > 3 else "")
        return f"samples {positions[0]} to {positions[-1]} of the run, from {named}"


def leave_signals_to_the_parent(worker: int = 0) -> None:
    """For ``DataLoader(worker_init_fn=…)``: end at SIGTERM from the parent only; from anyone else take no notice.

    Slurm signals *every* process of a job step, and a terminal every process of its group. A worker that dies of it
    makes the training process raise in the middle of the very step that it wants to complete and save. A worker that
    ignored SIGTERM altogether could not be ended by its parent if it were stuck. So the signals are blocked, and a
    thread takes them and looks who sent them. A worker whose parent has died ends by itself, as torch's always do.
    """
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)

    def watch() -> None:
        while True:
            received = signal.sigwaitinfo(_ENDING)
            if received.si_signo == signal.SIGTERM and received.si_pid == parent:
                os._exit(0)

    threading.Thread(target=watch, name="signals", daemon=True).start()


def _as_it_is(batch: Any) -> Any:
    return batch
