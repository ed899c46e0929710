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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from nemo_aligner_diffusion.evaluation.run_files import parse_shallow_json
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


@dataclass(frozen=True)
class Cell:
    """One picture of a grid and the line under it; ``picture=None`` leaves the place empty."""

    picture: Image.Image | None
    note: str = ""
    note_colour: tuple[int, int, int] = _INK


def to_pictures(images: Any) -> list[Image.Image]:
    """Turn ``(N, 3, H, W)`` floats in ``[0, 1]`` (tensor, array), or a sequence of pictures, into RGB Pillow images.

    A sequence may mix Pillow images and ``(3, H, W)`` arrays. Values outside ``[0, 1]`` are clamped, NaN becomes black.
    Of a video, ``(N, F, 3, H, W)``, the first, middle and last frame stand side by side.

    Raises:
        ValueError: an array is none of these.
    """
    if isinstance(images, Image.Image):
        return [images.convert("RGB")]
    if hasattr(images, "shape") and len(images.shape) == 3:
        images = [images]
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


def enlarge(picture: Image.Image, small_side: int = _SMALL_SIDE, large_side: int = _LARGE_SIDE) -> Image.Image:
    """Bring a picture to a size one can look at, keeping its proportions.

    Small ones grow by a whole factor: up to 32 px pixel by pixel (interpolation would only blur them), above that with
    Lanczos.
    """
    longer = max(picture.size)
    if longer < small_side:
        factor = math.ceil(small_side / longer)
        resampling = Image.Resampling.NEAREST if longer <= 32 else Image.Resampling.LANCZOS
        return picture.resize((picture.width * factor, picture.height * factor), resampling)
    if longer > large_side:
        scale = large_side / longer
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        return picture.resize(size, Image.Resampling.LANCZOS)
    return picture


Rectangle = list[int]  # [left, top, width, height] in pixels


def _draw_table(
    rows: Sequence[Sequence[Cell]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str,
    max_columns: int | None,
) -> tuple[Image.Image, list[list[Rectangle | None]]]:
    """The grid, and of each cell where its picture is; too many columns continue in further bands below."""
    widest = max((cell.picture.width for row in rows for cell in row if cell.picture), default=_SMALL_SIDE)
    most = max_columns or max(1, min(10, 1700 // (widest + _GAP)))
    count = len(column_labels)
    step = math.ceil(count / math.ceil(count / most))  # spread evenly over the bands
    longest = max((font(16, bold=True).getlength(label) for label in row_labels), default=0.0)
    label_width = min(170, math.ceil(longest) + _GAP) if any(row_labels) else 0
    bands = [
        _band([row[start : start + step] for row in rows], row_labels, column_labels[start : start + step], label_width)
        for start in range(0, count, step)
    ]
    width = max(band.width for band, _ in bands)
    title_lines, face = fit_text(title, width - 2 * _GAP, 18, max_lines=2, bold=True)
    top = _GAP + 25 * len(title_lines) if title_lines else 0
    canvas = Image.new("RGB", (width, top + sum(band.height for band, _ in bands)), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for offset, line in enumerate(title_lines):
        draw.text((_GAP, _GAP + 25 * offset), line, font=face, fill=_INK)
    rectangles: list[list[Rectangle | None]] = [[] for _ in rows]
    for index, (band, places) in enumerate(bands):
        canvas.paste(band, (0, top))
        if index:
            draw.line((_GAP, top, width - _GAP, top), fill=(221, 225, 230))
        for row, found in zip(rectangles, places, strict=True):
            row += [place and [place[0], place[1] + top, *place[2:]] for place in found]
        top += band.height
    return canvas, rectangles


def _band(
    rows: Sequence[Sequence[Cell]], row_labels: Sequence[str], column_labels: Sequence[str], label_width: int
) -> tuple[Image.Image, list[list[Rectangle | None]]]:
    pictures = [cell.picture for row in rows for cell in row if cell.picture is not None]
    cell_width = max((p.width for p in pictures), default=_SMALL_SIDE)
    cell_height = max((p.height for p in pictures), default=_SMALL_SIDE)
    text_size = 13 if cell_width < 256 else 16
    line_height = round(text_size * 1.35)
    captions = [fit_text(label, cell_width, text_size, max_lines=3) for label in column_labels]
    caption_height = max((len(lines) for lines, _ in captions), default=0) * line_height
    note_height = line_height + 4 if any(cell.note for row in rows for cell in row) else 0
    columns = max(len(row) for row in rows)
    width = label_width + columns * (cell_width + _GAP) + _GAP
    height = _GAP + caption_height + 4 + len(rows) * (cell_height + note_height + 6) + 4
    canvas = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    lefts = [label_width + _GAP + column * (cell_width + _GAP) for column in range(columns)]

    def centred(line: str, face: ImageFont.FreeTypeFont, left: int, top: float, colour: tuple[int, int, int]) -> None:
        draw.text((left + (cell_width - face.getlength(line)) / 2, top), line, font=face, fill=colour)

    for left, (lines, face) in zip(lefts, captions, strict=False):
        for offset, line in enumerate(lines):  # captions stand on the pictures
            centred(line, face, left, _GAP + caption_height + (offset - len(lines)) * line_height, _INK)
    rectangles: list[list[Rectangle | None]] = []
    top = _GAP + caption_height + 4
    for row, label in zip(rows, row_labels, strict=True):
        lines, face = fit_text(label, max(1, label_width - _GAP), text_size, max_lines=4, bold=True)
        for offset, line in enumerate(lines):
            y = top + cell_height / 2 + (offset - len(lines) / 2) * line_height
            draw.text((label_width - face.getlength(line), y), line, font=face, fill=_INK)
        rectangles.append([])
        for left, cell in zip(lefts, row, strict=False):
            if cell.picture is None:
                draw.rectangle((left, top, left + cell_width - 1, top + cell_height - 1), fill=_EMPTY)
                rectangles[-1].append(None)
            else:
                x, y = left + (cell_width - cell.picture.width) // 2, top + (cell_height - cell.picture.height) // 2
                canvas.paste(cell.picture, (x, y))
                rectangles[-1].append([x, y, cell.picture.width, cell.picture.height])
            lines, face = fit_text(cell.note, cell_width, text_size, max_lines=1)
            for line in lines:
                centred(line, face, left, top + cell_height + 2, cell.note_colour)
        top += cell_height + note_height + 6
    return canvas, rectangles


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
    if not images or not len(images[0]):
        raise ValueError("a grid needs at least one picture, an empty table was given")
    width = len(images[0])
    if any(len(row) != width for row in images):
        raise ValueError(f"rows of unequal length {[len(row) for row in images]}: pad them with None")
    if len(row_labels) != len(images) or len(column_labels) != width:
        raise ValueError(
            f"{len(row_labels)} row and {len(column_labels)} column labels were given "
            f"for {len(images)} rows of {width} pictures"
        )
    cells = [
        [
            Cell(None if image is None else enlarge(to_pictures([image])[0]), notes[r][c] if notes else "")
            for c, image in enumerate(row)
        ]
        for r, row in enumerate(images)
    ]
    return _draw_table(cells, row_labels, column_labels, title, max_columns)[0]


def sample_grid(
    base_images: Any,
    tuned_images: Any,
    prompts: Sequence[str],
    base_rewards: Any = None,
    tuned_rewards: Any = None,
    *,
    seeds: Sequence[int] | None = None,
    title: str = "",
    max_columns: int | None = None,
) -> Image.Image:
    """Base above tuned, same prompt and seed in a column, the prompt as caption, the reward under each picture.

    Args:
        base_images, tuned_images: ``(N, 3, H, W)`` floats in ``[0, 1]``, or N Pillow images.
        prompts: N captions, wrapped to the pictures' width.
        base_rewards, tuned_rewards: N numbers each (list, array or tensor), or None. Gains are green, losses red.
        seeds: N seeds, kept in the description of the grid.
        title: a line at the top.
        max_columns: columns before a new band starts below; by default what fits 1,700 px.

    Returns:
        RGB picture; ``info["grid"]`` describes its cells as JSON (see :func:`read_grid`).

    Raises:
        ValueError: the numbers of pictures, prompts, rewards and seeds differ, or there are none.
    """
    base, tuned = [enlarge(p) for p in to_pictures(base_images)], [enlarge(p) for p in to_pictures(tuned_images)]
    scores = {"base_rewards": _numbers(base_rewards), "tuned_rewards": _numbers(tuned_rewards)}
    given = {"base_images": base, "tuned_images": tuned, "prompts": prompts, **scores, "seeds": seeds}
    counts = {name: len(values) for name, values in given.items() if values is not None}
    if len(set(counts.values())) != 1 or not base:
        raise ValueError(f"a grid needs equally many of each, and at least one; given were {counts}")
    empty: list[float | None] = [None] * len(base)
    before, after = (values or empty for values in scores.values())
    rows = [
        [_scored(picture, score) for picture, score in zip(base, before, strict=True)],
        [_scored(picture, score, beside) for picture, score, beside in zip(tuned, after, before, strict=True)],
    ]
    grid, (above, below) = _draw_table(rows, ["base", "tuned"], prompts, title, max_columns)
    cells = [
        {
            "prompt": prompts[index],
            "seed": None if seeds is None else int(seeds[index]),
            "base_reward": before[index],
            "reward": after[index],
            "base": above[index],
            "tuned": below[index],
        }
        for index in range(len(base))
    ]
    grid.info[GRID_KEY] = json.dumps({"version": 1, "cells": cells})
    return grid


def _numbers(values: Any) -> list[float | None] | None:
    if values is None:
        return None
    return [float(value) for value in (values.tolist() if hasattr(values, "tolist") else values)]


def _scored(picture: Image.Image, score: float | None, base: float | None = None) -> Cell:
    if score is None or base is None:
        return Cell(picture, "" if score is None else format_number(score))
    gain = score - base
    colour = _BETTER if gain > 0 else _WORSE if gain < 0 else _QUIET
    return Cell(picture, f"{format_number(score)} ({format_gain(gain, score)})", colour)


def read_grid(image: Image.Image) -> list[dict[str, Any]] | None:
    """The cells of a grid: ``prompt, seed, base_reward, reward`` and the rectangles ``base, tuned`` as
    ``[left, top, width, height]`` in pixels; None where the picture does not describe itself (or wrongly)."""
    try:
        cells = parse_shallow_json(str(image.info[GRID_KEY]).encode())["cells"]
        places = [cell[row] for cell in cells for row in ("base", "tuned")]
        inside = all(_lies_in(image, *place) for place in places)
        prompts = [cell["prompt"] for cell in cells]
    except (KeyError, TypeError, ValueError):
        return None
    return cells if cells and inside and all(isinstance(prompt, str) for prompt in prompts) else None


def _lies_in(image: Image.Image, left: int, top: int, width: int, height: int) -> bool:
    if not all(type(number) is int for number in (left, top, width, height)):
        return False
    return min(left, top) >= 0 < min(width, height) and left + width <= image.width and top + height <= image.height


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
