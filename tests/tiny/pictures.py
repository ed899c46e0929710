"""Pictures with a photograph's statistics: detail at every scale, hard edges, areas of plain white or black."""

from __future__ import annotations

import matplotlib.cbook
import numpy as np
import torch
from PIL import Image
from torch import Tensor


def photograph(height: int, width: int) -> Tensor:
    """A real one, ``(3, height, width)`` in [0, 1]: cut out of the portrait that matplotlib ships (public domain)."""
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as stream:
        whole = Image.open(stream).convert("RGB")
        top, left = (whole.height - height) // 2, (whole.width - width) // 2
        part = np.asarray(whole.crop((left, top, left + width, top + height)))
    return torch.from_numpy(part.copy()).permute(2, 0, 1) / 255


def fractal(height: int, width: int, seed: int = 0) -> Tensor:
    """1/f noise, ``(3, height, width)`` in [0, 1], as steep as in nature, clipped at both ends, with a flat patch."""
    generator = np.random.default_rng(seed)
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]
    frequency = np.maximum(np.hypot(rows, columns), 1 / max(height, width))
    noise = np.fft.fft2(generator.standard_normal((3, height, width))) / frequency
    values = np.fft.ifft2(noise).real
    values = 0.5 + 0.25 * (values - values.mean()) / values.std()
    values[:, height // 3 : height // 2, width // 4 : width // 2] = generator.random((3, 1, 1))  # a flat patch
    return torch.from_numpy(values.clip(0, 1)).float()
