"""Random, differentiable perturbations of the pictures before a reward sees them.

A reward's gradient finds patterns that fool the network before it finds better pictures. Scored through random crops,
flips, colours, noise and gaps, a picture has to please the reward in many slightly different versions, which such
patterns mostly do not survive (Athalye et al. 2018, arXiv 1707.07397, "expectation over transformation", turned
around). Validation and evaluation score the pictures as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from nemo_aligner_diffusion.settings import FRACTION, PART, Kind, Settings, integer, number, setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# ITU-T T.871 (JFIF): luminance of RGB.
_LUMINANCE = (0.299, 0.587, 0.114)
DROPOUT_GRID = 8


@dataclass(frozen=True)
class Augmentation(Settings):
    """How much pictures are perturbed; the defaults leave them alone.

    A crop is enlarged to the picture's size (bilinear); brightness, contrast and saturation change each by itself, and
    a blanked field shows the picture's mean colour.
    """

    section: ClassVar[str] = "rm.augment"

    crop_scale: float = setting(
        1.0,
        Kind("float", low=0, high=1, open_low=True),
        "least share of the area that a random crop keeps; in (0, 1], 1: no crop",
    )
    flip_probability: float = setting(0.0, PART, "of mirroring left and right; in [0, 1]")
    colour_jitter: float = setting(
        0.0, FRACTION, "brightness, contrast and saturation change by a factor within 1 ± this; in [0, 1)"
    )
    dropout: float = setting(0.0, FRACTION, "share of the picture's 8×8 fields that are blanked; in [0, 1)")
    noise_std: float = setting(0.0, number(0), "standard deviation of Gaussian noise, on values in [0, 1]; >= 0")
    views: int = setting(1, integer(1), "changed versions of each picture whose scores are averaged; integer >= 1")

    @property
    def perturbs(self) -> bool:
        """Whether a picture may come out changed."""
        return self.crop_scale < 1 or any((self.flip_probability, self.colour_jitter, self.dropout, self.noise_std))

    def __call__(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """``(B, 3, H, W)`` perturbed, each picture by its own generator; differentiable, dtype and device kept."""
        import torch

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
        import torch

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
        import torch

        height, width = images.shape[-2:]
        row = torch.arange(height, device=images.device) * DROPOUT_GRID // height
        column = torch.arange(width, device=images.device) * DROPOUT_GRID // width
        gaps = dropped[:, row][:, :, column].unsqueeze(1)
        return torch.where(gaps, images.mean(dim=(2, 3), keepdim=True), images)


def _resampling(length: int, side: Tensor, place: Tensor) -> Tensor:
    """``(B, length, length)`` weights: row ``i`` gives output pixel ``i`` of a crop of ``side (B,)`` of the length that
    lies at ``place (B,)`` of the room there is (0: the beginning, 1: the end), enlarged to the length, bilinear."""
    import torch

    pixels = torch.arange(length, device=side.device, dtype=side.dtype)
    start = place * (1 - side) * length
    centre = start.unsqueeze(1) + (pixels + 0.5) * side.unsqueeze(1) - 0.5
    return (1 - (centre.clamp(0, length - 1).unsqueeze(2) - pixels).abs()).clamp(min=0)
