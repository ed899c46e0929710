"""The report's pictures: cut out of the self-describing grids in ``samples/`` and set into the page as data URIs."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from nemo_aligner_diffusion.errors import first_line
from nemo_aligner_diffusion.evaluation.figures import encode_png, read_grid
from nemo_aligner_diffusion.evaluation.run_files import RunFiles, finite

_MOST_PAIRS = 48
_MOST_PROMPTS_OVER_TIME = 8
_MOST_STEPS_OVER_TIME = 6
_PAIR_SIDE = 320  # px, the longer side of a picture in the page
_STEP_SIDE = 192


@dataclass(frozen=True)
class Grid:
    """One grid of ``samples/`` and its cells (None where the PNG does not describe itself)."""

    step: int
    picture: Image.Image
    cells: list[dict[str, Any]] | None

    def cut(self, rectangle: list[int], longer_side: int) -> Markup:
        left, top, width, height = rectangle
        return data_uri(self.picture.crop((left, top, left + width, top + height)), longer_side)

    def whole(self) -> dict[str, Any]:
        return {"step": self.step, "source": data_uri(self.picture, 1600)}


def load_grid(step: int, path: Path, problems: list[str] | None = None) -> Grid | None:
    """None where the file is damaged (an interrupted copy, say), which is then one of the ``problems``."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return Grid(step, picture.convert("RGB"), read_grid(picture))
    except Exception as error:  # of a broken PNG Pillow raises what it likes; the others are to be shown
        problem = f"samples/{path.name} cannot be read ({type(error).__name__}: {first_line(error)})"
        if problems is not None and problem not in problems:
            problems.append(problem)
        return None


def data_uri(picture: Image.Image, longer_side: int) -> Markup:
    """The picture as ``data:`` URI, reduced to ``longer_side`` pixels: PNG when small, JPEG when that is lighter."""
    picture = picture.convert("RGB")
    scale = longer_side / max(picture.size)
    if scale < 1:
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    best, kind = encode_png(picture, {}), "png"
    if len(best) > 20_000:
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=90)
        if buffer.tell() < len(best) * 0.8:
            best, kind = buffer.getvalue(), "jpeg"
    return Markup(f"data:image/{kind};base64,{base64.b64encode(best).decode()}")


def before_after(run: RunFiles) -> dict[str, Any]:
    """The last grid as ``pairs``, with rewards; the grid's ``source`` as a whole where it does not describe itself."""
    loaded = (load_grid(step, path, run.problems) for step, path in reversed(run.samples))
    grid = next((grid for grid in loaded if grid), None)
    if grid is None:
        return {"step": None}
    if grid.cells is None:
        return grid.whole()
    pairs = [_pair(grid, cell) for cell in grid.cells[:_MOST_PAIRS]]
    return {"step": grid.step, "pairs": pairs, "left_out": max(0, len(grid.cells) - _MOST_PAIRS)}


def _pair(grid: Grid, cell: dict[str, Any]) -> dict[str, Any]:
    base, tuned = finite(cell.get("base_reward")), finite(cell.get("reward"))
    return {
        "prompt": cell["prompt"],
        "seed": cell.get("seed"),
        "base": grid.cut(cell["base"], _PAIR_SIDE),
        "tuned": grid.cut(cell["tuned"], _PAIR_SIDE),
        "base_reward": base,
        "reward": tuned,
        "gain": None if base is None or tuned is None else tuned - base,
    }


def over_training(run: RunFiles) -> dict[str, Any] | None:
    """How the tuned model's pictures changed: prompts down, steps across; None with fewer than two grids."""
    trained = [(step, path) for step, path in run.samples if step > 0]  # step 0 is the base model, shown anyway
    chosen = _spread(trained, _MOST_STEPS_OVER_TIME)
    grids = [grid for grid in (load_grid(step, path, run.problems) for step, path in chosen) if grid]
    if len(grids) < 2:
        return None
    places = [{(str(cell["prompt"]), str(cell.get("seed"))): cell for cell in grid.cells or []} for grid in grids]
    common = [key for key in places[-1] if all(key in place for place in places)]
    first_seeds = list({key[0]: key for key in reversed(common)}.values())[::-1]  # more prompts rather than more seeds
    keys = [*first_seeds, *(key for key in common if key not in first_seeds)][:_MOST_PROMPTS_OVER_TIME]
    if not keys:
        return {"grids": [grid.whole() for grid in _spread(grids, 3)]}
    rows = []
    for key in keys:
        first = places[0][key]
        cells = [("base", grids[0].cut(first["base"], _STEP_SIDE), finite(first.get("base_reward")))]
        for grid, place in zip(grids, places, strict=True):
            source = grid.cut(place[key]["tuned"], _STEP_SIDE)
            cells.append((f"step {grid.step}", source, finite(place[key].get("reward"))))
        rows.append((key[0], cells))
    return {"heads": [when for when, _, _ in rows[0][1]], "rows": rows}


def _spread(items: list[Any], count: int) -> list[Any]:
    """``count`` items, first and last among them, evenly spread."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
