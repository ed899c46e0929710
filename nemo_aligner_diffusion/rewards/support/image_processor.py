"""What a transformers image processor does to a picture, differentiably: resize, crop, mean and standard deviation.

The settings are read from a folder's ``preprocessor_config.json`` by transformers itself, so that its defaults and its
old spellings hold. Only processors whose steps are known here are taken; another would feed the network something that
it was not trained on, without a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nemo_aligner_diffusion.errors import RewardError
from nemo_aligner_diffusion.rewards.base import wide
from nemo_aligner_diffusion.rewards.support.preprocessing import (
    antialiased_resize,
    centre_crop,
    per_channel,
    resize_short_side,
)

# PIL's numbers for its filters, as preprocessor_config.json holds them. torch has no Lanczos; bicubic differs from it
# by 0.9 grey levels on average where a photograph shrinks to 224 pixels.
_FILTERS = {0: "nearest-exact", 1: "bicubic", 2: "bilinear", 3: "bicubic"}
# Processors that resize, crop, rescale and normalise, in this order, and do nothing else.
PLAIN = (
    *("ViT", "DeiT", "CLIP", "ChineseCLIP", "Siglip", "Bit", "Blip", "Pvt", "MobileNetV1", "OwlViT", "Beit"),
    "Segformer",
)
# Processors with one step of their own, which is known here.
SPECIAL = ("ConvNext", "EfficientNet", "Levit", "MobileViT", "Owlv2")


@dataclass(frozen=True)
class ImageProcessor:
    """A processor's steps; calling it gives the network's input.

    Attributes:
        kind: the processor's name without ``ImageProcessor``.
        resize: ``(height, width)``; or the length of the short side, keeping the aspect ratio; ``None``: none.
        crop: ``(height, width)`` of the centre crop; ``None``: none. A smaller picture is padded with black.
        interpolation: of the resize; antialiased where it shrinks, bicubic cut at 0 and 1 as Pillow does.
        scale, offset: the network's values are ``(255·x·scale + offset)`` before normalising.
        mean, std: per channel; ``None``: not normalised.
        reverse_channels: BGR.
    """

    kind: str
    resize: tuple[int, int] | int | None
    crop: tuple[int, int] | None
    interpolation: str
    scale: float
    offset: float
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    reverse_channels: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether it resizes, crops and normalises values in ``[0, 1]``, and does nothing else."""
        return self.kind in PLAIN and (self.scale, self.offset) == (1 / 255, 0)

    @classmethod
    def of(cls, processor: Any, where: str) -> ImageProcessor:
        """The steps of a transformers image processor."""
        name = type(processor).__name__
        kind = name.removesuffix("Fast").removesuffix("Pil").removesuffix("ImageProcessor")
        if kind not in (*PLAIN, *SPECIAL):
            raise RewardError(
                f"{where}: the preprocessing of a {name} is not known here; known are those of "
                f"{', '.join(sorted((*PLAIN, *SPECIAL)))}."
            )

        def setting(key: str, default: Any = None) -> Any:
            value = getattr(processor, key, default)
            return default if value is None else value

        resize = _size(setting("size"), where) if setting("do_resize", False) else None
        crop = _size(setting("crop_size"), where) if setting("do_center_crop", False) else None
        if isinstance(crop, int):
            crop = (crop, crop)
        mean, std = (setting("image_mean"), setting("image_std")) if setting("do_normalize", False) else (None, None)
        scale = float(setting("rescale_factor", 1 / 255)) if setting("do_rescale", False) else 1.0
        offset = 0.0
        if kind == "ConvNext" and isinstance(resize, int):  # timm's way: enlarge by 1 / crop_pct and crop
            side = resize
            if side >= 384:
                resize = (side, side)
            else:
                resize, crop = int(side / setting("crop_pct", 224 / 256)), (side, side)
        if kind == "Levit" and isinstance(resize, int):
            resize = int(256 / 224 * resize)
        if kind == "EfficientNet":
            offset = -1.0 if setting("rescale_offset", False) else 0.0
            if setting("include_top", False):  # divided by the deviation once more
                std = [value * value for value in std] if std is not None else setting("image_std")
        reverse = kind == "MobileViT" and bool(setting("do_flip_channel_order", False))
        resample = int(setting("resample", 2))
        if resize is not None and resample not in _FILTERS:
            raise RewardError(
                f"{where}: its preprocessor_config.json resizes by PIL's filter {resample}; known are 0 (nearest), "
                "1 (Lanczos, as bicubic), 2 (bilinear), 3 (bicubic)."
            )
        interpolation = _FILTERS.get(resample, "bilinear")
        return cls(kind, resize, crop, interpolation, scale, offset, _channels(mean), _channels(std), reverse)

    def __call__(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` in ``[0, 1]`` to the network's input ``(B, 3, h, w)``, float32 or the images' float64."""
        images = wide(images)  # half precision has too few digits for an antialiased sum
        if self.kind == "Owlv2":
            height, width = images.shape[-2:]
            images = functional.pad(images, (0, max(height - width, 0), 0, max(width - height, 0)))
            if isinstance(self.resize, tuple):
                images = _blur_and_resize(images, self.resize)
        elif isinstance(self.resize, tuple):
            images = antialiased_resize(images, self.resize, self.interpolation)
        elif self.resize is not None:
            images = resize_short_side(images, self.resize, self.interpolation)
        if self.crop is not None:
            images = centre_crop(images, self.crop, down=True)
        if self.reverse_channels:
            images = images.flip(1)
        images = images * (255.0 * self.scale) + self.offset
        if self.mean is not None:
            images = images - per_channel(images, self.mean)
        if self.std is not None:
            images = images / per_channel(images, self.std)
        return images


def _size(size: Any, where: str) -> tuple[int, int] | int:
    """A size as transformers keeps it: a number, a mapping, or its own object with such attributes."""

    def entry(key: str) -> int | None:
        value = size.get(key) if isinstance(size, Mapping) else getattr(size, key, None)
        return None if value is None else int(value)

    if isinstance(size, int):
        return size
    height, width, short = entry("height"), entry("width"), entry("shortest_edge")
    if height is not None and width is not None:
        return height, width
    if short is not None and entry("longest_edge") is None:
        return short
    raise RewardError(
        f"{where}: its preprocessor_config.json has size {size!r}; expected height and width, or shortest_edge."
    )


def _channels(values: Any) -> tuple[float, ...] | None:
    if values is None:
        return None
    return tuple(map(float, values)) if isinstance(values, Sequence) else (float(values),) * 3


def _blur_and_resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """OWLv2's resize, scikit-image's: a Gaussian of standard deviation ``(factor − 1) / 2`` where it shrinks by
    ``factor``, mirrored at the edges, cut at four deviations; then bilinear between the pixels' centres."""
    for dim, target in ((-2, size[0]), (-1, size[1])):
        sigma = (images.shape[dim] / target - 1) / 2
        radius = int(4 * sigma + 0.5) if sigma > 0 else 0
        if radius:
            place = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
            kernel = torch.exp(-0.5 * (place / sigma).square())
            kernel = (kernel / kernel.sum()).view(1, 1, -1)
            moved = images.movedim(dim, -1)
            flat = functional.pad(moved.flatten(0, -2).unsqueeze(1), (radius, radius), mode="reflect")
            images = functional.conv1d(flat, kernel).squeeze(1).view(moved.shape).movedim(-1, dim)
    if tuple(images.shape[-2:]) == size:
        return images
    return functional.interpolate(images, size=size, mode="bilinear", align_corners=False)
