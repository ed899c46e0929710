"""How little a picture loses when it is compressed by JPEG, differentiable; and how large the file is, which is not."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from nemo_aligner_diffusion.errors import RewardError
from nemo_aligner_diffusion.rewards.settings import RewardSettings
from nemo_aligner_diffusion.settings import BOOL, Kind, choice, setting

if TYPE_CHECKING:
    from torch import Tensor

# ITU-T T.81 (JPEG), Annex K, tables K.1 and K.2: quantisation steps at quality 50.
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
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


@dataclass(frozen=True, kw_only=True)
class Compressibility(RewardSettings):
    """``-‖x - jpeg(x)‖²``: 0 for a picture that JPEG keeps exactly, lower the more it would lose; see :func:`jpeg`.

    Coarser quantisation penalises more detail: at quality 50 most small coefficients are rounded to zero and the
    gradient smooths them away; from 65 on it moves them to the nearest step instead, which changes the file's size
    hardly.
    """

    name = "compressibility"
    sign: ClassVar[float] = -1.0

    quality: int = setting(50, Kind("int", low=1, high=100), "JPEG quality, 1 (coarse) to 100 (fine), as in libjpeg")
    chroma_subsampling: bool = setting(
        True, BOOL, "colour at half the resolution (4:2:0), as most JPEG files have it; true or false"
    )
    reduction: str = setting("sum", choice("sum", "mean"), "over a picture's values: sum (grows with its size) or mean")

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        squares = (images - jpeg(images, self.quality, self.chroma_subsampling)).square()
        total = squares.sum(dim=(1, 2, 3)) if self.reduction == "sum" else squares.mean(dim=(1, 2, 3))
        return self.sign * total


@dataclass(frozen=True, kw_only=True)
class Incompressibility(Compressibility):
    """The opposite, ``+‖x - jpeg(x)‖²``."""

    name = "incompressibility"
    sign = 1.0


@dataclass(frozen=True, kw_only=True)
class JPEGSize(RewardSettings):
    """Kilobytes (1000 bytes) of the file that Pillow writes, negative where small ones are wanted (as in DDPO's paper).

    It is for methods that need no gradient; the differentiable ones are ``compressibility`` and ``incompressibility``.
    """

    name = "jpeg_size"
    differentiable: ClassVar[bool] = False

    quality: int = setting(95, Kind("int", low=1, high=100), "JPEG quality, 1 (coarse) to 100 (fine); published: 95")
    wanted: str = setting("small", choice("small", "large"), "small files (compressibility), or large ones")

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        import torch

        from nemo_aligner_diffusion.formats.pictures import picture_of

        if images.requires_grad and torch.is_grad_enabled():
            raise RewardError(next(self.without_gradient()))
        sizes = []
        for picture in map(picture_of, images.detach().float().cpu().numpy()):
            file = io.BytesIO()
            picture.save(file, format="JPEG", quality=self.quality)
            sizes.append(file.tell() / 1000)
        return torch.tensor(sizes, dtype=images.dtype, device=images.device) * (1 if self.wanted == "large" else -1)

    def without_gradient(self, where: str = "rm") -> Iterator[str]:
        other = "compressibility" if self.wanted == "small" else "incompressibility"
        yield (
            f"{where}.name = {self.name} is the size of a file, which has no gradient: expected algorithm=ddpo, or the "
            f"differentiable {where}.name={other}"
        )


def jpeg(images: Tensor, quality: int = 50, chroma_subsampling: bool = True, exact_rounding: bool = False) -> Tensor:
    """RGB ``(B, 3, H, W)`` in ``[0, 1]`` to what a JPEG decoder would show, before its clamp to ``[0, 1]``.

    The compression follows the standard up to the entropy coder: YCbCr, optional 2×2 chroma subsampling, 8×8 DCT, the
    standard tables scaled by quality, rounding. Rounding is ``⌊v⌉ + (v - ⌊v⌉)³`` (Shin & Song, 2017, "JPEG-resistant
    adversarial images"), whose gradient is not zero almost everywhere; ``exact_rounding`` gives the real one, which has
    no useful gradient. Any size works: edges are repeated to whole blocks.
    """
    import torch
    from torch.nn import functional

    to_ycc = torch.tensor(_RGB_TO_YCC, dtype=torch.float64)
    luminance_steps, chrominance_steps = (quantisation_steps(table, quality) for table in (LUMINANCE, CHROMINANCE))
    height, width = images.shape[-2:]
    block = 16 if chroma_subsampling else 8
    padded = functional.pad(images * 255.0, (0, -width % block, 0, -height % block), mode="replicate")
    ycc = torch.einsum("ij,bjhw->bihw", to_ycc.to(images), padded)
    luminance = _compress(ycc[:, :1] - 128.0, luminance_steps, exact_rounding) + 128.0
    chrominance = ycc[:, 1:]
    if chroma_subsampling:
        chrominance = functional.avg_pool2d(chrominance, 2)
    chrominance = _compress(chrominance, chrominance_steps, exact_rounding)
    if chroma_subsampling:  # bilinear with these weights is libjpeg's "fancy upsampling"
        chrominance = functional.interpolate(chrominance, scale_factor=2, mode="bilinear", align_corners=False)
    ycc = torch.cat([luminance, chrominance], dim=1)
    rgb = torch.einsum("ij,bjhw->bihw", torch.linalg.inv(to_ycc).to(images), ycc) / 255.0
    return rgb[..., :height, :width]


def _compress(plane: Tensor, table: Sequence[Sequence[int]], exact_rounding: bool) -> Tensor:
    """Planes ``(B, C, H, W)`` through DCT, quantisation by an 8×8 ``table``, and back."""
    dct = _dct_matrix().to(plane)
    steps = plane.new_tensor(table)
    blocks = plane.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).transpose(-3, -2)  # (B, C, rows, columns, 8, 8)
    coefficients = dct @ blocks @ dct.T / steps
    rounded = coefficients.detach().round()
    if not exact_rounding:
        rounded = rounded + (coefficients - rounded) ** 3
    blocks = dct.T @ (rounded * steps) @ dct
    return blocks.transpose(-3, -2).flatten(-2).flatten(-3, -2)


def _dct_matrix() -> Tensor:
    """The orthonormal 8-point DCT-II, ``(frequency, sample)``, float64."""
    import torch

    sample = torch.arange(8, dtype=torch.float64)
    matrix = torch.cos(math.pi / 8 * (sample + 0.5) * sample.unsqueeze(1)) / 2
    matrix[0] /= math.sqrt(2)
    return matrix


def quantisation_steps(table: Sequence[Sequence[int]], quality: int) -> list[list[int]]:
    """``table`` scaled to ``quality`` as libjpeg does (``jpeg_quality_scaling``)."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    return [[min(max((step * percent + 50) // 100, 1), 255) for step in row] for row in table]
