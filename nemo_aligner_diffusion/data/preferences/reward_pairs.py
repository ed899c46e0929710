"""Preference pairs in batches for a reward: :mod:`nemo_aligner_diffusion.data.sample_stream` over preference shards.

Pictures are decoded here, and resized and cropped by the very function with which the reward prepares its pictures, so
that what is learnt is what is scored; loader workers do it beside the training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from nemo_aligner_diffusion.data.datamodule import StreamDataModule
from nemo_aligner_diffusion.data.paths import PathSpec
from nemo_aligner_diffusion.data.preferences.pair_stream import PairStream
from nemo_aligner_diffusion.data.preferences.shards import EncodedPair, PreferencePair
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


class PreferenceDataset(PairStream):
    """This rank's micro-batches of pairs; order and further arguments are those of :class:`.PairStream`.

    Args:
        prepare: (1, 3, H, W) in [0, 1] to (1, 3, S, S); the reward's, its statistics are left to the training step.
    """

    def __init__(self, paths: PathSpec, *, prepare: Callable[[Tensor], Tensor], **stream: Any) -> None:
        self.prepare = prepare
        super().__init__(paths, **stream)

    def content(self, pair: PreferencePair | EncodedPair) -> tuple[Tensor, Tensor]:
        """Its pictures, each ``(3, H, W)``."""
        if isinstance(pair, EncodedPair):
            raise ValueError("has latents in place of its pictures, which a reward cannot see; expected .jpg_0, .jpg_1")
        return _decoded(pair)

    def collate(
        self, items: list[tuple[PreferencePair, tuple[Tensor, Tensor]]], index: Tensor, epochs: list[int]
    ) -> PreferenceBatch:
        return {
            "images": torch.stack([torch.cat([self.prepare(picture[None]) for picture in both]) for _, both in items]),
            "prompts": [pair.prompt for pair, _ in items],
            "labels": torch.tensor([pair.label for pair, _ in items]),
            "index": index,
            "counts": torch.tensor([self.epochs is None or epoch < self.epochs for epoch in epochs]),
        }


def pictures(pair: PreferencePair) -> tuple[Tensor, Tensor]:
    """The two pictures of a pair, each ``(3, H, W)`` float32 in ``[0, 1]``.

    Raises:
        DataError: one cannot be decoded.
    """
    try:
        return _decoded(pair)
    except ValueError as error:
        raise DataError(f"{pair.origin} {error}") from error


def _decoded(pair: PreferencePair) -> tuple[Tensor, Tensor]:
    arrays = (np.array(decode_picture(data)) for data in pair.pictures)
    first, second = (torch.from_numpy(array).permute(2, 0, 1).float() / 255 for array in arrays)
    return first, second


class PreferenceDataModule(StreamDataModule):
    """The preference pairs of a training run; ``prepare`` is :class:`PreferenceDataset`'s."""

    def __init__(self, *args: Any, prepare: Callable[[Tensor], Tensor], **options: Any) -> None:
        super().__init__(*args, **options)
        self.prepare = prepare

    def build_dataset(self, paths: PathSpec, **options: Any) -> PreferenceDataset:
        return PreferenceDataset(paths, prepare=self.prepare, **options)
