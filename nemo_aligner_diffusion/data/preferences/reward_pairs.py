"""Preference pairs in batches for a reward: :mod:`nemo_aligner_diffusion.data.sample_stream` over preference shards.

Pictures are decoded here, and resized and cropped by the very function with which the reward prepares its pictures, so
that what is learnt is what is scored; loader workers do it beside the training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from nemo_aligner_diffusion.data.bad_samples import BadSamples
from nemo_aligner_diffusion.data.datamodule import StreamDataModule
from nemo_aligner_diffusion.data.paths import PathSpec
from nemo_aligner_diffusion.data.preferences.shards import (
    PreferencePair,
    locate_pairs,
    pair_in,
    pair_members,
    read_preference_file,
)
from nemo_aligner_diffusion.data.sample_stream import SampleStream
from nemo_aligner_diffusion.data.shard_index import is_compressed
from nemo_aligner_diffusion.data.shards import tar_sample
from nemo_aligner_diffusion.data.spans import Span, SpanReader, checksum
from nemo_aligner_diffusion.errors import DataError
from nemo_aligner_diffusion.formats.pictures import decode_picture


class PreferenceBatch(TypedDict):
    """One rank's micro-batch.

    ``images`` ``(B, 2, 3, S, S)`` float32, in ``[0, 1]`` but for the resize's overshoot; ``labels`` ``(B, 2)``;
    ``index`` ``(B,)`` global sample indices; ``counts`` ``(B,)`` bool: false for repetitions that fill the last batch
    of a validation.
    """

    images: Tensor
    prompts: list[str]
    labels: Tensor
    index: Tensor
    counts: Tensor


class PreferenceDataset(SampleStream):
    """This rank's micro-batches of pairs; order and further arguments are those of :class:`.SampleStream`.

    Args:
        prepare: (1, 3, H, W) in [0, 1] to (1, 3, S, S); the reward's, its statistics are left to the training step.

    Under ``on_bad_sample="skip"`` the process that makes the index decodes every picture, once.
    """

    noun = "pair"

    def __init__(self, paths: PathSpec, *, prepare: Callable[[Tensor], Tensor], **stream: Any) -> None:
        self.prepare = prepare
        super().__init__(paths, **stream)

    def scan(self, file: Path, bad: BadSamples) -> Iterator[Span]:
        decode = bad.policy == "skip"  # else an unusable pair is an error when its turn comes, and its pictures unread
        if is_compressed(file):
            for sample in pair_members(read_preference_file(file, bad, decode)):
                data = tar_sample(sample)
                yield Span(0, len(data), checksum(data), 0, data)
            return
        with closing(SpanReader([file])) as reader:
            for start, size in locate_pairs(file, bad, decode):
                yield Span(start, size, checksum(reader.read(0, start, size, 0)) if decode else 0, 0)

    def parse(self, data: bytes, tag: int, file: Path) -> PreferencePair:
        return pair_in(data, file, BadSamples(self.on_bad_sample))

    def collate(self, items: list[PreferencePair], index: Tensor, epochs: list[int]) -> PreferenceBatch:
        return {
            "images": torch.stack([torch.cat([self.prepare(p[None]) for p in pictures(pair)]) for pair in items]),
            "prompts": [pair.prompt for pair in items],
            "labels": torch.tensor([pair.label for pair in items]),
            "index": index,
            "counts": torch.tensor([self.epochs is None or epoch < self.epochs for epoch in epochs]),
        }


def pictures(pair: PreferencePair) -> tuple[Tensor, Tensor]:
    """The two pictures of a pair, each ``(3, H, W)`` float32 in ``[0, 1]``.

    Raises:
        DataError: one cannot be decoded.
    """
    try:
        arrays = [np.array(decode_picture(data)) for data in pair.pictures]
    except ValueError as error:
        raise DataError(f"{pair.origin} {error}") from error
    first, second = (torch.from_numpy(array).permute(2, 0, 1).float() / 255 for array in arrays)
    return first, second


class PreferenceDataModule(StreamDataModule):
    """The preference pairs of a training run; ``prepare`` is :class:`PreferenceDataset`'s."""

    def __init__(self, *args: Any, prepare: Callable[[Tensor], Tensor], **options: Any) -> None:
        super().__init__(*args, **options)
        self.prepare = prepare

    def build_dataset(self, paths: PathSpec, **options: Any) -> PreferenceDataset:
        return PreferenceDataset(paths, prepare=self.prepare, **options)
