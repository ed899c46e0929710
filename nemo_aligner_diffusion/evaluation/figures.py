"""Labelled picture grids. Curves are in :mod:`nemo_aligner_diffusion.evaluation.curves`.

Pictures come as float arrays or tensors ``(N, 3, H, W)`` in ``[0, 1]``, or as Pillow images; torch is not imported.
A grid of a base and a tuned model describes itself: its ``info["grid"]`` (kept in the PNG by :func:`save_image`) says
which rectangle shows which prompt, seed and reward, so that the report can cut single pictures out of it again.

Example::

    rewards = {"base": [20.1, 19.3], "tuned": [21.4, 19.9]}
    grid = picture_grid({"base": base, "tuned": tuned}, ["red apple", "animal"], rewards=rewards, seeds=[0, 0])
    save_image(grid, "samples/step_000050.png")
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin

from nemo_aligner_diffusion.errors import first_line
from nemo_aligner_diffusion.evaluation.run_files import finite
from nemo_aligner_diffusion.evaluation.text import fit_text, font, format_gain, format_number
from nemo_aligner_diffusion.formats.pictures import picture_of
from nemo_aligner_diffusion.runtime.files import write_atomic

GRID_KEY = "grid"  # name of the PNG text chunk that describes a grid
_PAPER = (255, 255, 255)
_INK = (28, 32, 38)
_QUIET = (107, 114, 128)
_BETTER = (21, 128, 61)
_WORSE = (185, 28, 28)
_GAP = 10  # px between pictures
_SMALL_SIDE = 160  # px; a picture whose longer side is below this is enlarged by a whole factor
_LARGE_SIDE = 512  # px; a larger one is reduced

Rectangle = list[int]  # [left, top, width, height] in pixels


def to_pictures(images: Iterable[Any]) -> list[Image.Image]:
    """Turn ``(N, 3, H, W)`` floats in ``[0, 1]`` (tensor, array), or a sequence of pictures, into RGB Pillow images.

    A sequence may mix Pillow images and ``(3, H, W)`` arrays. Values outside ``[0, 1]`` are clamped, NaN becomes black.
    Of a video, ``(N, F, 3, H, W)``, the first, middle and last frame stand side by side.

    Raises:
        ValueError: an array is none of these.
    """
    return [_to_picture(image) for image in images]


def _to_picture(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if hasattr(image, "detach"):  # a torch tensor, on any device, of any float type
        image = image.detach().float().cpu().numpy()
    array = np.asarray(image, dtype=np.float32)
    if array.ndim == 4 and array.shape[1] == 3:
        frames = sorted({0, len(array) // 2, len(array) - 1})
        array = np.concatenate([array[i] for i in frames], axis=2)
    if array.ndim != 3 or array.shape[0] != 3:
        raise ValueError(
            f"a picture of shape {array.shape} was given, expected (3, height, width) with values in [0, 1]"
        )
    return picture_of(array)


def enlarge(picture: Image.Image) -> Image.Image:
    """Bring a picture to a size one can look at, keeping its proportions.

    Small ones grow by a whole factor: up to 32 px pixel by pixel (interpolation would only blur them), above that with
    Lanczos.
    """
    longer = max(picture.size)
    if longer > _LARGE_SIDE:
        return ImageOps.contain(picture, (_LARGE_SIDE, _LARGE_SIDE), Image.Resampling.LANCZOS)
    resampling = Image.Resampling.NEAREST if longer <= 32 else Image.Resampling.LANCZOS
    return ImageOps.scale(picture, math.ceil(_SMALL_SIDE / longer), resampling)


def picture_grid(
    rows: Mapping[str, Iterable[Any]],
    prompts: Sequence[str],
    *,
    rewards: Mapping[str, Sequence[float]] | None = None,
    seeds: Sequence[int] | None = None,
    title: str = "",
    max_columns: int | None = None,
) -> Image.Image:
    """A row of pictures for each model, the same prompt and seed in a column, the reward under each picture.

    Args:
        rows: label -> N pictures, ``(N, 3, H, W)`` in ``[0, 1]`` or Pillow's. Sizes may differ.
        prompts: N captions, wrapped to the pictures' width.
        rewards: label -> N numbers. Those of a row ``base`` are what the others gain (green) or lose (red) against.
        seeds: N seeds, kept in the description of the grid.
        title: a line at the top.
        max_columns: columns before a new band starts below; by default what fits 1,700 px.

    Returns:
        RGB picture; where the rows are ``base`` and ``tuned``, ``info["grid"]`` describes its cells as JSON (see
        :func:`read_grid`).

    Raises:
        ValueError: the numbers of pictures, prompts, rewards and seeds differ, or there are none.
    """
    pictures = {label: [enlarge(picture) for picture in to_pictures(row)] for label, row in rows.items()}
    scores = rewards or {}
    counts = {label: len(row) for label, row in pictures.items()} | {"prompts": len(prompts)}
    counts |= {f"rewards of {label}": len(values) for label, values in scores.items()}
    counts |= {} if seeds is None else {"seeds": len(seeds)}
    if len(set(counts.values())) != 1 or not prompts:
        raise ValueError(f"a grid needs equally many of each, and at least one; given were {counts}")

    cell_width = max(picture.width for row in pictures.values() for picture in row)
    cell_height = max(picture.height for row in pictures.values() for picture in row)
    most = max_columns or max(1, min(10, 1700 // (cell_width + _GAP)))
    bands = math.ceil(len(prompts) / most)
    columns = math.ceil(len(prompts) / bands)  # spread evenly over the bands

    size = 13 if cell_width < 256 else 16
    line = round(1.35 * size)
    longest = max(font(size, bold=True).getlength(label) for label in pictures)
    label_width = min(170, math.ceil(longest) + _GAP) if longest else 0
    width = label_width + columns * (cell_width + _GAP) + _GAP
    heading, heading_font = fit_text(title, width - 2 * _GAP, 18, max_lines=2, bold=True)
    captions = [fit_text(prompt, cell_width, size, max_lines=3) for prompt in prompts]
    caption_height = line * max(_count_lines(text) for text, _ in captions)
    row_height = cell_height + 6 + (line + 4 if scores else 0)
    band_height = _GAP + caption_height + 8 + len(pictures) * row_height
    top = _GAP + 25 * _count_lines(heading) if heading else 0

    canvas = Image.new("RGB", (width, top + bands * band_height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.multiline_text((_GAP, _GAP), heading, _INK, heading_font)
    cells = []
    for column, (caption, caption_font) in enumerate(captions):
        band, place = divmod(column, columns)
        left = label_width + _GAP + place * (cell_width + _GAP)
        middle = left + cell_width / 2
        y = top + band * band_height + _GAP + caption_height
        draw.multiline_text((middle, y), caption, _INK, caption_font, anchor="md", align="center")  # on the pictures
        y += 4
        places: dict[str, Rectangle] = {}
        for label, row in pictures.items():
            picture = row[column]
            corner = left + (cell_width - picture.width) // 2, y + (cell_height - picture.height) // 2
            canvas.paste(picture, corner)
            places[label] = [*corner, *picture.size]
            if label in scores:
                base = scores["base"][column] if "base" in scores and label != "base" else None
                note, colour = _note(scores[label][column], base)
                draw.text((middle, y + cell_height + 2), note, colour, font(size), anchor="ma")
            y += row_height
        found = {name: values[column] for name, values in scores.items()}
        cell = {"prompt": prompts[column], "seed": None if seeds is None else seeds[column], **places}
        cells.append({**cell, "base_reward": found.get("base"), "reward": found.get("tuned")})
    for band in range(bands):
        y = top + band * band_height
        if band:
            draw.line((_GAP, y, width - _GAP, y), fill=(221, 225, 230))
        y += _GAP + caption_height + 4 + cell_height // 2
        for label in pictures:
            text, face = fit_text(label, label_width - _GAP, size, max_lines=4, bold=True)
            draw.multiline_text((label_width, y), text, _INK, face, anchor="rm", align="right")
            y += row_height
    if set(pictures) == {"base", "tuned"}:
        canvas.info[GRID_KEY] = json.dumps({"version": 1, "cells": cells})
    return canvas


def _count_lines(text: str) -> int:
    return len(text.splitlines())


def _note(reward: float, base: float | None) -> tuple[str, tuple[int, int, int]]:
    if base is None:
        return format_number(reward), _INK
    gain = reward - base
    colour = _BETTER if gain > 0 else _WORSE if gain < 0 else _QUIET
    return f"{format_number(reward)} ({format_gain(gain, reward)})", colour


def read_grid(image: Image.Image) -> list[dict[str, Any]]:
    """The cells of a grid: ``prompt, seed, base_reward, reward`` and the rectangles ``base, tuned`` as
    ``[left, top, width, height]`` in pixels.

    Raises:
        ValueError: the picture does not describe itself, or wrongly.
    """
    try:
        found = json.loads(str(image.info[GRID_KEY]))["cells"]
        cells = [
            {
                "prompt": str(cell["prompt"]),
                "seed": cell["seed"] if isinstance(cell["seed"], int) else None,
                "base_reward": finite(cell["base_reward"]),
                "reward": finite(cell["reward"]),
                "base": _inside(image, *cell["base"]),
                "tuned": _inside(image, *cell["tuned"]),
            }
            for cell in found
        ]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"it does not say what it shows: {first_line(error)}") from error
    return cells


def _inside(image: Image.Image, left: int, top: int, width: int, height: int) -> Rectangle:
    if not (0 <= left < left + width <= image.width and 0 <= top < top + height <= image.height):
        raise ValueError(f"{[left, top, width, height]} is not inside of the picture")
    return [left, top, width, height]


def encode_png(image: Image.Image, metadata: Mapping[str, str] | None = None) -> bytes:
    """PNG bytes with ``metadata`` and the picture's own text entries (``info``) as international text chunks."""
    text = PngImagePlugin.PngInfo()
    entries = {key: value for key, value in image.info.items() if isinstance(key, str) and isinstance(value, str)}
    for key, value in {**entries, **(metadata or {})}.items():
        text.add_itxt(key, value)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=text, compress_level=6)
    return buffer.getvalue()


def save_image(image: Image.Image, path: str | Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Write a PNG with its metadata, whole or not at all; raises ``OutputError`` where the folder cannot be written."""
    return write_atomic(path, encode_png(image, metadata))
