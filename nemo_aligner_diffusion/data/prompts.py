"""Prompts in batches: :mod:`.sample_stream` (which defines their order and each rank's share) over prompt files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Literal, TypedDict

import torch

from nemo_aligner_diffusion.data.bad_samples import BadSamples, OnBadSample, warn_of
from nemo_aligner_diffusion.data.paths import PathSpec, expand_paths
from nemo_aligner_diffusion.data.prompt_files import locate_prompts, parse_prompt
from nemo_aligner_diffusion.data.sample_stream import SampleStream
from nemo_aligner_diffusion.data.shard_index import Span, checksum
from nemo_aligner_diffusion.data.stream_loader import WORKER_TIMEOUT_SECONDS, StreamLoader
from nemo_aligner_diffusion.errors import DataError

__all__ = ["PromptBatch", "PromptDataset", "PromptLoader", "build_prompt_loader", "expand_paths", "read_prompts"]


class PromptBatch(TypedDict):
    """One rank's micro-batch: ``index`` (B,) int64 global sample indices; ``epoch`` (from 0) of the first sample."""

    prompts: list[str]
    index: torch.Tensor
    epoch: int


class PromptDataset(SampleStream):
    """This rank's micro-batches of prompts; arguments, order and errors are those of :class:`.SampleStream`."""

    noun = "prompt"

    def read(self, file: Path, bad: BadSamples) -> Iterator[str]:
        return (located.prompt for located in locate_prompts(file, bad))

    def scan(self, file: Path, bad: BadSamples) -> Iterator[Span]:
        for _, offset, data, kind in locate_prompts(file, bad):
            yield Span(offset, len(data), checksum(data), kind)

    def parse(self, data: bytes, tag: int, file: Path) -> str:
        try:
            return parse_prompt(data, tag)
        except ValueError as error:
            raise DataError(f"{file}: a member {error}") from error

    def collate(self, items: list[str], index: torch.Tensor, epochs: list[int]) -> PromptBatch:
        return {"prompts": items, "index": index, "epoch": epochs[0]}


class PromptLoader(StreamLoader):
    """A DataLoader over a :class:`PromptDataset` (attribute ``stream``); DataErrors arrive whole from workers."""

    stream: PromptDataset

    def __iter__(self) -> Iterator[PromptBatch]:  # type: ignore[override]
        return super().__iter__()


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
    on_bad_shard: OnBadSample | None = None,
    index_folder: str | os.PathLike[str] | None = None,
    worker_timeout_seconds: float = WORKER_TIMEOUT_SECONDS,
) -> PromptLoader:
    """Return the loader of this rank's batches; the arguments are those of :class:`PromptDataset` and `StreamLoader`.

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
        on_bad_shard=on_bad_shard,
        index_folder=index_folder,
    )
    return PromptLoader(dataset, num_workers, worker_timeout_seconds)


def read_prompts(
    paths: PathSpec,
    limit: int | None = None,
    on_bad_sample: OnBadSample = "error",
    on_bad_shard: OnBadSample | None = None,
) -> list[str]:
    """Return the first ``limit`` prompts in file order, for the fixed prompts of validation and reports.

    Raises:
        DataError: as :class:`PromptDataset`; also when there is no prompt at all.
    """
    bad = BadSamples(on_bad_sample, shard_policy=on_bad_shard)
    files = expand_paths(paths, check=bad.shard_policy == "error")
    prompts = [located.prompt for located in islice(chain.from_iterable(locate_prompts(f, bad) for f in files), limit)]
    warn_of(bad.notes, 0)
    if not prompts and limit != 0:
        raise DataError(
            f"{files[0]}: not one usable prompt in {len(files)} file(s); set on_bad_sample=error to see why"
        )
    return prompts
