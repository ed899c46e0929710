"""Grids and curves: what is where, and that it can be read back."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nemo_aligner_diffusion.errors import OutputError
from nemo_aligner_diffusion.evaluation.curves import Curve, curve_plot, running_mean
from nemo_aligner_diffusion.evaluation.figures import (
    enlarge,
    picture_grid,
    read_grid,
    save_image,
    to_pictures,
)
from nemo_aligner_diffusion.evaluation.text import fit_text, font, format_gain, format_number, wrap_text


def flat(colour: tuple[float, float, float], height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.tensor(colour)[:, None, None].expand(3, height, width)


COLOURS = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 0.0), (0.0, 1.0, 1.0), (1.0, 0.0, 1.0)]


def centre(image: Image.Image, rectangle: list[int]) -> tuple[int, int, int]:
    left, top, width, height = rectangle
    return image.getpixel((left + width // 2, top + height // 2))  # type: ignore[return-value]


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 48), (48, 16), (700, 300)])
def test_every_cell_of_a_grid_shows_its_picture(tmp_path: Path, height: int, width: int) -> None:
    base = torch.stack([flat(c, height, width) for c in COLOURS])
    tuned = base.flip(0)
    prompts = [f"prompt {i} " * 9 for i in range(6)]
    rewards = {"base": range(6), "tuned": [0.5 + i for i in range(6)]}
    grid = picture_grid({"base": base, "tuned": tuned}, prompts, rewards=rewards, seeds=range(6), max_columns=4)
    path = save_image(grid, tmp_path / "samples" / "step_000001.png")
    cells = read_grid(Image.open(path))
    read_back = Image.open(path).convert("RGB")
    for index, cell in enumerate(cells):
        assert centre(read_back, cell["base"]) == tuple(int(255 * v) for v in COLOURS[index])
        assert centre(read_back, cell["tuned"]) == tuple(int(255 * v) for v in COLOURS[5 - index])
        assert cell["tuned"][1] > cell["base"][1]  # base above tuned
        assert cell["base"][2] / cell["base"][3] == pytest.approx(width / height, rel=0.01)
        assert max(cell["base"][2:]) >= 128
        assert (cell["prompt"], cell["seed"]) == (prompts[index], index)
        assert (cell["base_reward"], cell["reward"]) == (index, index + 0.5)
    rows = {cell["base"][1] for cell in cells}
    assert len(rows) == 2  # six columns, at most four a band: two bands
    assert [sum(cell["base"][1] == top for cell in cells) for top in sorted(rows)] == [3, 3]


def test_a_gain_is_green_and_a_loss_is_red() -> None:
    white = torch.ones(2, 3, 64, 64)
    grid = np.asarray(
        picture_grid({"base": white, "tuned": white}, ["a", "b"], rewards={"base": [1.0, 1.0], "tuned": [2.0, 0.5]})
    )
    left, right = grid[:, : grid.shape[1] // 2].astype(int), grid[:, grid.shape[1] // 2 :].astype(int)

    def has(part: np.ndarray, colour: tuple[int, int, int]) -> bool:
        return bool((abs(part - np.array(colour)).sum(-1) < 30).any())

    assert has(left, (21, 128, 61))
    assert not has(left, (185, 28, 28))
    assert has(right, (185, 28, 28))
    assert not has(right, (21, 128, 61))


def test_a_grid_of_unequal_numbers_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match="'tuned': 1"):
        picture_grid({"base": torch.rand(2, 3, 8, 8), "tuned": torch.rand(1, 3, 8, 8)}, ["a", "b"])
    with pytest.raises(ValueError, match="at least one"):
        picture_grid({"base": torch.rand(0, 3, 8, 8)}, [])


def test_a_grid_takes_any_rows_and_unequal_sizes() -> None:
    rows = {
        "scale 0.5": [flat(COLOURS[0], 32, 32), flat(COLOURS[1], 64, 32)],
        "scale 1": [flat(COLOURS[1], 32, 32), Image.new("RGB", (20, 40), "blue")],
    }
    grid = picture_grid(rows, ["red apple", "tree"], rewards={"scale 0.5": [1.0, 2.0]})
    found = {tuple(pixel) for pixel in np.asarray(grid).reshape(-1, 3).tolist()}
    assert {(255, 0, 0), (0, 255, 0), (0, 0, 255)} <= found


def test_pictures_keep_their_values_and_survive_nan() -> None:
    values = torch.tensor([0.0, 1 / 255, 0.5, 254 / 255, 1.0, 2.0, -1.0, math.nan])
    picture = to_pictures(values.expand(3, 2, 8)[None])[0]
    assert np.asarray(picture)[0, :, 0].tolist() == [0, 1, 128, 254, 255, 255, 0, 0]
    with pytest.raises(ValueError, match=r"\(1, 8, 8\)"):
        to_pictures(torch.rand(1, 1, 8, 8))


def test_small_pictures_grow_by_whole_factors() -> None:
    checks = Image.fromarray((np.indices((16, 16)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    grown = enlarge(checks)
    factor = grown.width // 16
    assert grown.size == (16 * factor, 16 * factor)
    assert grown.resize((16, 16), Image.Resampling.NEAREST).tobytes() == checks.tobytes()
    assert set(np.asarray(grown).reshape(-1).tolist()) == {0, 255}  # no blur at this size
    assert enlarge(Image.new("RGB", (64, 64))).size == (192, 192)
    assert enlarge(Image.new("RGB", (300, 200))).size == (300, 200)
    assert enlarge(Image.new("RGB", (1024, 512))).size == (512, 256)


def test_text_is_wrapped_to_the_width() -> None:
    face = font(13)
    text = "a smiling face with heart-shaped eyes " * 4 + "Donaudampfschifffahrtselektrizitätenhauptbetriebswerk"
    lines = wrap_text(text, 120, face, max_lines=40)
    assert all(face.getlength(line) <= 120 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    cut = wrap_text(text, 120, face, max_lines=2)
    assert len(cut) == 2
    assert cut[-1].endswith("…")
    assert wrap_text("", 120, face, 3) == []


def test_characters_without_a_font_are_escapes_and_named(caplog: pytest.LogCaptureFixture) -> None:
    """U+2FFFF is no character, so that no machine's font has it."""
    lines, face = fit_text("a cat \U0002ffff \x1b[2J", 300, 13, max_lines=1)
    assert lines == "a cat \\U0002ffff \\x1b[2J"
    assert face.path == font(13).path
    assert "no font here has" in caplog.text
    assert "\\U0002ffff" in caplog.text
    assert "\x1b" not in caplog.text


def test_a_prompt_of_any_length_makes_its_grid_at_once() -> None:
    started = time.monotonic()
    lines, _ = fit_text("猫" * 1_000_000, 160, 13, max_lines=3)
    assert len(lines.splitlines()) == 3
    assert time.monotonic() - started < 20


def test_another_script_is_drawn_with_the_systems_font_for_it(tmp_path: Path) -> None:
    """A font of one character, a square, where the system looks for a user's: a grid shows it."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    for point, draw in zip([(0, 0), (0, 1000), (1000, 1000), (1000, 0)], [pen.moveTo, *[pen.lineTo] * 3], strict=True):
        draw(point)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "cat"])
    builder.setupCharacterMap({ord("猫"): "cat"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "cat": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "cat": (1000, 0)})
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": "Cat", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    (tmp_path / "fonts").mkdir()
    builder.save(tmp_path / "fonts" / "cat.ttf")
    code = (
        "from nemo_aligner_diffusion.evaluation.text import fit_text\n"
        "lines, face = fit_text('猫猫猫', 200, 13, 1)\n"
        "assert (lines, face.path[-7:], face.getlength('猫')) == ('猫猫猫', 'cat.ttf', 13), (lines, face.path)"
    )
    environment = {**os.environ, "XDG_DATA_HOME": str(tmp_path), "PYTHONUTF8": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_numbers_are_short_and_signed() -> None:
    assert [format_number(v) for v in (21.4321, 0, -0.03125, 1.2e-7, 123456.7, math.nan)] == [
        "21.43",
        "0",
        "\N{MINUS SIGN}0.0312",
        "1.2e-07",
        "123457",
        "NaN",
    ]
    assert format_gain(0.5, 21.43) == "+0.50"
    assert format_gain(-0.5, 21.43) == "\N{MINUS SIGN}0.50"


def test_saving_leaves_nothing_half_written(tmp_path: Path) -> None:
    target = tmp_path / "grid.png"
    save_image(Image.new("RGB", (4, 4), "red"), target, {"prompt": "röd äpple 🍎"})
    assert Image.open(target).info["prompt"] == "röd äpple 🍎"
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write"):
        save_image(Image.new("RGB", (4, 4)), tmp_path / "file" / "grid.png")


def test_a_foreign_or_damaged_description_is_not_believed() -> None:
    image = Image.new("RGB", (100, 100))
    beyond = '{"cells": [{"prompt": "a", "seed": 0, "base": [0, 0, 90, 90], "tuned": [50, 50, 90, 90]}]}'
    for description in (beyond, "{", "[" * 5000, "[]", None):
        if description is not None:
            image.info["grid"] = description
        with pytest.raises(ValueError, match="does not say what it shows"):
            read_grid(image)


def test_the_axes_lie_where_curve_plot_says() -> None:
    """Draw a wide rectangle of a line and look for its pixels at the place computed from the returned area."""
    data, area = curve_plot([Curve("reward", [0, 10], [5.0, 5.0], "#ff0000")], from_zero=True)
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    y = (1 - (area["bottom"] + area["height"] / 1.06)) * picture.height
    low, high = area["x_range"]
    x = (area["left"] + area["width"] * (5.0 - low) / (high - low)) * picture.width
    red, green, blue = picture.getpixel((round(x), round(y)))  # type: ignore[misc]
    assert red > 200
    assert green < 120
    assert blue < 120


def test_curves_take_gaps_and_refuse_nothing_at_all() -> None:
    curves = [Curve("$a_b$ <tuned>", [1, 2, 3], [1e-6, math.nan, 1e-2]), Curve("empty", [1, 2, 3], [math.nan] * 3)]
    data, _ = curve_plot(curves, log=True, file_format="svg")
    assert ElementTree.fromstring(data).tag.endswith("svg")
    with pytest.raises(ValueError, match="no finite value"):
        curve_plot([Curve("empty", [1], [math.nan])])


def test_the_running_mean_is_unbiased_and_passes_over_gaps() -> None:
    assert running_mean([3.0, 3.0, 3.0], 2.0) == pytest.approx([3.0, 3.0, 3.0])
    smoothed = running_mean([1.0, math.nan, 0.0], 1.0)
    assert math.isnan(smoothed[1])
    assert smoothed[2] == pytest.approx(1 / 3)  # weights ½ for the old, 1 for the new: 0.5·1/(0.5+1)


def test_a_video_is_shown_by_three_frames() -> None:
    videos = torch.arange(5).div(4).view(1, 5, 1, 1, 1).expand(2, 5, 3, 4, 6)
    shown = to_pictures(videos)
    assert [picture.size for picture in shown] == [(18, 4)] * 2
    assert [shown[0].getpixel((x, 0))[0] for x in (0, 6, 12)] == [0, 128, 255]
    assert to_pictures(videos[:, :1])[0].size == (6, 4)
