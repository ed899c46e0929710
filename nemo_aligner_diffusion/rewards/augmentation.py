"""Random, differentiable perturbations of the pictures before a reward sees them.

A reward's gradient finds patterns that fool the network before it finds better pictures. Scored through random crops,
flips, colours, noise and gaps, a picture has to please the reward in many slightly different versions, which such
patterns mostly do not survive (Athalye et al. 2018, arXiv 1707.07397, "expectation over transformation", turned
around). Validation and evaluation score the pictures as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from nemo_aligner_diffusion.errors import RewardError
from nemo_aligner_diffusion.rewards.base import Reward, check_images
from nemo_aligner_diffusion.rewards.micro_batches import own_precision
from nemo_aligner_diffusion.rewards.sample_keys import current_keys

# ITU-T T.871 (JFIF): luminance of RGB.
_LUMINANCE = (0.299, 0.587, 0.114)
DROPOUT_GRID = 8


@dataclass(frozen=True)
class Augmentation:
    """How much pictures are perturbed; the defaults leave them alone.

    Attributes:
        crop_scale: least share of the picture's area that a random crop keeps, in (0, 1]; the crop is enlarged to the
            picture's size (bilinear). 1: no crop.
        flip_probability: of mirroring left and right, in [0, 1].
        colour_jitter: brightness, contrast and saturation are each scaled by a factor within 1 ± this, in [0, 1).
        dropout: share of the picture's 8×8 fields that show its mean colour instead, in [0, 1).
        noise_std: standard deviation of Gaussian noise on each value; pictures are in [0, 1], so 0.05 is visible.
        views: differently perturbed versions of each picture, whose scores are averaged; at least 1.
    """

    crop_scale: float = 1.0
    flip_probability: float = 0.0
    colour_jitter: float = 0.0
    dropout: float = 0.0
    noise_std: float = 0.0
    views: int = 1

    def __post_init__(self) -> None:
        ranges = {
            "crop_scale": (0 < self.crop_scale <= 1, "> 0 and <= 1"),
            "flip_probability": (0 <= self.flip_probability <= 1, ">= 0 and <= 1"),
            "colour_jitter": (0 <= self.colour_jitter < 1, ">= 0 and < 1"),
            "dropout": (0 <= self.dropout < 1, ">= 0 and < 1"),
            "noise_std": (0 <= self.noise_std < math.inf, ">= 0"),
            "views": (self.views >= 1 and self.views == int(self.views), "an integer >= 1"),
        }
        for name, (fits, expected) in ranges.items():
            if not fits:
                raise RewardError(f"augment.{name} is {getattr(self, name)}; expected {expected}.")

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> Augmentation:
        """Of the keys in a configuration, which the caller has checked."""
        return cls(**{field.name: settings[field.name] for field in fields(cls) if field.name in settings})

    @property
    def perturbs(self) -> bool:
        """Whether a picture may come out changed."""
        return self.crop_scale < 1 or any((self.flip_probability, self.colour_jitter, self.dropout, self.noise_std))

    def __call__(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """``(B, 3, H, W)`` perturbed, each picture by its own generator; differentiable, dtype and device kept."""
        # Every number is drawn whatever is switched on: adding noise to a run leaves its crops where they were.
        # In float32, because trainer.precision may have made another dtype the default, whose numbers are others.
        single = torch.float32
        drawn = torch.stack([torch.rand(8, generator=g, dtype=single) for g in generators]).to(images)
        grid = (DROPOUT_GRID, DROPOUT_GRID)
        fields_drawn = torch.stack([torch.rand(grid, generator=g, dtype=single) for g in generators])
        if self.crop_scale < 1 or self.flip_probability:
            images = self._crop_and_flip(images, *drawn[:, :4].unbind(1))
        if self.colour_jitter:
            images = self._jitter(images, 1 + self.colour_jitter * (2 * drawn[:, 4:7] - 1))
        if self.dropout:
            images = self._drop(images, fields_drawn.to(images.device) < self.dropout)
        if self.noise_std:
            shape = images.shape[1:]
            noise = torch.stack([torch.randn(shape, generator=g, dtype=single) for g in generators])
            images = images + self.noise_std * noise.to(images)
        return images

    def _crop_and_flip(self, images: Tensor, size: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
        """Each picture's own crop, of its own aspect ratio, by two matrix products, whose gradient sums in one order
        everywhere; the gradient of ``grid_sample`` and of interpolation does not on a GPU."""
        side = (self.crop_scale + (1 - self.crop_scale) * size).sqrt()
        rows = _resampling(images.shape[-2], side, top)
        columns = _resampling(images.shape[-1], side, left)
        columns = torch.where((flip < self.flip_probability).view(-1, 1, 1), columns.flip(1), columns)
        return torch.einsum("bih,bchw,bjw->bcij", rows, images, columns)

    @staticmethod
    def _jitter(images: Tensor, factors: Tensor) -> Tensor:
        brightness, contrast, saturation = factors.view(-1, 3, 1, 1, 1).unbind(1)
        weights = images.new_tensor(_LUMINANCE).view(1, 3, 1, 1)
        images = images * brightness
        mean = (images * weights).sum(1, keepdim=True).mean(dim=(2, 3), keepdim=True)
        images = mean + contrast * (images - mean)
        grey = (images * weights).sum(1, keepdim=True)
        return grey + saturation * (images - grey)

    @staticmethod
    def _drop(images: Tensor, dropped: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        row = torch.arange(height, device=images.device) * DROPOUT_GRID // height
        column = torch.arange(width, device=images.device) * DROPOUT_GRID // width
        gaps = dropped[:, row][:, :, column].unsqueeze(1)
        return torch.where(gaps, images.mean(dim=(2, 3), keepdim=True), images)


def _resampling(length: int, side: Tensor, place: Tensor) -> Tensor:
    """``(B, length, length)`` weights: row ``i`` gives output pixel ``i`` of a crop of ``side (B,)`` of the length that
    lies at ``place (B,)`` of the room there is (0: the beginning, 1: the end), enlarged to the length, bilinear."""
    pixels = torch.arange(length, device=side.device, dtype=side.dtype)
    start = place * (1 - side) * length
    centre = start.unsqueeze(1) + (pixels + 0.5) * side.unsqueeze(1) - 0.5
    return (1 - (centre.clamp(0, length - 1).unsqueeze(2) - pixels).abs()).clamp(min=0)


class AugmentedReward(Reward):
    """A reward that sees perturbed pictures while training, and the pictures as they are otherwise.

    Args:
        reward: judges the perturbed pictures; the score and the components are means over the views.
        augmentation: what is done to them.
        label: tells the random numbers of several augmented rewards of a run apart; its place in the configuration.
    """

    def __init__(self, reward: Reward, augmentation: Augmentation, label: str = "rm") -> None:
        super().__init__()
        self.reward = reward
        self.augmentation = augmentation
        self.label = label
        self.name = reward.name
        self.freeze()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scores(images, prompts)[0]

    def scores(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        check_images(images, prompts)
        keys = current_keys(len(images))
        if keys is None or not self.augmentation.perturbs:
            return self.reward.scores(images, prompts)
        if images.dtype != torch.float64:
            images = images.float()
        views = []
        for view in range(self.augmentation.views):
            with own_precision(images.device.type):
                seen = self.augmentation(images, keys.generators(self.label, view))
            views.append(self.reward.scores(seen, prompts))
        score = torch.stack([view for view, _ in views]).mean(0)
        parts = {name: torch.stack([parts[name] for _, parts in views]).mean(0) for name in views[0][1]}
        return score, parts
