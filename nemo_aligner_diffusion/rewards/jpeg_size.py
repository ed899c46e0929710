"""The size of a picture's JPEG file: a reward that is a number and has no gradient (DDPO, arXiv 2305.13301)."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from nemo_aligner_diffusion.errors import RewardError
from nemo_aligner_diffusion.rewards.settings import RewardSettings
from nemo_aligner_diffusion.settings import Kind, choice, setting

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class JPEGSize(RewardSettings):
    """Kilobytes (1000 bytes) of the file that Pillow writes, negative where small files are wanted.

    It is for methods that need no gradient; the differentiable ones are ``compressibility`` and ``incompressibility``.
    """

    name = "jpeg_size"
    differentiable: ClassVar[bool] = False

    quality: int = setting(95, Kind("int", low=1, high=100), "JPEG quality, 1 (coarse) to 100 (fine); published: 95")
    wanted: str = setting("small", choice("small", "large"), "small files (compressibility), or large ones")

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        import torch
        from PIL import Image

        if images.requires_grad and torch.is_grad_enabled():
            raise RewardError(next(self.without_gradient()))
        sizes = []
        for picture in (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy():
            file = io.BytesIO()
            Image.fromarray(picture).save(file, format="JPEG", quality=self.quality)
            sizes.append(file.tell() / 1000)
        return torch.tensor(sizes, dtype=images.dtype, device=images.device) * (1 if self.wanted == "large" else -1)

    def without_gradient(self, where: str = "rm") -> Iterator[str]:
        other = "compressibility" if self.wanted == "small" else "incompressibility"
        yield (
            f"{where}.name = {self.name} is the size of a file, which has no gradient: expected algorithm=ddpo, or the "
            f"differentiable {where}.name={other}"
        )
