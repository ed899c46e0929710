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
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import IterableDataset, get_worker_info

from nemo_aligner_diffusion.data.bad_samples import BadSamples, OnBadSample, warn_of
from nemo_aligner_diffusion.data.paths import PathSpec, expand_paths
from nemo_aligner_diffusion.data.sample_reader import SampleReader
from nemo_aligner_diffusion.data.shard_index import open_index
from nemo_aligner_diffusion.data.spans import Span
from nemo_aligner_diffusion.errors import DataError

logger = logging.getLogger(__name__)


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
        repeats: how many times in a row each micro-batch comes.
        start_repeat: how many times the first one has come already.
        on_bad_sample: ``"error"`` stops at an unusable sample; ``"skip"`` warns, counts and goes on.
        on_bad_shard: the same for files that are unreadable, damaged or empty, None: as ``on_bad_sample``. Under
            ``"skip"``, the samples of a file that becomes unreadable while it is in use are replaced, each by another
            one that its position in the stream determines.
        index_folder: for the index files of :func:`.shard_index.open_index`.

    Attributes:
        index: where the samples are, and what was left out.
        end: global samples of the whole stream; None: no end.
        replaced: samples that became unreadable and were replaced so far in this process.

    Raises:
        DataError: on construction for missing files, numbers that do not fit, a finite stream without one batch, and
            under ``"error"`` for anything unusable; while iterating for what becomes unreadable.
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
        repeats: int = 1,
        start_repeat: int = 0,
        on_bad_sample: OnBadSample = "error",
        on_bad_shard: OnBadSample | None = None,
        index_folder: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        check_whole("micro_batch_size", micro_batch_size, 1)
        check_whole("shuffle_buffer", shuffle_buffer, 0)
        check_whole("start_sample", start_sample, 0)
        check_whole("repeats", repeats, 1)
        check_whole("start_repeat", start_repeat, 0)
        check_whole("epochs", 1 if epochs is None else epochs, 1)
        if not 0 <= rank < world_size:
            raise DataError(f"rank is {rank}; expected less than world_size {world_size}")
        if incomplete not in ("drop", "wrap"):
            raise DataError(f"incomplete is {incomplete!r}; expected 'drop' or 'wrap'")
        self.step_size = micro_batch_size * world_size
        self.global_batch_size = self.step_size if global_batch_size is None else global_batch_size
        fitting = f"micro_batch_size × data-parallel ranks = {micro_batch_size} × {world_size} = {self.step_size}"
        if self.global_batch_size < 1 or self.global_batch_size % self.step_size:
            raise DataError(f"global_batch_size is {global_batch_size}; expected a multiple of {fitting}")
        if start_sample % self.step_size:
            raise DataError(
                f"start_sample is {start_sample}; expected a multiple of {fitting}: resume with a layout that divides "
                "it"
            )
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.rank = rank
        self.epochs = epochs
        self.start_sample = start_sample
        self.repeats = repeats
        self.start_repeat = start_repeat
        self.on_bad_sample: OnBadSample = on_bad_sample
        self.on_bad_shard: OnBadSample = on_bad_shard or on_bad_sample
        self.replaced = 0
        self.files = expand_paths(paths, check=self.on_bad_shard == "error")
        folder = Path(index_folder) if index_folder is not None else None
        self.index = open_index(self.files, self.kind, self.scan, self._bad, folder)
        if len(self.index) == 0:
            unusable, notes = self.index.left_out["samples"], self.index.left_out["notes"]
            why = "; ".join(notes) if notes and not unusable else "set on_bad_sample=error to see why"
            raise DataError(f"{self.named()}: not one usable {self.noun} ({unusable} unusable); {why}")
        self.end = None if epochs is None else self._end(epochs * len(self.index), incomplete)

    @property
    def kind(self) -> str:
        """Everything beside the files that an index depends on."""
        return f"{type(self).__module__}.{type(self).__qualname__} {self.on_bad_sample} {self.on_bad_shard}"

    @abstractmethod
    def scan(self, file: Path, bad: BadSamples) -> Iterator[Span]:
        """Where each sample of one file is, in file order, one in memory at a time; ``bad`` decides about unusable
        ones. Of a compressed file the spans hold their bytes."""

    @abstractmethod
    def parse(self, data: bytes, tag: int, file: Path) -> Any:
        """The sample in the bytes of a span; raises DataError."""

    @abstractmethod
    def collate(self, items: list[Any], index: torch.Tensor, epochs: list[int]) -> Any:
        """A batch of B samples; ``index`` (B,) int64 global sample indices, ``epochs`` of each, from 0."""

    def positions(self, number: int) -> range:
        """Global sample indices of this rank's micro-batch ``number``, from 0."""
        whole = (self.start_repeat + number) // self.repeats
        first = self.start_sample + whole * self.step_size + self.rank * self.micro_batch_size
        return range(first, first + self.micro_batch_size)

    def __iter__(self) -> Iterator[Any]:
        process = get_worker_info()
        worker, workers = (None, 1) if process is None else (process.id, process.num_workers)
        epoch = -1
        with closing(SampleReader(self, worker)) as reader:
            for number in count(worker or 0, workers):
                positions = self.positions(number)
                if self.end is not None and positions.start >= self.end:
                    break
                if positions.start // len(self.index) != epoch:
                    reader.end_epoch(epoch)
                    epoch = positions.start // len(self.index)
                    if self.rank == 0 and not worker:  # for all: they share the index
                        self._say_what_is_left_out(epoch)
                items = [reader.sample(position) for position in positions]
                epochs = [position // len(self.index) for position in positions]
                yield self.collate(items, torch.arange(positions.start, positions.stop), epochs)
            reader.end_epoch(epoch)

    def named(self) -> str:
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"{self.files[0]}{more}"

    def _bad(self) -> BadSamples:
        return BadSamples(self.on_bad_sample, self.on_bad_shard)

    def _end(self, whole: int, incomplete: str) -> int:
        """Global samples of a stream of ``whole`` samples."""
        batches = -(-whole // self.global_batch_size) if incomplete == "wrap" else whole // self.global_batch_size
        if batches == 0:
            raise DataError(
                f"{self.named()}: {whole} {self.noun}s in {self.epochs} epoch(s) do not fill one global batch of "
                f"{self.global_batch_size}; expected at least that many: add {self.noun}s or epochs, or lower the "
                "batch size"
            )
        return batches * self.global_batch_size

    def _say_what_is_left_out(self, epoch: int) -> None:
        left_out = self.index.left_out
        if self.start_sample // len(self.index) == epoch:
            warn_of(left_out)
        if left_out["samples"]:
            logger.warning(
                "epoch %d: skipped %d unusable samples beside %d %ss%s",
                epoch,
                left_out["samples"],
                len(self.index),
                self.noun,
                f" ({left_out['shards']} of them shards that are unreadable, or damaged from some place on)"
                if left_out["shards"]
                else "",
            )


def check_whole(name: str, value: object, least: int) -> None:
    """Raises :class:`DataError` unless ``value`` is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise DataError(f"{name} is {value!r}; expected a whole number of at least {least}")
