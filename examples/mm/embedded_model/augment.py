"""Augmentation and unnatural negatives for the embedded CLIP.

The CLIP is a reward that gradient ascent will push against, so it sees shifted, scaled, blurred, noised, tinted and
partly covered pictures, and it is told that blank pictures, noise, double exposures and shuffled patches are nothing.
All pictures here are float in [-1, 1], ``(B, 3, H, W)``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low


def _some(count: int, probability: float, generator: torch.Generator) -> torch.Tensor:
    return (torch.rand(count, generator=generator) < probability).float().view(-1, 1, 1, 1)


def smooth_noise(shape: tuple[int, ...], cells: int, generator: torch.Generator) -> torch.Tensor:
    """Unit-variance noise on a ``cells x cells`` grid, stretched to ``shape``."""
    coarse = torch.randn((*shape[:2], cells, cells), generator=generator)
    return F.interpolate(coarse, size=shape[-2:], mode="bilinear", align_corners=False)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random view of every picture."""
    count, _, height, width = images.shape
    angle = _uniform((count,), -10, 10, generator) * math.pi / 180
    zoom = _uniform((count,), 0.85, 1.45, generator)  # above 1 the picture shrinks
    stretch = _uniform((count,), 0.92, 1.08, generator)
    shift = _uniform((count, 2), -0.16, 0.16, generator)
    theta = torch.stack(
        [
            torch.stack([zoom * stretch * angle.cos(), -zoom * angle.sin(), shift[:, 0]], dim=1),
            torch.stack([zoom * stretch * angle.sin(), zoom * angle.cos(), shift[:, 1]], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta, [count, 3, height, width], align_corners=False)
    # Shifted by one so that what lies outside is white, like the pictures' background.
    images = F.grid_sample(images - 1.0, grid, align_corners=False) + 1.0

    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * _uniform((count, 1, 1, 1), 0.65, 1.25, generator)
    images = images * _uniform((count, 1, 1, 1), 0.75, 1.15, generator)
    images = images + _uniform((count, 1, 1, 1), -0.15, 0.15, generator)
    tint = _uniform((count, 3, 1, 1), 0.6, 1.0, generator)
    images = torch.lerp(images, (images + 1) * tint - 1, _some(count, 0.4, generator))

    # Blur: some pictures pass through a coarser grid, one grid size a batch.
    size = int(torch.randint(14, 44, (1,), generator=generator))
    blurred = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
    blurred = F.interpolate(blurred, size=(height, width), mode="bilinear", align_corners=False)
    images = torch.lerp(images, blurred, _some(count, 0.3, generator))

    noise = torch.randn(images.shape, generator=generator) * _uniform((count, 1, 1, 1), 0, 0.3, generator)
    images = images + noise * _some(count, 0.4, generator)
    cells = int(torch.randint(3, 16, (1,), generator=generator))
    images = images + smooth_noise(tuple(images.shape), cells, generator) * 0.25 * _some(count, 0.25, generator)

    # Cutout: one rectangle of a random colour.
    centre = torch.rand((count, 2), generator=generator)
    half = _uniform((count, 2), 0.04, 0.17, generator)
    rows = (torch.arange(height).float() / height)[None, :, None]
    columns = (torch.arange(width).float() / width)[None, None, :]
    inside = ((rows - centre[:, :1, None]).abs() < half[:, :1, None]) & (
        (columns - centre[:, 1:, None]).abs() < half[:, 1:, None]
    )
    colour = _uniform((count, 3, 1, 1), -1, 1, generator)
    covered = inside[:, None].float() * _some(count, 0.35, generator)
    return torch.lerp(images, colour.expand_as(images), covered).clamp(-1, 1)


def unnatural(images: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """``count`` pictures of nothing, blanks, noise, double exposures and shuffled patches of ``images``."""
    quarter = count // 4
    height, width = images.shape[-2:]

    def pick(number: int) -> torch.Tensor:
        return images[torch.randint(0, len(images), (number,), generator=generator)]

    blank = _uniform((quarter, 3, 1, 1), -1, 1, generator).expand(-1, -1, height, width)
    blank = blank + 0.1 * torch.randn(blank.shape, generator=generator)
    cells = int(torch.randint(3, 32, (1,), generator=generator))
    noise = smooth_noise((quarter, 3, height, width), cells, generator)
    noise = 0.5 * noise + 0.5 * torch.randn(noise.shape, generator=generator)
    double = 0.5 * (pick(quarter) + pick(quarter))
    rest = count - 3 * quarter
    patch = 16 if torch.rand(1, generator=generator) < 0.5 else 8
    patches = F.unfold(pick(rest), patch, stride=patch)
    order = torch.randperm(patches.shape[-1], generator=generator)
    shuffled = F.fold(patches[..., order], (height, width), patch, stride=patch)
    return torch.cat([blank, noise, double, shuffled]).clamp(-1, 1)
