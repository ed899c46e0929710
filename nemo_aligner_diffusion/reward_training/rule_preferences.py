"""Preferences by a rule between pictures of the embedded model: data to try reward training on, in minutes.

For each prompt some seeds make pictures; every two of them are a pair, labelled by the rule. Prompts, not pairs, are
split into training and held-out ones, so that the held-out accuracy is about pictures of things never asked about.
"""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from nemo_aligner_diffusion.data.prompts import read_prompts
from nemo_aligner_diffusion.data.shards import WrittenShards
from nemo_aligner_diffusion.diffusion.generate import Sampling, generate
from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.embedded_assets import embedded_model_path, embedded_prompts_path
from nemo_aligner_diffusion.errors import DataError
from nemo_aligner_diffusion.evaluation.figures import to_pictures
from nemo_aligner_diffusion.reward_training.preference_shards import PreferencePair, write_preference_shards
from nemo_aligner_diffusion.reward_training.rules import RULES, label

# Without guidance, seeds of one prompt differ three times as much in colour as with the guidance of 2 of the recipes,
# and a picture costs half; ten sampling steps give nearly the pictures of twenty.
STEPS, GUIDANCE = 10, 1.0
PROMPTS_AT_ONCE = 8


@dataclass(frozen=True)
class RulePreferences:
    """What :func:`make_rule_preferences` wrote."""

    train: WrittenShards
    validation: WrittenShards
    prompts: tuple[int, int]  # of training and of validation
    ties: int


def make_rule_preferences(
    output: Path,
    rule: str,
    tie_margin: float,
    *,
    prompts: Sequence[str] | None = None,
    prompt_count: int | None = None,
    seeds_per_prompt: int = 4,
    held_out: float = 0.2,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> RulePreferences:
    """Write ``output/train`` and ``output/validation``.

    Args:
        rule: a key of :data:`.rules.RULES`.
        tie_margin: pairs that differ by less in the rule's units are ties.
        prompts: the embedded training prompts when left out.
        prompt_count: take so many of them, drawn by ``seed``; all when left out.
        seeds_per_prompt: pictures of each prompt, ``n``: ``n·(n−1)/2`` pairs.
        held_out: share of the prompts whose pairs go to ``validation``.
        steps, guidance: how the pictures are sampled.
        seed: of the split and of the pictures' noise.
        overwrite: replace earlier shards there.
        progress: called with pictures made and to make.

    Raises:
        DataError: too few prompts or seeds, or an impossible share.
        OutputError: ``output`` cannot be written, or holds shards and ``overwrite`` is false.
    """
    texts = list(dict.fromkeys(prompts if prompts is not None else read_prompts(str(embedded_prompts_path("train")))))
    if seeds_per_prompt < 2:
        raise DataError(f"seeds_per_prompt is {seeds_per_prompt}; expected at least 2, as pairs are of two pictures")
    if not 0 < held_out < 1 or len(texts[:prompt_count]) < 2:
        raise DataError(
            f"held_out is {held_out} of {len(texts)} prompts; expected a share between 0 and 1, and two prompts or more"
        )
    random.Random(f"{seed}/split").shuffle(texts)
    texts = texts[:prompt_count]
    cut = min(max(round(len(texts) * held_out), 1), len(texts) - 1)
    validation, train = texts[:cut], texts[cut:]
    total = len(texts) * seeds_per_prompt
    done = ties = 0

    def pairs(chosen: Sequence[str]) -> Iterator[PreferencePair]:
        nonlocal done, ties
        for prompt, pictures in _pictures(chosen, seeds_per_prompt, seed, steps, guidance):
            values = RULES[rule](pictures).tolist()
            encoded = [_png(picture) for picture in to_pictures(pictures)]
            for i, j in itertools.combinations(range(len(values)), 2):
                first, second = (i, j) if (i + j) % 2 else (j, i)  # so that neither side is the earlier seed's
                chosen_label = label(values[first], values[second], tie_margin)
                ties += chosen_label[0] == 0.5
                yield PreferencePair((encoded[first], encoded[second]), prompt, chosen_label, f"{prompt!r}")
            done += len(values)
            progress(done, total)

    written = [
        write_preference_shards(pairs(chosen), output / name, overwrite=overwrite)
        for name, chosen in (("validation", validation), ("train", train))
    ]
    return RulePreferences(written[1], written[0], (len(train), len(validation)), ties)


def _pictures(
    prompts: Iterable[str], count: int, seed: int, steps: int, guidance: float
) -> Iterator[tuple[str, Tensor]]:
    """(prompt, pictures ``(count, 3, H, W)`` in [0, 1]) of each prompt."""
    model = load_model(embedded_model_path())
    rest = list(prompts)
    while rest:
        some, rest = rest[:PROMPTS_AT_ONCE], rest[PROMPTS_AT_ONCE:]
        names = [prompt for prompt in some for _ in range(count)]
        # Seeds from the prompt itself: what is made of it depends on no other prompt. Away from the judges' 0…199.
        seeds = [random.Random(f"{seed}/{prompt}/{k}").randrange(1_000, 2**31) for prompt in some for k in range(count)]
        images = generate(model, names, seeds, Sampling(steps, guidance), batch_size=len(names))
        yield from zip(some, images.split(count), strict=True)


def _png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")  # lossless: the rule holds for what is stored
    return stream.getvalue()
