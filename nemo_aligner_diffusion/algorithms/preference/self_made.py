"""Pairs that a model makes itself, labelled by a rule or a reward: preferences to learn from without asking anybody.

For each prompt some seeds make pictures; every two of them are a pair. What is made of a prompt depends on that prompt,
the seed and the settings alone, so that equal settings give equal bytes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_aligner_diffusion.data.preferences.settings import SelfMadeSettings
from nemo_aligner_diffusion.data.preferences.shards import PreferencePair, write_preference_shards
from nemo_aligner_diffusion.data.prompts import read_prompts
from nemo_aligner_diffusion.data.shards import WrittenShards
from nemo_aligner_diffusion.diffusion.generate import Sampling, generate
from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.diffusion.lora import has_lora
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.embedded_assets import embedded_model_path, embedded_prompts_path
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.formats.files import read_json
from nemo_aligner_diffusion.formats.pictures import encode_png, picture_of
from nemo_aligner_diffusion.parallel.broadcast import from_first_process
from nemo_aligner_diffusion.rewards.registry import read_reward
from nemo_aligner_diffusion.runtime.files import write_atomic

log = logging.getLogger(__name__)

Labeller = Callable[[Tensor, Sequence[str]], Tensor]  # (B, 3, H, W) in [0, 1] and B prompts to scores (B,)

HELD_OUT = 0.2  # share of the prompts
# Without guidance, seeds of one prompt differ three times as much in colour as with the guidance of 2 of the recipes,
# and a picture costs half.
GUIDANCE = 1.0
PROMPTS_AT_ONCE = 8
FOLDER, FACTS = "preferences", "made.json"  # in a run directory; how they were made


# Smallest difference that counts as a preference, in the reward's units; pairs closer than this are ties.
TIE_MARGINS = {"colourfulness": 2.0, "symmetry": 0.005}


def labeller_of(name: str) -> Labeller:
    """The reward of this ``rm.name`` as it is by default (``clip``: the embedded CLIP).

    Raises:
        ConfigurationError: there is none of this name, or it needs more than a name.
    """
    settings, _ = read_reward({"name": name}, "labeller")
    return settings.build()


def make_preferences(
    model: DiffusionModel,
    labeller: Labeller,
    prompts: Iterable[str],
    output: Path,
    *,
    seeds_per_prompt: int,
    sampling: Sampling,
    tie_margin: float = 0.0,
    label_noise: float = 0.0,
    seed: int = 0,
    overwrite: bool = False,
) -> WrittenShards:
    """Write preference shards of pictures of ``model`` as it stands.

    Args:
        prompts: no two alike.
        seeds_per_prompt: pictures of each prompt, ``n``: ``n·(n−1)/2`` pairs; at least 2.
        tie_margin: scores that differ by less are a tie; so are equal ones.
        label_noise: probability that the worse one is said to be the better, drawn for each pair by (``seed``, prompt,
            pair); ties stay ties.
        seed: of the pictures' noise and of ``label_noise``.

    Raises:
        OutputError: ``output`` cannot be written, or holds shards and ``overwrite`` is not set.
    """

    def pairs() -> Iterator[PreferencePair]:
        for prompt, images in _pictures(model, list(prompts), seeds_per_prompt, seed, sampling):
            with torch.no_grad():
                values = labeller(images, [prompt] * len(images)).tolist()
            encoded = [encode_png(picture_of(image)) for image in images.numpy()]
            for i, j in itertools.combinations(range(len(values)), 2):
                first, second = (i, j) if (i + j) % 2 else (j, i)  # so that neither side is the earlier seed's
                gap = values[first] - values[second]
                share = 0.5 if gap == 0 or abs(gap) < tie_margin else float(gap > 0)
                if random.Random(f"{seed}/{prompt}/{i}/{j}/label noise").random() < label_noise:
                    share = 1 - share
                yield PreferencePair((encoded[first], encoded[second]), prompt, (share, 1 - share), f"{prompt!r}")

    return write_preference_shards(pairs(), output, overwrite=overwrite)


def own_preferences(model: DiffusionModel, directory: Path, settings: SelfMadeSettings, seed: int) -> Path:
    """The folder ``preferences`` in a run directory: made now by the pre-trained model, or found as it was made before.

    A collective call: the first process makes them, the others wait.

    Args:
        seed: ``model.seed``.

    Raises:
        ConfigurationError: they were made by other settings; no such labeller.
    """
    return from_first_process(lambda: _made_once(model, directory / FOLDER, settings, seed))


def _made_once(model: DiffusionModel, folder: Path, settings: SelfMadeSettings, seed: int) -> Path:
    asked: dict[str, Any] = {**asdict(settings), "seed": seed}
    if (folder / FACTS).exists():  # written last: they are complete
        made = read_json(folder / FACTS, ConfigurationError)
        others = [name for name in asked if made.get(name) != asked[name]]
        if others:
            then, now = (", ".join(f"{name} {of.get(name)}" for name in others) for of in (made, asked))
            raise ConfigurationError(
                f"{folder} holds preferences made with {then}, and this run asks for {now} "
                "(model.preference.self_made, model.seed): give the same again, or start a new run directory"
            )
        return folder
    tuned = has_lora(model.denoiser) or model.reference_denoiser is not None
    margin = TIE_MARGINS.get(settings.labeller, 0.0) if settings.tie_margin is None else settings.tie_margin
    log.info("no shards are named: the model makes pairs of its own pictures, %s prefers one", settings.labeller)
    with model.reference() if tuned else contextlib.nullcontext():
        written = make_preferences(
            model,
            labeller_of(settings.labeller),
            drawn_prompts(settings.prompts, seed),
            folder,
            seeds_per_prompt=settings.seeds,
            sampling=Sampling(settings.steps, GUIDANCE),
            tie_margin=margin,
            label_noise=settings.label_noise,
            seed=seed,
            overwrite=True,  # of a start that was killed here
        )
    write_atomic(folder / FACTS, json.dumps(asked, indent=1) + "\n")
    log.info("%d pairs in %s", written.samples, folder)
    return folder


def drawn_prompts(count: int, seed: int) -> list[str]:
    """So many of the embedded training prompts, drawn by ``seed``; all where there are fewer."""
    texts = list(dict.fromkeys(read_prompts(str(embedded_prompts_path("train")))))
    random.Random(f"{seed}/split").shuffle(texts)
    return texts[:count]


def make_rule_preferences(
    output: Path,
    rule: str,
    prompts: int,
    seeds_per_prompt: int,
    steps: int,
    seed: int,
    overwrite: bool,
    label_noise: float = 0.0,
) -> tuple[WrittenShards, WrittenShards]:
    """Write ``output/train`` and ``output/validation``, of pictures of the embedded model.

    Prompts, not pairs, are split into training and held-out ones, so that the held-out accuracy is about pictures of
    things never asked about.

    Args:
        rule: :func:`labeller_of`'s name.
        prompts: so many of the embedded training prompts, drawn by ``seed``; at least 2.
        steps: sampling steps.
        seeds_per_prompt, seed, overwrite, label_noise: :func:`make_preferences`'s.
    """
    labeller = labeller_of(rule)
    texts = drawn_prompts(prompts, seed)
    cut = min(max(round(len(texts) * HELD_OUT), 1), len(texts) - 1)
    write = partial(
        make_preferences,
        load_model(embedded_model_path()),
        labeller,
        seeds_per_prompt=seeds_per_prompt,
        sampling=Sampling(steps, GUIDANCE),
        tie_margin=TIE_MARGINS.get(rule, 0.0),
        label_noise=label_noise,
        seed=seed,
        overwrite=overwrite,
    )
    validation = write(texts[:cut], output / "validation")
    return write(texts[cut:], output / "train"), validation


def _pictures(
    model: DiffusionModel, prompts: Sequence[str], count: int, seed: int, sampling: Sampling
) -> Iterator[tuple[str, Tensor]]:
    """(prompt, pictures ``(count, 3, H, W)`` in [0, 1]) of each prompt."""
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        some = prompts[start : start + PROMPTS_AT_ONCE]
        names = [prompt for prompt in some for _ in range(count)]
        # Seeds from the prompt itself: what is made of it depends on no other prompt. Away from the judges' 0…199.
        seeds = [random.Random(f"{seed}/{prompt}/{k}").randrange(1_000, 2**31) for prompt in some for k in range(count)]
        images = generate(model, names, seeds, sampling, batch_size=len(names))
        yield from zip(some, images.split(count), strict=True)
