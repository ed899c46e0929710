"""Preference pairs in batches for a diffusion model: :mod:`nemo_aligner_diffusion.data.sample_stream` over shards.

A picture is decoded (RGB, upright), resized bilinearly in 8 bits so that it just covers the model's size (of a square
one: the short side to it; a smaller picture is enlarged), and cropped: the middle, or where a draw says. Each picture
of a pair is treated by itself, with a draw of its own, and may have any size. That is what the public Diffusion-DPO
code does (SalesforceAIResearch/DiffusionDPO, ``train.py``), but that mirroring, its default, has to be asked for.

Latent shards (:mod:`.latents`) hold the result of all that as the VAE encoded it.
"""

from __future__ import annotations

import random
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nemo_aligner_diffusion.data.datamodule import StreamDataModule
from nemo_aligner_diffusion.data.paths import PathSpec
from nemo_aligner_diffusion.data.preferences.latents import Encoding, read_moments
from nemo_aligner_diffusion.data.preferences.pair_stream import LATENTS, PairStream
from nemo_aligner_diffusion.data.preferences.settings import PairSettings
from nemo_aligner_diffusion.data.preferences.shards import EncodedPair, PreferencePair
from nemo_aligner_diffusion.data.sample_reader import SampleReader
from nemo_aligner_diffusion.diffusion.generate import Sampling, picture_size
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.network.latents import moments, vae_fingerprint
from nemo_aligner_diffusion.diffusion.noise import key_to_seed
from nemo_aligner_diffusion.errors import DataError, printable
from nemo_aligner_diffusion.formats.pictures import MAX_PICTURE_PIXELS, decode_picture

TIES = "because they are ties, which say nothing of what is better; model.preference.tie_weight above 0 keeps them"


@dataclass(frozen=True)
class Wanted:
    """What the model that learns from the pairs takes.

    Attributes:
        height, width: of its pictures.
        vae: fingerprint of its VAE; None: there are pictures, of which that is not asked.
        shape: (C, h, w) of its VAE's latents.
    """

    height: int
    width: int
    vae: str | None = None
    shape: tuple[int, ...] | None = None


class PairDataset(PairStream):
    """This rank's micro-batches of pairs; order and further arguments are those of :class:`.SampleStream`.

    A batch is ``pictures`` ``(B, 2, 3, H, W)`` float32 in [0, 1], or from latent shards ``moments``
    ``(B, 2, 2, C, h, w)`` float32; ``prompts``, a list of B strings; ``labels`` ``(B, 2)`` float32, the share of the
    preference that each has, in the file's order; ``index`` ``(B,)`` int64 global sample indices.

    Two pictures that are the same are of no use. Pairs with equal shares are left out and counted where ``tie_weight``
    is 0.

    Args:
        wanted: of the model; None: the pairs are only indexed, and iterating is an error.

    Raises:
        DataError: beside what :class:`.SampleStream` raises: there are ties only; pictures are mixed with latents; the
            latents were made for another model, by another crop or mirroring. Names shard and sample.
    """

    def __init__(self, paths: PathSpec, *, settings: PairSettings, wanted: Wanted | None = None, **stream: Any) -> None:
        self.settings = settings
        self.wanted = wanted
        super().__init__(paths, **stream)
        tags = self.index.records["tag"]
        kinds = set(np.unique(tags).tolist())
        if len(kinds) > 1:
            file = self.files[self.index.file_of(int(np.argmax(tags != tags[0])))]
            raise DataError(
                f"{self.named()}: pairs of pictures and of latents are mixed, from {file} on; expected one kind: name "
                "the shards of one of them"
            )
        self.has_latents = kinds == {LATENTS}

    @property
    def kind(self) -> str:
        return f"{super().kind} ties {'kept' if self.settings.tie_weight else 'left out'}"

    def passed_over(self, pair: PreferencePair | EncodedPair) -> str | None:
        return TIES if pair.label[0] == pair.label[1] and not self.settings.tie_weight else None

    def content(self, pair: PreferencePair | EncodedPair) -> Any:
        """Both pictures, or (moments, how they were made)."""
        if isinstance(pair, EncodedPair):
            content: Any = read_moments(pair.moments)
            same = bool(torch.equal(*content[0]))
        else:
            first, second = content = tuple(map(decode_picture, pair.pictures))
            same = first.size == second.size and first.tobytes() == second.tobytes()
        if same:
            raise ValueError("has the same picture twice; expected two, of which one may be better")
        return content

    def collate(
        self, items: list[tuple[PreferencePair | EncodedPair, Any]], index: Tensor, epochs: list[int]
    ) -> dict[str, Any]:
        if self.wanted is None:
            raise DataError(f"{self.named()}: pairs are read before the size of the model's pictures is known")
        if self.has_latents:
            content = {"moments": torch.stack([self._checked(pair, *found) for pair, found in items])}
        else:
            both = [self._prepared(pair, pictures, int(i)) for (pair, pictures), i in zip(items, index, strict=True)]
            content = {"pictures": torch.stack(both)}
        labels = torch.tensor([pair.label for pair, _ in items], dtype=torch.float32)
        return {**content, "prompts": [pair.prompt for pair, _ in items], "labels": labels, "index": index}

    def check_first(self) -> None:
        """Read one pair: whether latents are of the model's VAE shows before anything is trained."""
        with closing(SampleReader(self)) as reader:
            self.collate([reader.sample(0)], torch.zeros(1, dtype=torch.int64), [0])

    def _prepared(self, pair: Any, pictures: tuple[Image.Image, Image.Image], index: int) -> Tensor:
        assert self.wanted is not None
        size = self.wanted.height, self.wanted.width
        try:
            both = [
                prepare(picture, size, self.settings, random.Random(key_to_seed("crop", self.seed, index, slot)))
                for slot, picture in enumerate(pictures)
            ]
        except ValueError as error:
            raise DataError(f"{pair.origin} {error}") from error
        return torch.stack([torch.from_numpy(array).permute(2, 0, 1).float() / 255 for array in both])

    def _checked(self, pair: Any, values: Tensor, made: Encoding) -> Tensor:
        assert self.wanted is not None
        mine: dict[str, Any] = {"vae": self.wanted.vae, "height": self.wanted.height, "width": self.wanted.width}
        mine |= {"crop": self.settings.crop, "flip": self.settings.flip, "shape": self.wanted.shape}
        theirs = {**vars(made), "shape": tuple(values.shape[2:])}
        others = [name for name, value in mine.items() if theirs[name] != value]
        if others:
            others = [name for name in others if name != "shape"] or others  # it follows from the rest
            then, here = (", ".join(f"{name} {_short(of[name])}" for name in others) for of in (theirs, mine))
            raise DataError(
                f"{pair.origin} has latents of another making: {then}; this run has {here}. Encode the pictures with "
                "this run's VAE, size and model.preference (nad-encode-latents), or train on the pictures"
            )
        return values


def prepare(
    picture: Image.Image, size: tuple[int, int], settings: PairSettings, draw: random.Random
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """``(height, width, 3)`` of ``size`` (height, width); see the module's docstring.

    Raises:
        ValueError: it is so long that resized it would be larger than any picture may be.
    """
    height, width = size
    if picture.height * width >= picture.width * height:  # it is the taller one: the width decides
        scaled = max(height, picture.height * width // picture.width), width
    else:
        scaled = height, max(width, picture.width * height // picture.height)
    if scaled[0] * scaled[1] > MAX_PICTURE_PIXELS:
        raise ValueError(
            f"has a picture of {picture.width} × {picture.height} pixels, which resized to cover {width} × {height} "
            f"has more than {MAX_PICTURE_PIXELS:,}; expected a less extreme shape"
        )
    if scaled != (picture.height, picture.width):
        picture = picture.resize((scaled[1], scaled[0]), Image.Resampling.BILINEAR)
    room = scaled[0] - height, scaled[1] - width
    # All draws are made whatever the settings: mirroring does not depend on how is cropped.
    drawn = [draw.randrange(free + 1) for free in room]
    mirrored = draw.random() < 0.5
    top, left = drawn if settings.crop == "random" else [round(free / 2) for free in room]  # as torchvision rounds
    array = np.asarray(picture)[top : top + height, left : left + width]
    return np.array(array[:, ::-1] if settings.flip and mirrored else array)


class PairDataModule(StreamDataModule):
    """The preference pairs of a run: ``setup`` finds what is wrong with the shards, :meth:`fit_to` names the model.

    >>> data = PairDataModule("preferences/train", settings=PairSettings(), micro_batch_size=4)  # doctest: +SKIP
    >>> data.setup("fit")  # doctest: +SKIP
    >>> data.fit_to(model, Sampling(height=512, width=512))  # doctest: +SKIP
    """

    def __init__(self, *args: Any, settings: PairSettings, **options: Any) -> None:
        super().__init__(*args, **options)
        self.settings = settings
        self.wanted: Wanted | None = None

    def fit_to(self, model: DiffusionModel, sampling: Sampling) -> None:
        """Say which model is to learn: it gives the size of the pictures, and what latents must be.

        Raises:
            DataError: the first pair is of no use to it.
        """
        self.wanted = Wanted(*picture_size(model, sampling))
        dataset: Any = self._make_train_loader().stream
        if dataset.has_latents:
            blank = torch.zeros(1, 3, self.wanted.height, self.wanted.width)
            shape = tuple(moments(model, blank).shape[2:])
            self.wanted = dataset.wanted = replace(self.wanted, vae=vae_fingerprint(model), shape=shape)
        dataset.check_first()

    def build_dataset(self, paths: PathSpec, **options: Any) -> PairDataset:
        return PairDataset(paths, settings=self.settings, wanted=self.wanted, **options)


def _short(value: Any) -> str:
    return printable(f"{value[:12]}…" if isinstance(value, str) and len(value) > 12 else value, 40)
