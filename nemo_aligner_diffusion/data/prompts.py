"""A stream of prompts in an order that only the files and the seed decide, and each rank's share of it.

**The order.** Epoch *e* is the shards in an order drawn from ``(seed, e)``, their prompts passed through a shuffle
buffer of ``shuffle_buffer`` prompts drawn from the same pair. Epoch follows epoch without end, never mixed, so each
prompt comes once an epoch. The *global sample index* is the position in this stream. Neither the number of ranks nor
that of workers enters, so a run is the same under any layout and resuming needs one number: the samples consumed.

**Who reads what.** With ``world_size`` W ranks and micro-batches of B, micro-step *m* covers the positions
``[m*B*W, (m+1)*B*W)`` and rank *r* gets ``[m*B*W + r*B, m*B*W + (r+1)*B)`` of them. Every rank, and every worker of a
rank, reads *all* shards and keeps its share: prompts are some hundred bytes, a pass costs microseconds a prompt
(``docs/data.md`` has the figure), and nothing has to be agreed between ranks, so nothing can hang on shards of
unequal size. Worker *w* of K makes micro-steps w, w+K, w+2K, …; the loader asks the workers in turn, which restores
the order exactly.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
import webdataset as wds
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from nemo_aligner_diffusion.data.paths import PathSpec, expand_paths
from nemo_aligner_diffusion.data.prompt_files import BadSamples, OnBadSample, read_file
from nemo_aligner_diffusion.errors import DataError

__all__ = ["PromptBatch", "PromptDataset", "PromptLoader", "build_prompt_loader", "expand_paths", "read_prompts"]

logger = logging.getLogger(__name__)


class PromptBatch(TypedDict):
    """One rank's micro-batch: ``index`` (B,) int64 global sample indices; ``epoch`` (from 0) of the first sample."""

    prompts: list[str]
    index: torch.Tensor
    epoch: int


class PromptDataset(IterableDataset[PromptBatch]):
    """This rank's micro-batches of the stream that the module's docstring defines.

    Every iteration starts at ``start_sample``.

    Args:
        paths: what :func:`expand_paths` accepts.
        micro_batch_size: prompts a batch on this rank (B).
        seed: of the order.
        shuffle_buffer: prompts held for shuffling. 0 keeps the order of files and prompts as given (for validation); 1
            shuffles the files only.
        rank, world_size: *data-parallel* ones; the ranks of a tensor-parallel group share a rank here.
        epochs: passes over the data; None for no end.
        global_batch_size: prompts an optimizer step over all ranks; a multiple of ``micro_batch_size * world_size``,
            which is its default. It matters only for where a finite stream ends.
        incomplete: a finite stream that does not fill its last global batch ends before it (``"drop"``) or fills it
            with the first prompts of the following epoch (``"wrap"``; their ``index`` is beyond the last true one).
            Either way all ranks get equally many batches.
        start_sample: global samples already consumed; a multiple of ``micro_batch_size * world_size``.
        on_bad_sample: ``"error"`` stops at the first unusable prompt or shard; ``"skip"`` warns, counts and goes on.

    Attributes:
        skipped: unusable samples passed over so far in this process (workers report theirs themselves).

    Raises:
        DataError: on construction for missing files, a first shard without a readable first prompt, or numbers that do
            not fit; while iterating for anything unusable found later, and for a finite stream without one batch.
    """

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
        _check_whole("micro_batch_size", micro_batch_size, 1)
        _check_whole("shuffle_buffer", shuffle_buffer, 0)
        _check_whole("world_size", world_size, 1)
        _check_whole("rank", rank, 0)
        _check_whole("start_sample", start_sample, 0)
        if epochs is not None:
            _check_whole("epochs", epochs, 1)
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
        # One prompt now, so that a wrong folder or format is known before a model is loaded; the rest when reached.
        first = BadSamples(on_bad_sample, quiet=True)
        if not any(True for file in self.files for _ in islice(read_file(file, first), 1)):
            raise self._no_prompt(first.count)

    def __iter__(self) -> Iterator[PromptBatch]:
        worker = get_worker_info()
        turn, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        speaker = self.rank == 0 and turn == 0  # every process meets the same unusable samples
        for number, batch in enumerate(self._batches(quiet=not speaker)):
            if number % workers == turn:
                yield batch

    def _batches(self, quiet: bool) -> Iterator[PromptBatch]:
        """This rank's micro-batches, one whole global batch of prompts in memory at a time."""
        position = first = self.start_sample
        held: list[str] = []
        epochs: list[int] = []
        for epoch, prompt in self._stream(quiet):
            complete = position % self.global_batch_size == 0
            if self.epochs is not None and epoch >= self.epochs and (complete or self.incomplete == "drop"):
                break
            held.append(prompt)
            epochs.append(epoch)
            position += 1
            if position % self.global_batch_size == 0:
                for start in range(self.rank * self.micro_batch_size, len(held), self.step_size):
                    stop = start + self.micro_batch_size
                    index = torch.arange(first + start, first + stop)
                    yield {"prompts": held[start:stop], "index": index, "epoch": epochs[start]}
                first, held, epochs = position, [], []
        if position < self.global_batch_size:
            raise DataError(
                f"{self._named()}: {position} prompts in {self.epochs} epoch(s) do not fill one global batch of "
                f"{self.global_batch_size}; expected at least that many: add prompts or epochs, or lower the batch size"
            )

    def _stream(self, quiet: bool) -> Iterator[tuple[int, str]]:
        """(epoch, prompt) from ``start_sample`` on, without end. Of whole epochs before it only the first is read."""
        epoch, to_skip = 0, self.start_sample
        while True:
            bad = BadSamples(self.on_bad_sample, quiet)
            size = 0
            for prompt in self._epoch(epoch, bad):
                size += 1
                if to_skip >= size:
                    continue
                yield epoch, prompt
            self.skipped += bad.count
            if size == 0:
                raise self._no_prompt(bad.count)
            if bad.count and not quiet:
                logger.warning("epoch %d: skipped %d unusable samples beside %d prompts", epoch, bad.count, size)
            skipped_epochs = to_skip // size
            epoch += max(skipped_epochs, 1)
            to_skip = to_skip - skipped_epochs * size if skipped_epochs else 0

    def _epoch(self, epoch: int, bad: BadSamples) -> Iterator[str]:
        """Epoch ``epoch`` in its order."""
        files = list(self.files)
        if self.shuffle_buffer == 0:
            return _read_files(files, bad)
        # A string seeds through SHA-512: the same on every machine, and unlike neighbouring integers never correlated.
        random.Random(f"{self.seed}/{epoch}/files").shuffle(files)
        order = random.Random(f"{self.seed}/{epoch}/prompts")
        buffered = wds.shuffle(self.shuffle_buffer, initial=self.shuffle_buffer, rng=order)
        prompts: Iterator[str] = buffered(_read_files(files, bad))
        return prompts

    def _named(self) -> str:
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"{self.files[0]}{more}"

    def _no_prompt(self, bad: int) -> DataError:
        return DataError(f"{self._named()}: not one usable prompt ({bad} unusable); set on_bad_sample=error to see why")


@dataclass(frozen=True)
class _Failure:
    """A DataError on its way out of a worker. Raised there, it would arrive as a traceback in a string."""

    message: str


class _InWorker(IterableDataset[Any]):
    """The dataset as a worker iterates it: a DataError becomes the last item instead of an exception."""

    def __init__(self, dataset: PromptDataset) -> None:
        super().__init__()
        self.dataset = dataset

    def __iter__(self) -> Iterator[PromptBatch | _Failure]:
        try:
            yield from self.dataset
        except DataError as error:
            yield _Failure(str(error))


class PromptLoader(DataLoader[Any]):
    """A DataLoader over a :class:`PromptDataset` (attribute ``prompts``); DataErrors arrive whole from workers."""

    def __init__(self, prompts: PromptDataset, num_workers: int = 0) -> None:
        _check_whole("num_workers", num_workers, 0)
        # With a generator of its own the loader leaves torch's global random state alone, which resuming relies on.
        super().__init__(
            _InWorker(prompts),
            batch_size=None,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),
        )
        self.prompts = prompts

    def __iter__(self) -> Iterator[PromptBatch]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, _Failure):
                raise DataError(batch.message)
            yield batch


def build_prompt_loader(
    paths: PathSpec,
    *,
    micro_batch_size: int,
    seed: int = 0,
    shuffle_buffer: int = 10_000,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    epochs: int | None = None,
    global_batch_size: int | None = None,
    incomplete: Literal["drop", "wrap"] = "drop",
    start_sample: int = 0,
    on_bad_sample: OnBadSample = "error",
) -> PromptLoader:
    """Return the loader of this rank's batches; the arguments are those of :class:`PromptDataset`.

    The stream is the same for every ``num_workers``; 0 is enough beside any diffusion model.

    >>> loader = build_prompt_loader("prompts-{0000..0012}.tar", micro_batch_size=4)  # doctest: +SKIP
    >>> next(iter(loader))["prompts"]  # doctest: +SKIP
    """
    dataset = PromptDataset(
        paths,
        micro_batch_size=micro_batch_size,
        seed=seed,
        shuffle_buffer=shuffle_buffer,
        rank=rank,
        world_size=world_size,
        epochs=epochs,
        global_batch_size=global_batch_size,
        incomplete=incomplete,
        start_sample=start_sample,
        on_bad_sample=on_bad_sample,
    )
    return PromptLoader(dataset, num_workers)


def read_prompts(paths: PathSpec, limit: int | None = None, on_bad_sample: OnBadSample = "error") -> list[str]:
    """Return the first ``limit`` prompts in file order, for the fixed prompts of validation and reports.

    Raises:
        DataError: as :class:`PromptDataset`; also when there is no prompt at all.
    """
    files = expand_paths(paths)
    prompts = list(islice(_read_files(files, BadSamples(on_bad_sample)), limit))
    if not prompts and limit != 0:
        raise DataError(
            f"{files[0]}: not one usable prompt in {len(files)} file(s); set on_bad_sample=error to see why"
        )
    return prompts


def _read_files(files: list[Path], bad: BadSamples) -> Iterator[str]:
    for file in files:
        yield from read_file(file, bad)


def _as_it_is(batch: Any) -> Any:
    return batch


def _check_whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise DataError(f"{name} is {value!r}; expected a whole number of at least {least}")
