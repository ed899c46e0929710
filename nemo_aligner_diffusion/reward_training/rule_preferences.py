"""Preferences by a rule between pictures of the embedded model: data to try reward training on, in minutes.

For each prompt some seeds make pictures; every two of them are a pair, labelled by the rule. Prompts, not pairs, are
split into training and held-out ones, so that the held-out accuracy is about pictures of things never asked about.
"""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from nemo_aligner_diffusion.data.preferences.shards import PreferencePair, write_preference_shards
from nemo_aligner_diffusion.data.prompts import read_prompts
from nemo_aligner_diffusion.data.shards import WrittenShards
from nemo_aligner_diffusion.diffusion.generate import Sampling, generate
from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.embedded_assets import embedded_model_path, embedded_prompts_path
from nemo_aligner_diffusion.evaluation.figures import to_pictures
from nemo_aligner_diffusion.rewards.symmetry import Symmetry

HELD_OUT = 0.2  # share of the prompts
# Without guidance, seeds of one prompt differ three times as much in colour as with the guidance of 2 of the recipes,
# and a picture costs half.
GUIDANCE = 1.0
PROMPTS_AT_ONCE = 8


def colourfulness(images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
    """``(B,)``, 0 for grey, above 100 for gaudy: ``√(σ²_rg + σ²_yb) + 0.3·√(μ²_rg + μ²_yb)`` in the opponent colours
    ``rg = R − G``, ``yb = (R + G)/2 − B`` on a scale of 255, of images ``(B, 3, H, W)`` in ``[0, 1]``.

    Hasler & Süsstrunk, 2003, "Measuring colourfulness in natural images", the efficient metric of section 7.
    """
    red, green, blue = (images.double() * 255).flatten(2).unbind(1)
    opponent = (red - green, (red + green) / 2 - blue)
    spread = sum(colour.var(dim=1, unbiased=False) for colour in opponent)
    shift = sum(colour.mean(dim=1).square() for colour in opponent)
    return spread**0.5 + 0.3 * shift**0.5


symmetry = Symmetry().score
RULES: dict[str, Callable[[Tensor, Sequence[str]], Tensor]] = {"colourfulness": colourfulness, "symmetry": symmetry}
# Smallest difference that counts as a preference, in the rule's units; pairs closer than this are ties.
TIE_MARGINS = {"colourfulness": 2.0, "symmetry": 0.005}


def make_rule_preferences(
    output: Path, rule: str, prompts: int, seeds_per_prompt: int, steps: int, seed: int, overwrite: bool
) -> tuple[WrittenShards, WrittenShards]:
    """Write ``output/train`` and ``output/validation``.

    Args:
        rule: a key of :data:`RULES`.
        prompts: so many of the embedded training prompts, drawn by ``seed``; at least 2.
        seeds_per_prompt: pictures of each prompt, ``n``: ``n·(n−1)/2`` pairs; at least 2.
        steps: sampling steps.
        seed: of the split and of the pictures' noise.

    Raises:
        OutputError: ``output`` cannot be written, or holds shards and ``overwrite`` is false.
    """
    texts = list(dict.fromkeys(read_prompts(str(embedded_prompts_path("train")))))
    random.Random(f"{seed}/split").shuffle(texts)
    texts = texts[:prompts]
    cut = min(max(round(len(texts) * HELD_OUT), 1), len(texts) - 1)

    def pairs(chosen: Sequence[str]) -> Iterator[PreferencePair]:
        for prompt, images in _pictures(chosen, seeds_per_prompt, seed, steps):
            values = RULES[rule](images, ()).tolist()
            encoded = [_png(picture) for picture in to_pictures(images)]
            for i, j in itertools.combinations(range(len(values)), 2):
                first, second = (i, j) if (i + j) % 2 else (j, i)  # so that neither side is the earlier seed's
                gap = values[first] - values[second]
                share = 0.5 if abs(gap) < TIE_MARGINS[rule] else float(gap > 0)
                yield PreferencePair((encoded[first], encoded[second]), prompt, (share, 1 - share), f"{prompt!r}")

    validation = write_preference_shards(pairs(texts[:cut]), output / "validation", overwrite=overwrite)
    return write_preference_shards(pairs(texts[cut:]), output / "train", overwrite=overwrite), validation


def _pictures(prompts: Sequence[str], count: int, seed: int, steps: int) -> Iterator[tuple[str, Tensor]]:
    """(prompt, pictures ``(count, 3, H, W)`` in [0, 1]) of each prompt."""
    model = load_model(embedded_model_path())
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        some = prompts[start : start + PROMPTS_AT_ONCE]
        names = [prompt for prompt in some for _ in range(count)]
        # Seeds from the prompt itself: what is made of it depends on no other prompt. Away from the judges' 0…199.
        seeds = [random.Random(f"{seed}/{prompt}/{k}").randrange(1_000, 2**31) for prompt in some for k in range(count)]
        images = generate(model, names, seeds, Sampling(steps, GUIDANCE), batch_size=len(names))
        yield from zip(some, images.split(count), strict=True)


def _png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")  # lossless: the rule holds for what is stored
    return stream.getvalue()
