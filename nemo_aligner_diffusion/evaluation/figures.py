"""Labelled picture grids. Curves are in :mod:`nemo_aligner_diffusion.evaluation.curves`.

Pictures come as float arrays or tensors ``(N, 3, H, W)`` in ``[0, 1]``, or as Pillow images; torch is not imported.
A grid made by :func:`sample_grid` describes itself: its ``info["grid"]`` (kept in the PNG by :func:`save_image`) says
which rectangle shows which prompt, seed and reward, so that the report can cut single pictures out of it again.

Example::

    grid = sample_grid(base, tuned, ["red apple", "animal"], base_rewards=[20.1, 19.3], tuned_rewards=[21.4, 19.9])
    save_image(grid, "samples/step_000050.png")
"""

from __future__ import annotations

import functools
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from nemo_aligner_diffusion.evaluation.run_files import parse_json
from nemo_aligner_diffusion.runtime.files import write_atomic

GRID_KEY = "grid"  # name of the PNG text chunk that describes a grid
_PAPER = (255, 255, 255)
_INK = (28, 32, 38)
_QUIET = (107, 114, 128)
_BETTER = (21, 128, 61)
_WORSE = (185, 28, 28)
_EMPTY = (238, 240, 243)
_MINUS = "\N{MINUS SIGN}"
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


@functools.lru_cache(maxsize=32)
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib ships it (so that no system font is needed), ``size`` in pixels."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def format_number(value: float) -> str:
    """Four significant digits without exponent where that is readable: ``21.43``, ``-0.0312``, ``1.2e-07``."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else f"{_MINUS}∞")
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    decimals = max(0, min(4, 3 - magnitude))
    text = f"{value:.{decimals}f}" if -4 <= magnitude <= 6 else f"{value:.1e}"
    return f"{_MINUS}{text[1:]}" if text.startswith("-") else text


def format_gain(gain: float, beside: float) -> str:
    """A signed difference with as many decimals as :func:`format_number` gives the number it stands beside."""
    written = format_number(beside)
    if not math.isfinite(gain) or "e" in written:
        return format_number(gain)
    decimals = len(written.partition(".")[2])
    return f"{gain:+.{decimals}f}".replace("-", _MINUS)


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


def wrap_text(text: str, width: int, face: ImageFont.FreeTypeFont, max_lines: int) -> list[str]:
    """Break ``text`` into at most ``max_lines`` lines of ``width`` pixels; a rest that does not fit ends in ``…``."""
    lines: list[str] = []
    line = ""
    for word in " ".join(text.split()).split(" "):
        candidate = f"{line} {word}".strip()
        if face.getlength(candidate) <= width:
            line = candidate
            continue
        if line:
            lines.append(line)
        while face.getlength(word) > width and len(word) > 1:  # one word longer than a line
            keep = next((n for n in range(len(word) - 1, 0, -1) if face.getlength(word[:n]) <= width), 1)
            lines.append(word[:keep])
            word = word[keep:]
        line = word
    lines.append(line)
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and face.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: max_lines - 1], last.rstrip() + "…"]
    return [line for line in lines if line]


def _band(
    rows: Sequence[Sequence[Cell]], row_labels: Sequence[str], column_labels: Sequence[str], label_width: int
) -> tuple[Image.Image, list[list[tuple[int, int, int, int] | None]]]:
    """Draw one block of a grid; also return each picture's rectangle ``(left, top, width, height)`` in it."""
    pictures = [cell.picture for row in rows for cell in row if cell.picture is not None]
    cell_width = max((p.width for p in pictures), default=_SMALL_SIDE)
    cell_height = max((p.height for p in pictures), default=_SMALL_SIDE)
    text_size = 13 if cell_width < 256 else 16
    face, line_height = font(text_size), round(text_size * 1.35)
    captions = [wrap_text(label, cell_width, face, max_lines=3) for label in column_labels]
    caption_height = max((len(c) for c in captions), default=0) * line_height
    note_height = line_height + 4 if any(cell.note for row in rows for cell in row) else 0
    columns = max(len(row) for row in rows)
    width = label_width + columns * (cell_width + _GAP) + _GAP
    height = _GAP + caption_height + 4 + len(rows) * (cell_height + note_height + 6) + 4
    canvas = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    lefts = [label_width + _GAP + column * (cell_width + _GAP) for column in range(columns)]
    for left, caption in zip(lefts, captions, strict=False):
        top = _GAP + caption_height - len(caption) * line_height  # captions stand on the pictures
        for offset, line in enumerate(caption):
            x = left + (cell_width - face.getlength(line)) / 2
            draw.text((x, top + offset * line_height), line, font=face, fill=_INK)
    rectangles: list[list[tuple[int, int, int, int] | None]] = []
    top = _GAP + caption_height + 4
    for row, label in zip(rows, row_labels, strict=True):
        _row_label(draw, label, label_width, top + cell_height / 2, text_size)
        rectangles.append([])
        for left, cell in zip(lefts, row, strict=False):
            if cell.picture is None:
                draw.rectangle((left, top, left + cell_width - 1, top + cell_height - 1), fill=_EMPTY)
                rectangles[-1].append(None)
            else:
                x, y = left + (cell_width - cell.picture.width) // 2, top + (cell_height - cell.picture.height) // 2
                canvas.paste(cell.picture, (x, y))
                rectangles[-1].append((x, y, cell.picture.width, cell.picture.height))
            note = wrap_text(cell.note, cell_width, face, max_lines=1)
            if note:
                x_note = left + (cell_width - face.getlength(note[0])) / 2
                draw.text((x_note, top + cell_height + 2), note[0], font=face, fill=cell.note_colour)
        top += cell_height + note_height + 6
    return canvas, rectangles


def _row_label(draw: ImageDraw.ImageDraw, label: str, width: int, middle: float, size: int) -> None:
    face, line_height = font(size, bold=True), round(size * 1.35)
    lines = wrap_text(label, max(1, width - _GAP), face, max_lines=4)
    for offset, line in enumerate(lines):
        y = middle + (offset - len(lines) / 2) * line_height
        draw.text((width - face.getlength(line), y), line, font=face, fill=_INK)


def _label_width(labels: Sequence[str]) -> int:
    longest = max((font(16, bold=True).getlength(label) for label in labels), default=0.0)
    return 0 if not any(labels) else min(170, math.ceil(longest) + _GAP)


def _stack(bands: Sequence[Image.Image], title: str) -> tuple[Image.Image, list[int]]:
    """Put bands under each other beneath the title; return the picture and each band's top."""
    width = max(band.width for band in bands)
    face = font(18, bold=True)
    title_lines = wrap_text(title, width - 2 * _GAP, face, max_lines=2) if title else []
    top = _GAP + 25 * len(title_lines) if title_lines else 0
    tops = []
    canvas = Image.new("RGB", (width, top + sum(band.height for band in bands)), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for offset, line in enumerate(title_lines):
        draw.text((_GAP, _GAP + 25 * offset), line, font=face, fill=_INK)
    for index, band in enumerate(bands):
        if index:
            draw.line((_GAP, top, width - _GAP, top), fill=(221, 225, 230))
        canvas.paste(band, (0, top))
        if index:
            draw.line((_GAP, top, width - _GAP, top), fill=(221, 225, 230))
        tops.append(top)
        top += band.height
    return canvas, tops


def _columns(count: int, cell_width: int, max_columns: int | None) -> int:
    """Columns of one band: at most ``max_columns`` (default: what fits 1,700 px), spread evenly over the bands."""
    most = max_columns or max(1, min(10, 1700 // (cell_width + _GAP)))
    bands = math.ceil(count / most)
    return math.ceil(count / bands)


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
            Cell(
                None if image is None else enlarge(to_pictures([image])[0]),
                notes[r][c] if notes else "",
            )
            for c, image in enumerate(row)
        ]
        for r, row in enumerate(images)
    ]
    cell_width = max((cell.picture.width for row in cells for cell in row if cell.picture), default=_SMALL_SIDE)
    step = _columns(width, cell_width, max_columns)
    labels = _label_width(row_labels)
    bands = [
        _band([row[start : start + step] for row in cells], row_labels, column_labels[start : start + step], labels)[0]
        for start in range(0, width, step)
    ]
    return _stack(bands, title)[0]


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
    base_scores, tuned_scores = _numbers(base_rewards), _numbers(tuned_rewards)
    counts = {
        "base_images": len(base),
        "tuned_images": len(tuned),
        "prompts": len(prompts),
        **{
            name: len(values)
            for name, values in (("base_rewards", base_scores), ("tuned_rewards", tuned_scores), ("seeds", seeds))
            if values is not None
        },
    }
    if len(set(counts.values())) != 1 or not base:
        raise ValueError(f"a grid needs equally many of each, and at least one; given were {counts}")
    rows = [
        [Cell(picture, _note(base_scores, i)) for i, picture in enumerate(base)],
        [_tuned_cell(picture, base_scores, tuned_scores, i) for i, picture in enumerate(tuned)],
    ]
    step = _columns(len(base), max(p.width for p in base + tuned), max_columns)
    labels = ["base", "tuned"]
    bands, rectangles = [], []
    for start in range(0, len(base), step):
        part = [row[start : start + step] for row in rows]
        band, places = _band(part, labels, prompts[start : start + step], _label_width(labels))
        bands.append(band)
        rectangles.append(places)
    grid, tops = _stack(bands, title)
    cells = [
        {
            "prompt": prompts[index],
            "seed": None if seeds is None else int(seeds[index]),
            "base_reward": None if base_scores is None else base_scores[index],
            "reward": None if tuned_scores is None else tuned_scores[index],
            "base": _shifted(rectangles[index // step][0][index % step], tops[index // step]),
            "tuned": _shifted(rectangles[index // step][1][index % step], tops[index // step]),
        }
        for index in range(len(base))
    ]
    grid.info[GRID_KEY] = json.dumps({"version": 1, "cells": cells})
    return grid


def _numbers(values: Any) -> list[float] | None:
    if values is None:
        return None
    return [float(value) for value in (values.tolist() if hasattr(values, "tolist") else values)]


def _note(scores: list[float] | None, index: int) -> str:
    return "" if scores is None else format_number(scores[index])


def _tuned_cell(picture: Image.Image, base: list[float] | None, tuned: list[float] | None, index: int) -> Cell:
    if base is None or tuned is None:
        return Cell(picture, _note(tuned, index))
    gain = tuned[index] - base[index]
    colour = _BETTER if gain > 0 else _WORSE if gain < 0 else _QUIET
    return Cell(picture, f"{format_number(tuned[index])} ({format_gain(gain, tuned[index])})", colour)


def _shifted(rectangle: tuple[int, int, int, int] | None, top: int) -> list[int]:
    assert rectangle is not None  # sample_grid has a picture in every place
    return [rectangle[0], rectangle[1] + top, rectangle[2], rectangle[3]]


def read_grid(image: Image.Image) -> list[dict[str, Any]] | None:
    """The cells of a grid: ``prompt, seed, base_reward, reward`` and the rectangles ``base, tuned`` as
    ``[left, top, width, height]`` in pixels; None where the picture does not describe itself (or wrongly)."""
    try:
        cells = parse_json(image.info[GRID_KEY])["cells"]
        places = [cell[row] for cell in cells for row in ("base", "tuned")]
        inside = all(_lies_in(image, *place) for place in places)
        prompts = [cell["prompt"] for cell in cells]
    except (KeyError, TypeError, ValueError, RecursionError):
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
