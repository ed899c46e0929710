"""Where ``generate.py`` puts its pictures, and what it prints of their rewards."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from nemo_aligner_diffusion.errors import OutputError, printable
from nemo_aligner_diffusion.evaluation.figures import labelled_grid, sample_grid, save_image, to_pictures
from nemo_aligner_diffusion.evaluation.text import format_gain, format_number

_MOST_IN_GRID = 240  # columns; the single pictures are written in any case
_MOST_PRINTED = 40

Pairs = Sequence[tuple[str, int]]  # (prompt, seed)


def claim_folder(wanted: Path, overwrite: bool) -> Path:
    """Make ``wanted``; where it holds files already take ``wanted-2``, ``wanted-3``, … unless ``overwrite``.

    Raises:
        OutputError: it is a file, or cannot be written to.
    """
    wanted = wanted.expanduser()
    number = 1
    try:
        while True:
            folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
            folder.mkdir(parents=True, exist_ok=True)
            if overwrite or not any(folder.iterdir()):
                return folder
            number += 1
    except OSError as error:
        raise OutputError(
            f"--output {wanted}: {error.strerror or error}; expected a folder that can be made and written to"
        ) from error


def write_pictures(
    folder: Path, images: Any, pairs: Pairs, row: str, facts: Mapping[str, Any], rewards: Sequence[float] | None
) -> list[Path]:
    """One PNG a picture, named by number, prompt, seed and row; its text chunks: ``prompt``, ``settings`` (JSON)."""
    # "scale -1" and "scale 1" must not become one name
    suffix = f"_{_slug(re.sub(r'-(?=[0-9.])', 'minus ', row))}" if row else ""
    paths = []
    for index, (picture, (prompt, seed)) in enumerate(zip(to_pictures(images), pairs, strict=True)):
        made = {"prompt": prompt, "seed": seed, **facts, "height": picture.height, "width": picture.width}
        if rewards is not None:
            made["reward"] = rewards[index]
        metadata = {"prompt": prompt, "settings": json.dumps(made, ensure_ascii=False)}
        paths.append(save_image(picture, folder / f"{index:04d}_{_slug(prompt)}_seed{seed}{suffix}.png", metadata))
    return paths


def write_grid(
    folder: Path, images: Mapping[str, Any], rewards: Mapping[str, Sequence[float]], pairs: Pairs, title: str
) -> Path:
    """``grid.png``: base above tuned where these are the rows, else rows by label; a single row as prompts by seeds."""
    if len(pairs) > _MOST_IN_GRID:
        title += f"; the first {_MOST_IN_GRID} of {len(pairs)}"
        pairs = pairs[:_MOST_IN_GRID]
    pictures = {label: to_pictures(part[: len(pairs)]) for label, part in images.items()}
    scores = {label: list(part[: len(pairs)]) for label, part in rewards.items()}
    seeds = [seed for _, seed in pairs]
    different = len(set(seeds))
    captions = [prompt if different == 1 else f"{prompt} (seed {seed})" for prompt, seed in pairs]
    if list(pictures) == ["base", "tuned"]:
        grid = sample_grid(
            *pictures.values(), captions, scores.get("base"), scores.get("tuned"), seeds=seeds, title=title
        )
    else:
        single = len(pictures) == 1
        notes = [[format_number(value) for value in scores[label]] for label in pictures] if scores else None
        grid = labelled_grid(
            list(pictures.values()),
            [""] if single else list(pictures),
            captions,
            notes=notes,
            title=title,
            max_columns=different if single and 1 < different <= 10 else None,
        )
    return save_image(grid, folder / "grid.png")


def print_rewards(rewards: Mapping[str, Sequence[float]], pairs: Pairs, name: str) -> None:
    """A line for each picture (while they are few) and the means; gains over the base model where it is there."""
    base = rewards.get("base")

    def written(label: str, value: float, beside: float) -> str:
        return format_number(value) + (f" ({format_gain(value - beside, value)})" if base and label != "base" else "")

    print(f"reward ({name}):")
    width = min(48, max(len(prompt) for prompt, _ in pairs))
    for index, (prompt, seed) in enumerate(pairs[:_MOST_PRINTED]):
        beside = base[index] if base else 0.0
        cells = [f"{label} {written(label, values[index], beside)}" for label, values in rewards.items()]
        print(f"  {printable(prompt, width):<{width}}  seed {seed}: " + ", ".join(cells))
    if len(pairs) > _MOST_PRINTED:
        print(f"  … and {len(pairs) - _MOST_PRINTED} more, in each PNG's metadata")
    for label, values in rewards.items():
        print(f"  mean, {label}: {written(label, fmean(values), fmean(base or [0.0]))}", end="")
        if base and label != "base":
            better = sum(value > other for value, other in zip(values, base, strict=True))
            print(f", above base on {better} of {len(values)}", end="")
        print()


def _slug(text: str) -> str:
    """Letters and digits of any script, at most 40 of them: safe in a file name everywhere."""
    return re.sub(r"[^\w.]+", "-", text.lower()).strip("-.")[:40].rstrip("-.") or "picture"
