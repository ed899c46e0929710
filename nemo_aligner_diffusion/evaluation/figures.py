"""Labelled picture grids. Curves are in :mod:`nemo_aligner_diffusion.evaluation.curves`.

Pictures come as float arrays or tensors ``(N, 3, H, W)`` in ``[0, 1]``, or as Pillow images; torch is not imported.
A grid made by :func:`sample_grid` describes itself: its ``info["grid"]`` (kept in the PNG by :func:`save_image`) says
which rectangle shows which prompt, seed and reward, so that the report can cut single pictures out of it again.

Example::

    grid = sample_grid(base, tuned, ["red apple", "animal"], base_rewards=[20.1, 19.3], tuned_rewards=[21.4, 19.9])
    save_image(grid, "samples/step_000050.png")
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin

from nemo_aligner_diffusion.errors import first_line
from nemo_aligner_diffusion.evaluation.run_files import finite
from nemo_aligner_diffusion.evaluation.text import fit_text, font, format_gain, format_number
from nemo_aligner_diffusion.runtime.files import write_atomic

GRID_KEY = "grid"  # name of the PNG text chunk that describes a grid
_PAPER = (255, 255, 255)
_INK = (28, 32, 38)
_QUIET = (107, 114, 128)
_BETTER = (21, 128, 61)
_WORSE = (185, 28, 28)
_EMPTY = (238, 240, 243)
_GAP = 10  # px between pictures
_SMALL_SIDE = 160  # px; a picture whose longer side is below this is enlarged by a whole factor
_LARGE_SIDE = 512  # px; a larger one is reduced


class Cell(NamedTuple):
    """One picture of a grid and the line under it; ``picture=None`` leaves the place empty."""

    picture: Image.Image | None
    note: str = ""
    note_colour: tuple[int, int, int] = _INK


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
    array = np.nan_to_num(array, nan=0.0).clip(0.0, 1.0)
    return Image.fromarray(np.rint(array.transpose(1, 2, 0) * 255.0).astype(np.uint8))


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


Rectangle = list[int]  # [left, top, width, height] in pixels


def _draw_table(
    rows: Sequence[Sequence[Cell]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str,
    max_columns: int | None,
) -> tuple[Image.Image, list[list[Rectangle | None]]]:
    """The grid, and of each cell where its picture is; too many columns continue in further bands below."""
    pictures = [cell.picture for row in rows for cell in row if cell.picture is not None]
    cell_width = max((picture.width for picture in pictures), default=_SMALL_SIDE)
    cell_height = max((picture.height for picture in pictures), default=_SMALL_SIDE)
    most = max_columns or max(1, min(10, 1700 // (cell_width + _GAP)))
    bands = math.ceil(len(column_labels) / most)
    columns = math.ceil(len(column_labels) / bands)  # spread evenly over the bands

    size = 13 if cell_width < 256 else 16
    longest = max((font(size, bold=True).getlength(label) for label in row_labels), default=0.0)
    label_width = min(170, math.ceil(longest) + _GAP) if longest else 0
    captions = [fit_text(label, cell_width, size, max_lines=3) for label in column_labels]
    width = label_width + columns * (cell_width + _GAP) + _GAP
    heading, heading_font = fit_text(title, width - 2 * _GAP, 18, max_lines=2, bold=True)
    line = round(1.35 * size)
    caption_height = line * max(_count_lines(text) for text, _ in captions)
    row_height = cell_height + 6 + (line + 4 if any(cell.note for row in rows for cell in row) else 0)
    band_height = _GAP + caption_height + 8 + len(rows) * row_height
    top = _GAP + 25 * _count_lines(heading) if heading else 0

    canvas = Image.new("RGB", (width, top + bands * band_height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.multiline_text((_GAP, _GAP), heading, _INK, heading_font)
    rectangles: list[list[Rectangle | None]] = [[None] * len(column_labels) for _ in rows]
    for column, (caption, caption_font) in enumerate(captions):
        band, place = divmod(column, columns)
        left = label_width + _GAP + place * (cell_width + _GAP)
        middle = left + cell_width / 2
        y = top + band * band_height + _GAP + caption_height
        draw.multiline_text((middle, y), caption, _INK, caption_font, anchor="md", align="center")  # on the pictures
        y += 4
        for row, cells in enumerate(rows):
            cell = cells[column]
            if cell.picture is None:
                draw.rectangle((left, y, left + cell_width - 1, y + cell_height - 1), fill=_EMPTY)
            else:
                corner = left + (cell_width - cell.picture.width) // 2, y + (cell_height - cell.picture.height) // 2
                canvas.paste(cell.picture, corner)
                rectangles[row][column] = [*corner, *cell.picture.size]
            note, note_font = fit_text(cell.note, cell_width, size, max_lines=1)
            draw.text((middle, y + cell_height + 2), note, cell.note_colour, note_font, anchor="ma")
            y += row_height
    for band in range(bands):
        y = top + band * band_height
        if band:
            draw.line((_GAP, y, width - _GAP, y), fill=(221, 225, 230))
        y += _GAP + caption_height + 4 + cell_height // 2
        for row, label in enumerate(row_labels):
            text, face = fit_text(label, label_width - _GAP, size, max_lines=4, bold=True)
            draw.multiline_text((label_width, y + row * row_height), text, _INK, face, anchor="rm", align="right")
    return canvas, rectangles


def _count_lines(text: str) -> int:
    return len(text.splitlines())


def labelled_grid(
    images: Sequence[Sequence[Any]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    notes: Sequence[Sequence[str]] | None = None,
    title: str = "",
    max_columns: int | None = None,
) -> Image.Image:
    """A table of pictures, ``images[row][column]``, with a label at every row and column; ``None`` is an empty place.

    Too many columns for one band continue in further bands below (``max_columns`` a band).

    Args:
        images: rows of pictures, each ``(3, H, W)`` in ``[0, 1]`` or a Pillow image. Sizes may differ.
        row_labels: one for each row; column_labels: one for each column.
        notes: optional line under each picture, same layout as ``images``.

    Raises:
        ValueError: rows of unequal length, or labels that do not fit the rows and columns.
    """
    counts = [len(row) for row in images]
    if len(row_labels) != len(counts) or {*counts} != {len(column_labels)} or not column_labels:
        raise ValueError(
            f"rows of {counts} pictures were given with {len(row_labels)} row labels and {len(column_labels)} column "
            "labels; expected a label for each row, and one for each picture of a row (None: an empty place)"
        )
    cells = []
    for row, pictures in enumerate(images):
        shown = [None if picture is None else enlarge(_to_picture(picture)) for picture in pictures]
        below = notes[row] if notes else [""] * len(shown)
        cells.append([Cell(picture, note) for picture, note in zip(shown, below, strict=True)])
    return _draw_table(cells, row_labels, column_labels, title, max_columns)[0]


def sample_grid(
    base_images: Any,
    tuned_images: Any,
    prompts: Sequence[str],
    base_rewards: Sequence[float] | None = None,
    tuned_rewards: Sequence[float] | None = None,
    *,
    seeds: Sequence[int] | None = None,
    title: str = "",
    max_columns: int | None = None,
) -> Image.Image:
    """Base above tuned, same prompt and seed in a column, the prompt as caption, the reward under each picture.

    Args:
        base_images, tuned_images: ``(N, 3, H, W)`` floats in ``[0, 1]``, or N Pillow images.
        prompts: N captions, wrapped to the pictures' width.
        base_rewards, tuned_rewards: N numbers each, or None. Gains are green, losses red.
        seeds: N seeds, kept in the description of the grid.
        title: a line at the top.
        max_columns: columns before a new band starts below; by default what fits 1,700 px.

    Returns:
        RGB picture; ``info["grid"]`` describes its cells as JSON (see :func:`read_grid`).

    Raises:
        ValueError: the numbers of pictures, prompts, rewards and seeds differ, or there are none.
    """
    base, tuned = [enlarge(p) for p in to_pictures(base_images)], [enlarge(p) for p in to_pictures(tuned_images)]
    scores = {"base_rewards": base_rewards, "tuned_rewards": tuned_rewards}
    given = {"base_images": base, "tuned_images": tuned, "prompts": prompts, **scores, "seeds": seeds}
    counts = {name: len(values) for name, values in given.items() if values is not None}
    if len(set(counts.values())) != 1 or not base:
        raise ValueError(f"a grid needs equally many of each, and at least one; given were {counts}")
    unknown = [None] * len(base)
    before, after = base_rewards or unknown, tuned_rewards or unknown
    rows = [
        [_scored(picture, score) for picture, score in zip(base, before, strict=True)],
        [_scored(picture, score, beside) for picture, score, beside in zip(tuned, after, before, strict=True)],
    ]
    grid, (above, below) = _draw_table(rows, ["base", "tuned"], prompts, title, max_columns)
    cells = [
        {
            "prompt": prompts[index],
            "seed": None if seeds is None else seeds[index],
            "base_reward": before[index],
            "reward": after[index],
            "base": above[index],
            "tuned": below[index],
        }
        for index in range(len(base))
    ]
    grid.info[GRID_KEY] = json.dumps({"version": 1, "cells": cells})
    return grid


def _scored(picture: Image.Image, score: float | None, base: float | None = None) -> Cell:
    if score is None or base is None:
        return Cell(picture, "" if score is None else format_number(score))
    gain = score - base
    colour = _BETTER if gain > 0 else _WORSE if gain < 0 else _QUIET
    return Cell(picture, f"{format_number(score)} ({format_gain(gain, score)})", colour)


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
    rectangle = [left, top, width, height]
    if not all(type(number) is int for number in rectangle):
        raise ValueError(f"{rectangle} are no pixels")
    if min(left, top) < 0 or min(width, height) <= 0 or left + width > image.width or top + height > image.height:
        raise ValueError(f"{rectangle} is not inside of the picture")
    return rectangle


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
