"""Rules that say which of two pictures is preferred, for trying out reward training where nobody was asked.

Neither is anything that a CLIP was taught, both are seen at a glance, and both have a number for every picture.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Rule = Callable[[Tensor], Tensor]


def colourfulness(images: Tensor) -> Tensor:
    """``(B,)``, 0 for grey, above 100 for gaudy: ``√(σ²_rg + σ²_yb) + 0.3·√(μ²_rg + μ²_yb)`` in the opponent colours
    ``rg = R − G``, ``yb = (R + G)/2 − B`` on a scale of 255, of images ``(B, 3, H, W)`` in ``[0, 1]``.

    Hasler & Süsstrunk, 2003, "Measuring colourfulness in natural images", the efficient metric of section 7.
    """
    red, green, blue = (images.double() * 255).flatten(2).unbind(1)
    opponent = (red - green, (red + green) / 2 - blue)
    spread = sum(colour.var(dim=1, unbiased=False) for colour in opponent)
    shift = sum(colour.mean(dim=1).square() for colour in opponent)
    return spread**0.5 + 0.3 * shift**0.5


def symmetry(images: Tensor) -> Tensor:
    """``(B,)``, at most 0: minus the mean absolute difference between a picture and its mirror image, times 100."""
    images = images.double()
    return -100 * (images - images.flip(-1)).abs().mean(dim=(1, 2, 3))


RULES: dict[str, Rule] = {"colourfulness": colourfulness, "symmetry": symmetry}
# Smallest difference that counts as a preference, in the rule's units; pairs closer than this are ties.
TIE_MARGINS = {"colourfulness": 2.0, "symmetry": 0.5}


def label(first: float, second: float, tie_margin: float) -> tuple[float, float]:
    """``(1, 0)`` where the first has more, ``(0, 1)`` where the second has, ``(0.5, 0.5)`` within the margin."""
    if abs(first - second) < tie_margin:
        return 0.5, 0.5
    return (1.0, 0.0) if first > second else (0.0, 1.0)
