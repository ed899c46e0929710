"""JPEG compressibility, differentiable: how little a picture loses when it is compressed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from nemo_aligner_diffusion.errors import RewardError
from nemo_aligner_diffusion.rewards.base import Reward

# ITU-T T.81 (JPEG), Annex K, tables K.1 and K.2: quantisation steps at quality 50.
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
)
# ITU-T T.871 (JFIF): RGB to luminance and the two colour differences, the latter centred on 0 here.
_RGB_TO_YCC = ((0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411))
REDUCTIONS = ("sum", "mean")


class JPEGCompressibility(Reward):
    """``-‖x - jpeg(x)‖²``: 0 for a picture that JPEG keeps exactly, lower the more it would lose.

    The compression follows the standard up to the entropy coder: YCbCr, optional 2×2 chroma subsampling, 8×8 DCT, the
    standard tables scaled by quality, rounding. Rounding is ``⌊v⌉ + (v - ⌊v⌉)³`` (Shin & Song, 2017, "JPEG-resistant
    adversarial images"), whose gradient is not zero almost everywhere. Any size works: edges
    are repeated to whole blocks.

    Args:
        quality: 1 (coarse) to 100 (fine), as in libjpeg. Coarser quantisation penalises more detail: at 50 most small
            coefficients are rounded to zero and the gradient smooths them away; from 65 on it moves them to the
            nearest step instead, which changes the file's size hardly.
        chroma_subsampling: store colour at half the resolution (4:2:0), as most JPEG files do.
        reduction: ``sum`` over a picture's values (the squared norm, which grows with its size), or their ``mean``.
        incompressible: reward the opposite, ``+‖x - jpeg(x)‖²``.
    """

    name = "compressibility"

    def __init__(
        self,
        quality: int = 50,
        chroma_subsampling: bool = True,
        reduction: str = "sum",
        incompressible: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise RewardError(f"The JPEG reward's reduction is {reduction!r}; known are {', '.join(REDUCTIONS)}.")
        self.codec = DifferentiableJPEG(quality, chroma_subsampling)
        self.reduction = reduction
        self.sign = 1.0 if incompressible else -1.0
        if incompressible:
            self.name = "incompressibility"
        self.freeze()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if images.dtype != torch.float64:
            images = images.float()
        squares = (images - self.codec(images)).square()
        total = squares.sum(dim=(1, 2, 3)) if self.reduction == "sum" else squares.mean(dim=(1, 2, 3))
        return self.sign * total


class DifferentiableJPEG(torch.nn.Module):
    """RGB ``(B, 3, H, W)`` in ``[0, 1]`` to what a JPEG decoder would show, before its clamp to ``[0, 1]``.

    ``exact_rounding=True`` gives the real quantisation, which has no useful gradient.
    """

    def __init__(self, quality: int = 50, chroma_subsampling: bool = True, exact_rounding: bool = False) -> None:
        super().__init__()
        if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
            raise RewardError(f"JPEG quality is {quality!r}; expected an integer from 1 to 100.")
        self.quality = quality
        self.chroma_subsampling = chroma_subsampling
        self.exact_rounding = exact_rounding
        # float64 tables, cast to the picture's dtype on use; they are constants, so no state dict holds them.
        to_ycc = torch.tensor(_RGB_TO_YCC, dtype=torch.float64)
        self.register_buffer("to_ycc", to_ycc, persistent=False)
        self.register_buffer("to_rgb", torch.linalg.inv(to_ycc), persistent=False)
        self.register_buffer("dct", _dct_matrix(), persistent=False)
        self.register_buffer("luminance_steps", _quantisation_steps(_LUMINANCE, quality), persistent=False)
        self.register_buffer("chrominance_steps", _quantisation_steps(_CHROMINANCE, quality), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        block = 16 if self.chroma_subsampling else 8
        padded = functional.pad(images * 255.0, (0, -width % block, 0, -height % block), mode="replicate")
        ycc = torch.einsum("ij,bjhw->bihw", self._constant(self.to_ycc, images), padded)
        luminance = self._compress(ycc[:, :1] - 128.0, self._constant(self.luminance_steps, images)) + 128.0
        chrominance = ycc[:, 1:]
        if self.chroma_subsampling:
            chrominance = functional.avg_pool2d(chrominance, 2)
        chrominance = self._compress(chrominance, self._constant(self.chrominance_steps, images))
        if self.chroma_subsampling:  # bilinear with these weights is libjpeg's "fancy upsampling"
            chrominance = functional.interpolate(chrominance, scale_factor=2, mode="bilinear", align_corners=False)
        ycc = torch.cat([luminance, chrominance], dim=1)
        rgb = torch.einsum("ij,bjhw->bihw", self._constant(self.to_rgb, images), ycc) / 255.0
        return rgb[..., :height, :width]

    def _compress(self, plane: Tensor, steps: Tensor) -> Tensor:
        """Planes ``(B, C, H, W)`` through DCT, quantisation with ``steps (8, 8)``, and back."""
        dct = self._constant(self.dct, plane)
        blocks = plane.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).transpose(-3, -2)  # (B, C, rows, columns, 8, 8)
        coefficients = dct @ blocks @ dct.T / steps
        rounded = coefficients.detach().round()
        if not self.exact_rounding:
            rounded = rounded + (coefficients - rounded) ** 3
        blocks = dct.T @ (rounded * steps) @ dct
        return blocks.transpose(-3, -2).flatten(-2).flatten(-3, -2)

    @staticmethod
    def _constant(table: Tensor | torch.nn.Module, like: Tensor) -> Tensor:
        assert isinstance(table, Tensor)
        return table.to(like.device, like.dtype)


def _dct_matrix() -> Tensor:
    """The orthonormal 8-point DCT-II, ``(frequency, sample)``, float64."""
    sample = torch.arange(8, dtype=torch.float64)
    matrix = torch.cos(math.pi / 8 * (sample + 0.5) * sample.unsqueeze(1)) / 2
    matrix[0] /= math.sqrt(2)
    return matrix


def _quantisation_steps(table: Sequence[Sequence[int]], quality: int) -> Tensor:
    """``table`` scaled to ``quality`` as libjpeg does (``jpeg_quality_scaling``), ``(8, 8)`` float64."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    return torch.tensor([[min(max((step * percent + 50) // 100, 1), 255) for step in row] for row in table]).double()
