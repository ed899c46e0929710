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
from nemo_aligner_diffusion.evaluation.figures import read_grid
from nemo_aligner_diffusion.evaluation.run_files import RunFiles

_MOST_PAIRS = 48
_MOST_PROMPTS_OVER_TIME = 8
_MOST_STEPS_OVER_TIME = 6
_PAIR_SIDE = 320  # px, the longer side of a picture in the page
_STEP_SIDE = 192


@dataclass(frozen=True)
class Grid:
    """One grid of ``samples/`` and its cells: see :func:`.read_grid`."""

    step: int
    picture: Image.Image
    cells: list[dict[str, Any]]

    def cut(self, rectangle: list[int], longer_side: int) -> Markup:
        """A picture of the grid as ``data:`` URI, reduced to ``longer_side`` pixels."""
        left, top, width, height = rectangle
        picture = self.picture.crop((left, top, left + width, top + height))
        picture.thumbnail((longer_side, longer_side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, format="WEBP", quality=90)
        return Markup(f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}")


def load_grid(step: int, path: Path, problems: list[str]) -> Grid | None:
    """None where the file is damaged (an interrupted copy, say), which is then one of the ``problems``."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return Grid(step, picture.convert("RGB"), read_grid(picture))
    except Exception as error:  # of a broken PNG Pillow raises what it likes; the others are to be shown
        problem = f"samples/{path.name} cannot be read ({type(error).__name__}: {first_line(error)})"
        if problem not in problems:
            problems.append(problem)
        return None


def before_after(run: RunFiles) -> dict[str, Any]:
    """The last grid's ``pairs`` of pictures with their rewards; an empty one where there is no grid."""
    loaded = (load_grid(step, path, run.problems) for step, path in reversed(run.samples))
    grid = next((grid for grid in loaded if grid), None)
    if grid is None:
        return {"pairs": []}
    pairs = []
    for cell in grid.cells[:_MOST_PAIRS]:
        before, after = cell["base_reward"], cell["reward"]
        gain = None if before is None or after is None else after - before
        pictures = {name: grid.cut(cell[name], _PAIR_SIDE) for name in ("base", "tuned")}
        pairs.append({**cell, **pictures, "gain": gain})
    return {"step": grid.step, "pairs": pairs, "left_out": max(0, len(grid.cells) - _MOST_PAIRS)}


def over_training(run: RunFiles) -> dict[str, Any] | None:
    """How the tuned model's pictures changed: prompts down, steps across; None with fewer than two grids."""
    trained = [(step, path) for step, path in run.samples if step > 0]  # step 0 is the base model, shown anyway
    chosen = _spread(trained, _MOST_STEPS_OVER_TIME)
    grids = [grid for grid in (load_grid(step, path, run.problems) for step, path in chosen) if grid]
    if len(grids) < 2:
        return None
    places = [{(cell["prompt"], cell["seed"]): cell for cell in grid.cells} for grid in grids]
    common = [key for key in places[-1] if all(key in place for place in places)]
    first_seeds = list({key[0]: key for key in reversed(common)}.values())[::-1]  # more prompts rather than more seeds
    keys = [*first_seeds, *(key for key in common if key not in first_seeds)][:_MOST_PROMPTS_OVER_TIME]
    rows = []
    for key in keys:
        first = places[0][key]
        cells = [("base", grids[0].cut(first["base"], _STEP_SIDE), first["base_reward"])]
        for grid, place in zip(grids, places, strict=True):
            cells.append((f"step {grid.step}", grid.cut(place[key]["tuned"], _STEP_SIDE), place[key]["reward"]))
        rows.append((key[0], cells))
    return {"heads": [when for when, _, _ in rows[0][1]], "rows": rows} if rows else None


def _spread(items: list[Any], count: int) -> list[Any]:
    """``count`` items, first and last among them, evenly spread."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
