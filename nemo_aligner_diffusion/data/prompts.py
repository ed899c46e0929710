"""Prompts in batches: :mod:`.sample_stream` (which defines their order and each rank's share) over prompt files."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from nemo_aligner_diffusion.data.bad_samples import BadSamples, OnBadSample, warn_of
from nemo_aligner_diffusion.data.paths import PathSpec, expand_paths
from nemo_aligner_diffusion.data.prompt_files import PROMPT_KEYS, locate_prompts, parse_prompt
from nemo_aligner_diffusion.data.sample_stream import SampleStream
from nemo_aligner_diffusion.data.spans import Span, checksum
from nemo_aligner_diffusion.data.stream_loader import WORKER_TIMEOUT_SECONDS, StreamLoader
from nemo_aligner_diffusion.errors import DataError


class PromptDataset(SampleStream):
    """This rank's micro-batches of prompts; arguments, order and errors are those of :class:`.SampleStream`.

    A batch is ``prompts``, a list of B strings; ``index`` ``(B,)`` int64 global sample indices; ``epoch``, from 0, of
    the first sample.

    Args:
        prompt_key: where the prompt is in ``.json`` members; None: ``prompt``, else ``caption``.
    """

    noun = "prompt"

    def __init__(self, paths: PathSpec, *, prompt_key: str | None = None, **options: Any) -> None:
        self.keys = _keys(prompt_key)
        super().__init__(paths, **options)

    @property
    def kind(self) -> str:
        return " ".join([super().kind, *map(repr, self.keys)])

    def scan(self, file: Path, bad: BadSamples) -> Iterator[Span]:
        for _, offset, data, kind in locate_prompts(file, bad, self.keys):
            yield Span(offset, len(data), checksum(data), kind, data)

    def parse(self, data: bytes, tag: int, file: Path) -> str:
        try:
            return parse_prompt(data, tag, self.keys)
        except ValueError as error:
            raise DataError(f"{file}: a member {error}") from error

    def collate(self, items: list[str], index: torch.Tensor, epochs: list[int]) -> dict[str, Any]:
        return {"prompts": items, "index": index, "epoch": epochs[0]}


def build_prompt_loader(
    paths: PathSpec,
    *,
    num_workers: int = 0,
    worker_timeout_seconds: float = WORKER_TIMEOUT_SECONDS,
    **options: Any,
) -> StreamLoader:
    """Return the loader of this rank's batches; ``options`` are the arguments of :class:`PromptDataset`.

    The stream is the same for every ``num_workers``; 0 is enough beside any diffusion model.

    >>> loader = build_prompt_loader("prompts-{0000..0012}.tar", micro_batch_size=4)  # doctest: +SKIP
    >>> next(iter(loader))["prompts"]  # doctest: +SKIP
    """
    return StreamLoader(PromptDataset(paths, **options), num_workers, worker_timeout_seconds)


def read_prompts(
    paths: PathSpec,
    limit: int | None = None,
    on_bad_sample: OnBadSample = "error",
    on_bad_shard: OnBadSample | None = None,
    prompt_key: str | None = None,
    distinct: bool = False,
) -> list[str]:
    """Return the first ``limit`` prompts in file order, for the fixed prompts of validation and reports.

    Args:
        distinct: no prompt twice: of preference shards each has several pairs.

    Raises:
        DataError: as :class:`PromptDataset`; also when there is no prompt at all.
    """
    bad = BadSamples(on_bad_sample, shard_policy=on_bad_shard)
    files = expand_paths(paths, check=bad.shard_policy == "error")
    located = chain.from_iterable(locate_prompts(file, bad, _keys(prompt_key)) for file in files)
    texts: Iterator[str] = (one.prompt for one in located)
    if distinct:
        seen: set[str] = set()
        texts = (text for text in texts if text not in seen and not seen.add(text))  # type: ignore[func-returns-value]
    prompts = list(islice(texts, limit))
    warn_of(bad.summary())
    if not prompts and limit != 0:
        raise DataError(
            f"{files[0]}: not one usable prompt in {len(files)} file(s); set on_bad_sample=error to see why"
        )
    return prompts


def _keys(prompt_key: str | None) -> tuple[str, ...]:
    return PROMPT_KEYS if prompt_key is None else (prompt_key,)
