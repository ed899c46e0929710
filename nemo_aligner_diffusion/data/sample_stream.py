"""A stream of samples in an order that only the files and the seed decide, and each rank's share of it.

**The order.** Epoch *e* is the shards in an order drawn from ``(seed, e)``, their samples passed through a shuffle
buffer of ``shuffle_buffer`` samples drawn from the same pair. Epoch follows epoch without end, never mixed, so each
sample comes once an epoch. The *global sample index* is the position in this stream. Neither the number of ranks nor
that of workers enters, so a run is the same under any layout and resuming needs one number: the samples consumed.

**Who reads what.** With ``world_size`` W ranks and micro-batches of B, micro-step *m* covers the positions
``[m*B*W, (m+1)*B*W)`` and rank *r* gets ``[m*B*W + r*B, m*B*W + (r+1)*B)`` of them. Every rank, and every worker of a
rank, reads *all* shards and keeps its share: prompts are some hundred bytes, a pass costs microseconds a prompt
(``docs/data.md`` has the figure), and nothing has to be agreed between ranks, so nothing can hang on shards of
unequal size. What is dear about a sample (decoding a picture) belongs into :meth:`SampleStream.collate`, which only the
rank and worker that keep it call. Worker *w* of K makes micro-steps w, w+K, w+2K, …; the loader asks the workers in
turn, which restores the order exactly.
"""

from __future__ import annotations

import logging
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import webdataset as wds
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from nemo_aligner_diffusion.data.paths import PathSpec, expand_paths
from nemo_aligner_diffusion.data.prompt_files import BadSamples, OnBadSample
from nemo_aligner_diffusion.errors import DataError

logger = logging.getLogger(__name__)


class _Share(NamedTuple):
    """One rank's micro-batch before it is collated."""

    items: list[Any]
    first: int  # global sample index of the first
    epochs: list[int]


class SampleStream(IterableDataset[Any], ABC):
    """This rank's micro-batches of the stream that the module's docstring defines.

    Every iteration starts at ``start_sample``. A subclass says how a file is read, and what a batch is.

    Args:
        paths: what :func:`expand_paths` accepts.
        micro_batch_size: samples a batch on this rank (B).
        seed: of the order.
        shuffle_buffer: samples held for shuffling. 0 keeps the order of files and samples as given (for validation); 1
            shuffles the files only.
        rank, world_size: *data-parallel* ones; the ranks of a tensor-parallel group share a rank here.
        epochs: passes over the data; None for no end.
        global_batch_size: samples an optimizer step over all ranks; a multiple of ``micro_batch_size * world_size``,
            which is its default. It matters only for where a finite stream ends.
        incomplete: a finite stream that does not fill its last global batch ends before it (``"drop"``) or fills it
            with the first samples of the following epoch (``"wrap"``; their ``index`` is beyond the last true one).
            Either way all ranks get equally many batches.
        start_sample: global samples already consumed; a multiple of ``micro_batch_size * world_size``.
        on_bad_sample: ``"error"`` stops at the first unusable sample or shard; ``"skip"`` warns, counts and goes on.

    Attributes:
        skipped: unusable samples passed over so far in this process (workers report theirs themselves).

    Raises:
        DataError: on construction for missing files, a first shard without a readable first sample, or numbers that do
            not fit; while iterating for anything unusable found later, and for a finite stream without one batch.
    """

    noun = "sample"  # what messages call one, with an "s" for several

    def __init__(
        self,
        paths: PathSpec,
        *,
        micro_batch_size: int,
        seed: int = 0,
        shuffle_buffer: int = 10_000,
        rank: int = 0,
        world_size: int = 1,
        epochs: int | None = None,
        global_batch_size: int | None = None,
        incomplete: Literal["drop", "wrap"] = "drop",
        start_sample: int = 0,
        on_bad_sample: OnBadSample = "error",
    ) -> None:
        super().__init__()
        check_whole("micro_batch_size", micro_batch_size, 1)
        check_whole("shuffle_buffer", shuffle_buffer, 0)
        check_whole("world_size", world_size, 1)
        check_whole("rank", rank, 0)
        check_whole("start_sample", start_sample, 0)
        if epochs is not None:
            check_whole("epochs", epochs, 1)
        if rank >= world_size:
            raise DataError(f"rank is {rank}; expected less than world_size {world_size}")
        if incomplete not in ("drop", "wrap"):
            raise DataError(f"incomplete is {incomplete!r}; expected 'drop' or 'wrap'")
        self.step_size = micro_batch_size * world_size
        self.global_batch_size = self.step_size if global_batch_size is None else global_batch_size
        if self.global_batch_size < 1 or self.global_batch_size % self.step_size:
            raise DataError(
                f"global_batch_size is {global_batch_size}; expected a multiple of micro_batch_size × data-parallel "
                f"ranks = {micro_batch_size} × {world_size} = {self.step_size}"
            )
        if start_sample % self.step_size:
            raise DataError(
                f"start_sample is {start_sample}; expected a multiple of micro_batch_size × data-parallel ranks = "
                f"{micro_batch_size} × {world_size} = {self.step_size}: resume with a layout that divides it"
            )
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.rank = rank
        self.world_size = world_size
        self.epochs = epochs
        self.incomplete = incomplete
        self.start_sample = start_sample
        self.on_bad_sample: OnBadSample = on_bad_sample
        self.skipped = 0
        self.files = expand_paths(paths)
        # One sample now, so that a wrong folder or format is known before a model is loaded; the rest when reached.
        first = BadSamples(on_bad_sample, quiet=True)
        if not any(True for file in self.files for _ in islice(self.read(file, first), 1)):
            raise self._no_sample(first.count)

    @abstractmethod
    def read(self, file: Path, bad: BadSamples) -> Iterator[Any]:
        """The samples of one file in file order, one in memory at a time; ``bad`` decides about unusable ones."""

    @abstractmethod
    def collate(self, items: list[Any], index: torch.Tensor, epochs: list[int]) -> Any:
        """A batch of B samples; ``index`` (B,) int64 global sample indices, ``epochs`` of each, from 0."""

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        turn, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        speaker = self.rank == 0 and turn == 0  # every process meets the same unusable samples
        for number, share in enumerate(self._shares(quiet=not speaker)):
            if number % workers == turn:
                index = torch.arange(share.first, share.first + len(share.items))
                yield self.collate(share.items, index, share.epochs)

    def _shares(self, quiet: bool) -> Iterator[_Share]:
        """This rank's micro-batches, one whole global batch of samples in memory at a time."""
        position = first = self.start_sample
        held: list[Any] = []
        epochs: list[int] = []
        for epoch, sample in self._stream(quiet):
            complete = position % self.global_batch_size == 0
            if self.epochs is not None and epoch >= self.epochs and (complete or self.incomplete == "drop"):
                break
            held.append(sample)
            epochs.append(epoch)
            position += 1
            if position % self.global_batch_size == 0:
                for start in range(self.rank * self.micro_batch_size, len(held), self.step_size):
                    mine = slice(start, start + self.micro_batch_size)
                    yield _Share(held[mine], first + start, epochs[mine])
                first, held, epochs = position, [], []
        if position < self.global_batch_size:
            raise DataError(
                f"{self._named()}: {position} {self.noun}s in {self.epochs} epoch(s) do not fill one global batch of "
                f"{self.global_batch_size}; expected at least that many: add {self.noun}s or epochs, or lower the "
                "batch size"
            )

    def _stream(self, quiet: bool) -> Iterator[tuple[int, Any]]:
        """(epoch, sample) from ``start_sample`` on, without end. Of whole epochs before it only the first is read."""
        epoch, to_skip = 0, self.start_sample
        while True:
            bad = BadSamples(self.on_bad_sample, quiet)
            size = 0
            for sample in self._epoch(epoch, bad):
                size += 1
                if to_skip >= size:
                    continue
                yield epoch, sample
            self.skipped += bad.count
            if size == 0:
                raise self._no_sample(bad.count)
            if bad.count and not quiet:
                logger.warning("epoch %d: skipped %d unusable samples beside %d %ss", epoch, bad.count, size, self.noun)
            skipped_epochs = to_skip // size
            epoch += max(skipped_epochs, 1)
            to_skip = to_skip - skipped_epochs * size if skipped_epochs else 0

    def _epoch(self, epoch: int, bad: BadSamples) -> Iterator[Any]:
        """Epoch ``epoch`` in its order."""
        files = list(self.files)
        if self.shuffle_buffer == 0:
            return self._read_files(files, bad)
        # A string seeds through SHA-512: the same on every machine, and unlike neighbouring integers never correlated.
        random.Random(f"{self.seed}/{epoch}/files").shuffle(files)
        order = random.Random(f"{self.seed}/{epoch}/prompts")
        buffered = wds.shuffle(self.shuffle_buffer, initial=self.shuffle_buffer, rng=order)
        samples: Iterator[Any] = buffered(self._read_files(files, bad))
        return samples

    def _read_files(self, files: list[Path], bad: BadSamples) -> Iterator[Any]:
        for file in files:
            yield from self.read(file, bad)

    def _named(self) -> str:
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"{self.files[0]}{more}"

    def _no_sample(self, bad: int) -> DataError:
        return DataError(
            f"{self._named()}: not one usable {self.noun} ({bad} unusable); set on_bad_sample=error to see why"
        )


@dataclass(frozen=True)
class _Failure:
    """A DataError on its way out of a worker. Raised there, it would arrive as a traceback in a string."""

    message: str


class _InWorker(IterableDataset[Any]):
    """The stream as a worker iterates it: a DataError becomes the last item instead of an exception."""

    def __init__(self, stream: SampleStream) -> None:
        super().__init__()
        self.stream = stream

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.stream
        except DataError as error:
            yield _Failure(str(error))


class StreamLoader(DataLoader[Any]):
    """A DataLoader over a :class:`SampleStream` (attribute ``stream``); DataErrors arrive whole from workers."""

    def __init__(self, stream: SampleStream, num_workers: int = 0) -> None:
        check_whole("num_workers", num_workers, 0)
        # With a generator of its own the loader leaves torch's global random state alone, which resuming relies on.
        super().__init__(
            _InWorker(stream),
            batch_size=None,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),
        )
        self.stream = stream

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, _Failure):
                raise DataError(batch.message)
            yield batch


def _as_it_is(batch: Any) -> Any:
    return batch


def check_whole(name: str, value: object, least: int) -> None:
    """Raises :class:`DataError` unless ``value`` is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise DataError(f"{name} is {value!r}; expected a whole number of at least {least}")
