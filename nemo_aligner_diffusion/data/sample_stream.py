"""A stream of samples in an order that only the files and the seed decide, and each rank's share of it.

**The order.** Epoch *e* is the samples in an order drawn from ``(seed, e)`` (:mod:`.epoch_order`). Epoch follows epoch
without end, never mixed, so each sample comes once an epoch. The *global sample index* is the position in this stream.
Neither the number of ranks nor that of workers enters, so a run is the same under any layout and resuming needs one
number: the samples consumed.

**Who reads what.** With ``world_size`` W ranks and micro-batches of B, micro-step *m* covers the positions
``[m*B*W, (m+1)*B*W)`` and rank *r* gets ``[m*B*W + r*B, m*B*W + (r+1)*B)`` of them. Worker *w* of K makes micro-steps
w, w+K, w+2K, …; the loader asks the workers in turn, which restores the order exactly. An index (:mod:`.shard_index`)
says where each sample is, so each rank and worker reads its own samples and no others, and nothing has to be agreed
between ranks: nothing can hang on shards of unequal size.

Compressed files have no index: of them every rank and worker reads *everything* and keeps its share.
"""

from __future__ import annotations

import logging
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info

from nemo_aligner_diffusion.data.bad_samples import BadSamples, OnBadSample, warn_of
from nemo_aligner_diffusion.data.epoch_order import epoch_rows
from nemo_aligner_diffusion.data.epoch_reader import EpochReader, SpanReader
from nemo_aligner_diffusion.data.paths import SHARD_SUFFIXES, PathSpec, expand_paths
from nemo_aligner_diffusion.data.shard_index import NotIndexableError, ShardIndex, Span, open_index
from nemo_aligner_diffusion.errors import DataError

logger = logging.getLogger(__name__)


class Share(NamedTuple):
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
        on_bad_sample: ``"error"`` stops at an unusable sample; ``"skip"`` warns, counts and goes on.
        on_bad_shard: the same for files that are unreadable, damaged or empty, None: as ``on_bad_sample``. Under
            ``"skip"``, the samples of a file that becomes unreadable while it is in use are replaced, each by another
            one that its position in the stream determines.
        index_folder: for index files of :func:`.shard_index.open_index`.

    Attributes:
        index: where the samples are; None for compressed files.
        skipped: unusable samples passed over so far in this process (workers report theirs themselves).
        replaced: samples that became unreadable and were replaced so far in this process.
        reading: called with the number of a file (in ``files``) and a global sample index before something is read.

    Raises:
        DataError: on construction for missing files, numbers that do not fit, and under ``"error"`` for anything
            unusable (in compressed files: for a first shard without a readable first sample); while iterating for what
            becomes unreadable, for anything unusable in compressed files, and for a finite stream without one batch.
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
        on_bad_shard: OnBadSample | None = None,
        index_folder: str | os.PathLike[str] | None = None,
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
        self.on_bad_shard: OnBadSample = on_bad_shard or on_bad_sample
        self.skipped = 0
        self.replaced = 0
        self.reading: Callable[[int, int], None] = no_word
        self.files = expand_paths(paths, check=self._bad(quiet=True).shard_policy == "error")
        self.index = self._open_index(Path(index_folder) if index_folder is not None else None)
        if self.index is None:
            # One sample now, so that a wrong folder or format is known before a model is loaded.
            first = self._bad(quiet=True)
            if not any(True for file in self.files for _ in islice(self.read(file, first), 1)):
                raise self._no_sample(first.count)

    @property
    def kind(self) -> str:
        """Everything beside the files that an index depends on."""
        return f"{type(self).__module__}.{type(self).__qualname__} {self.on_bad_sample} {self.on_bad_shard}"

    @abstractmethod
    def read(self, file: Path, bad: BadSamples) -> Iterator[Any]:
        """The samples of one file in file order, one in memory at a time; ``bad`` decides about unusable ones."""

    @abstractmethod
    def scan(self, file: Path, bad: BadSamples) -> Iterator[Span]:
        """Where each sample of :meth:`read` is."""

    @abstractmethod
    def parse(self, data: bytes, tag: int, file: Path) -> Any:
        """The sample in the bytes of a span; raises DataError."""

    @abstractmethod
    def collate(self, items: list[Any], index: torch.Tensor, epochs: list[int]) -> Any:
        """A batch of B samples; ``index`` (B,) int64 global sample indices, ``epochs`` of each, from 0."""

    def __iter__(self) -> Iterator[Any]:
        process = get_worker_info()
        worker, workers = (None, 1) if process is None else (process.id, process.num_workers)
        shares = self._indexed_shares if self.index is not None else self._streamed_shares
        for share in shares(worker, workers):
            index = torch.arange(share.first, share.first + len(share.items))
            yield self.collate(share.items, index, share.epochs)

    # --- files with an index

    def _open_index(self, folder: Path | None) -> ShardIndex | None:
        if any(file.name.lower().endswith(SHARD_SUFFIXES[1:]) for file in self.files):
            return None
        try:
            index = open_index(self.files, self.kind, self.scan, lambda: self._bad(quiet=True), folder)
        except NotIndexableError:
            return None
        if len(index) == 0:
            raise self._no_sample(index.bad_samples)
        return index

    def _indexed_shares(self, worker: int | None, workers: int) -> Iterator[Share]:
        """This worker's micro-batches: every other sample is passed over without being read."""
        assert self.index is not None
        turn = worker or 0
        size = len(self.index)
        stop = self._end(size)
        position = self.start_sample
        epoch, start = divmod(position, size)
        items: list[Any] = []
        epochs: list[int] = []
        first = position
        with closing(SpanReader(self.files)) as spans:
            while stop is None or position < stop:
                reader = EpochReader(self, spans, epoch, worker)
                if self.epochs is None or epoch < self.epochs:
                    reader.report_skipped(speaker=self.rank == 0 and turn == 0)
                for rows in epoch_rows(self.index.counts, self.seed, epoch, self.shuffle_buffer, start):
                    positions = np.arange(position, position + len(rows))
                    position += len(rows)
                    numbers, places = np.divmod(positions - self.start_sample, self.step_size)
                    mine = (places // self.micro_batch_size == self.rank) & (numbers % workers == turn)
                    if stop is not None:
                        mine &= positions < stop
                    chosen = np.flatnonzero(mine)
                    for place, row in zip(positions[chosen].tolist(), reader.located(rows[chosen]), strict=True):
                        first = first if items else place
                        items.append(reader.sample(place, row))
                        epochs.append(epoch)
                        if len(items) == self.micro_batch_size:
                            yield Share(items, first, epochs)
                            items, epochs = [], []
                    if stop is not None and position >= stop:
                        break
                reader.report_replaced()
                epoch, start = epoch + 1, 0

    def _end(self, size: int) -> int | None:
        """Global samples of the whole stream, with ``size`` an epoch; None: no end."""
        if self.epochs is None:
            return None
        whole = self.epochs * size
        batches = -(-whole // self.global_batch_size) if self.incomplete == "wrap" else whole // self.global_batch_size
        if batches == 0:
            raise self._too_few(whole)
        return batches * self.global_batch_size

    # --- compressed files

    def _streamed_shares(self, worker: int | None, workers: int) -> Iterator[Share]:
        """This worker's micro-batches, one whole global batch of samples in memory at a time."""
        turn = worker or 0
        quiet = self.rank > 0 or turn > 0  # every process meets the same unusable samples
        position = first = self.start_sample
        number = 0  # of this rank's micro-batches
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
                    if number % workers == turn:
                        yield Share(held[mine], first + start, epochs[mine])
                    number += 1
                first, held, epochs = position, [], []
        if position < self.global_batch_size:
            raise self._too_few(position)

    def _stream(self, quiet: bool) -> Iterator[tuple[int, Any]]:
        """(epoch, sample) from ``start_sample`` on, without end. Of whole epochs before it only the first is read."""
        epoch, to_skip, known = 0, self.start_sample, None
        while True:
            bad = self._bad(quiet)
            size = 0
            for sample in self._epoch(epoch, bad):
                size += 1
                if to_skip >= size:
                    continue
                yield epoch, sample
            self.skipped += bad.count
            if size == 0:
                raise self._no_sample(bad.count)
            if known is not None and size != known:
                raise DataError(
                    f"{self.named()}: {size} {self.noun}s in epoch {epoch} and {known} in the one before; a compressed "
                    "shard was changed or became unreadable, and no other process would know: restore it, or use "
                    "uncompressed shards (.tar), whose samples can be replaced"
                )
            first, known = known is None, size
            if not quiet:
                warn_of(bad.notes if first else [], 0)
                self.report_skipped(epoch, bad.count, bad.shards, size)
            skipped_epochs = to_skip // size
            epoch += max(skipped_epochs, 1)
            to_skip = to_skip - skipped_epochs * size if skipped_epochs else 0

    def _epoch(self, epoch: int, bad: BadSamples) -> Iterator[Any]:
        """Epoch ``epoch`` in its order."""
        files = list(range(len(self.files)))
        if self.shuffle_buffer == 0:
            return self._read_files(files, bad)
        random.Random(f"{self.seed}/{epoch}/files").shuffle(files)
        order = random.Random(f"{self.seed}/{epoch}/prompts")
        buffered = wds.shuffle(self.shuffle_buffer, initial=self.shuffle_buffer, rng=order)
        samples: Iterator[Any] = buffered(self._read_files(files, bad))
        return samples

    def _read_files(self, files: list[int], bad: BadSamples) -> Iterator[Any]:
        for file in files:
            self.reading(file, -1)
            yield from self.read(self.files[file], bad)

    # --- messages

    def _bad(self, quiet: bool) -> BadSamples:
        return BadSamples(self.on_bad_sample, quiet, self.on_bad_shard)

    def report_skipped(self, epoch: int, samples: int, shards: int, size: int) -> None:
        """Warn about the unusable ones of an epoch of ``size`` usable samples, if there are any."""
        if samples:
            logger.warning(
                "epoch %d: skipped %d unusable samples beside %d %ss%s",
                epoch,
                samples,
                size,
                self.noun,
                f" ({shards} of them shards that are unreadable, or damaged from some place on)" if shards else "",
            )

    def named(self) -> str:
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"{self.files[0]}{more}"

    def _no_sample(self, bad: int) -> DataError:
        return DataError(
            f"{self.named()}: not one usable {self.noun} ({bad} unusable); set on_bad_sample=error to see why"
        )

    def _too_few(self, count: int) -> DataError:
        return DataError(
            f"{self.named()}: {count} {self.noun}s in {self.epochs} epoch(s) do not fill one global batch of "
            f"{self.global_batch_size}; expected at least that many: add {self.noun}s or epochs, or lower the "
            "batch size"
        )


def no_word(file: int, position: int) -> None:
    pass


def check_whole(name: str, value: object, least: int) -> None:
    """Raises :class:`DataError` unless ``value`` is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise DataError(f"{name} is {value!r}; expected a whole number of at least {least}")
