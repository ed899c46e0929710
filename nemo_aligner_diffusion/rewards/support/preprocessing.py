"""From a generated picture to a vision model's input, differentiably and on the picture's device."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nemo_aligner_diffusion.errors import RewardError
from nemo_aligner_diffusion.rewards.base import wide

# Statistics of OpenAI's CLIP training pictures, for RGB in [0, 1]; PickScore, HPSv2 and OpenCLIP use them too.
OPENAI_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
INTERPOLATIONS = ("bicubic", "bilinear")
# How a picture of any shape becomes the square a model takes, see Preprocessing.
RESIZES = ("crop", "crop_down", "pad", "pad_uncut", "squash")


def antialiased_resize(
    images: Tensor, target: tuple[int, int], interpolation: str = "bicubic", cut: bool = True
) -> Tensor:
    """``(B, C, H, W)`` to ``target`` (height, width) with Pillow's filter, differentiably.

    Like Pillow, bicubic goes along the width first and cuts off after each direction what overshoots: at a hard edge
    that makes a difference of up to 0.1, and a score must not depend on brightness that no saved picture could hold.
    The limits are 0 and 1, or a picture's own extremes where these lie outside. Within them agreement is to 0.005
    (Pillow rounds to 8 bits), but for pictures over twice as high as wide made smaller by Pillow 13 and later, which
    go along the height first there (0.03). Without ``cut`` what overshoots stays, as where a tensor is resized.
    """
    if target == tuple(images.shape[-2:]):
        return images
    if interpolation == "nearest-exact":
        return functional.interpolate(images, size=target, mode=interpolation)
    if interpolation != "bicubic" or not cut:  # a weighted mean overshoots nowhere
        return functional.interpolate(images, size=target, mode=interpolation, align_corners=False, antialias=True)
    if images.requires_grad and torch.is_grad_enabled():
        # Each cut keeps its input for the backward pass, together more than a vision model's: cheaper to do it again.
        result: Tensor = checkpoint(_resize_bicubic, images, target, use_reentrant=False, preserve_rng_state=False)
        return result
    return _resize_bicubic(images, target)


def _resize_bicubic(images: Tensor, target: tuple[int, int]) -> Tensor:
    lowest = images.detach().amin(dim=(1, 2, 3), keepdim=True).clamp(max=0)
    highest = images.detach().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1)
    for size in ((images.shape[-2], target[1]), target):
        if size != tuple(images.shape[-2:]):
            images = functional.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=True)
            images = images.clamp(lowest, highest)
    return images


def resize_short_side(images: Tensor, size: int, interpolation: str = "bicubic") -> Tensor:
    """Antialiased resize of ``(B, C, H, W)`` so that the short side is ``size``, keeping the aspect ratio.

    The long side is rounded down, as in torchvision's ``Resize`` and in transformers' processors.
    """
    height, width = images.shape[-2:]
    long_size = size * max(height, width) // min(height, width)
    target = (long_size, size) if height > width else (size, long_size)
    return antialiased_resize(images, target, interpolation)


def pad_to_square(images: Tensor, size: int, interpolation: str = "bicubic", cut: bool = True) -> Tensor:
    """Antialiased resize of ``(B, C, H, W)`` so that the long side is ``size``, centred on a black square of that side.

    HPSv2's own preparation of pictures (``ResizeMaxSize`` in ``hpsv2/src/open_clip/transform.py`` of tgxs002/HPSv2):
    both sides are rounded to the nearest pixel, and of an odd number of missing rows or columns the larger part goes
    below or to the right. (There, a long side that is ``size`` already is not padded, so that the model refuses it.)
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    target = max(round(height * scale), 1), max(round(width * scale), 1)
    images = antialiased_resize(images, target, interpolation, cut)
    rows, columns = size - target[0], size - target[1]
    return functional.pad(images, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def centre_crop(images: Tensor, size: tuple[int, int], down: bool = False) -> Tensor:
    """The middle ``size`` (height, width) of images; smaller ones are padded with black first, as transformers does.

    Where an odd number of rows or columns goes, torchvision rounds the offset (half to even) and transformers rounds it
    ``down``: a shift by one pixel in every second case, which scores notice.
    """
    rows, columns = (max(wanted - length, 0) for wanted, length in zip(size, images.shape[-2:], strict=True))
    if rows or columns:
        top, left = (rows + 1) // 2, (columns + 1) // 2
        images = functional.pad(images, (left, columns - left, top, rows - top))
    room = (length - wanted for wanted, length in zip(size, images.shape[-2:], strict=True))
    top, left = (excess // 2 if down else round(excess / 2) for excess in room)
    return images[..., top : top + size[0], left : left + size[1]]


def per_channel(images: Tensor, values: tuple[float, ...]) -> Tensor:
    """``values`` as something to compute with images ``(B, C, H, W)``."""
    return images.new_tensor(values).view(1, -1, 1, 1)


@dataclass(frozen=True)
class Preprocessing:
    """What a CLIP-like vision model does to a picture first.

    Attributes:
        size: side in pixels that the model sees.
        mean, std: statistics of RGB in ``[0, 1]``.
        interpolation: ``bicubic`` or ``bilinear``, antialiased.
        resize: how another shape becomes a square: ``crop`` (short side to ``size``, the middle kept, as torchvision
            does it: OpenAI's and OpenCLIP's code, NeMo), ``crop_down`` (the same, as transformers does it: PickScore),
            ``pad`` (long side to ``size``, black around it: HPSv2), ``pad_uncut`` (the same, and what bicubic
            overshoots at hard edges is kept: HPSv2's own transform resizes the float tensor, not an 8-bit picture) or
            ``squash`` (both sides to ``size``).

    Raises:
        RewardError: a value is impossible; says which.
    """

    size: int
    mean: tuple[float, ...] = OPENAI_CLIP_MEAN
    std: tuple[float, ...] = OPENAI_CLIP_STD
    interpolation: str = "bicubic"
    resize: str = "crop"

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = getattr(self, name)
            numbers = isinstance(values, list | tuple) and all(map(_is_number, values))
            if not numbers or len(values) != 3 or (name == "std" and min(values) <= 0):
                kind = "numbers above 0" if name == "std" else "numbers"
                raise RewardError(f"preprocessing.{name} is {values!r}; expected three {kind} for R, G, B.")
            object.__setattr__(self, name, tuple(map(float, values)))
        for name, known in (("interpolation", INTERPOLATIONS), ("resize", RESIZES)):
            value = getattr(self, name)
            if value not in known:
                raise RewardError(f"preprocessing.{name} is {str(value)[:100]!r}; known are {', '.join(known)}.")

    def square(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` as ``(B, 3, size, size)``, in float32 or the images' float64; one of that size as it is."""
        images = wide(images)  # half precision has too few digits for an antialiased sum
        if self.resize.startswith("pad"):
            return pad_to_square(images, self.size, self.interpolation, cut=self.resize == "pad")
        if self.resize == "squash":
            return antialiased_resize(images, (self.size, self.size), self.interpolation)
        resized = resize_short_side(images, self.size, self.interpolation)
        return centre_crop(resized, (self.size, self.size), down=self.resize == "crop_down")

    def __call__(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` in ``[0, 1]`` to the model's input, normalised."""
        images = self.square(images)
        return (images - per_channel(images, self.mean)) / per_channel(images, self.std)

    def as_config(self) -> dict[str, Any]:
        """As ``model_config.yaml`` of an archive has it."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {"image_size": values.pop("size"), **values}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6  # neither NaN nor inf
