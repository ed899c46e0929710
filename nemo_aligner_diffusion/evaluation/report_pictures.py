"""The report's pictures: cut out of the self-describing grids in ``samples/`` and set into the page as data URIs."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from nemo_aligner_diffusion.evaluation.figures import encode_png, format_gain, format_number, read_grid
from nemo_aligner_diffusion.evaluation.run_files import RunFiles

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


def load_grid(step: int, path: Path) -> Grid | None:
    """None where the file is damaged (an interrupted copy, say)."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return Grid(step, picture, read_grid(picture))
    except (OSError, ValueError, SyntaxError):  # Pillow reports a broken PNG as SyntaxError
        return None


def data_uri(picture: Image.Image, longer_side: int) -> str:
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
    return f"data:image/{kind};base64,{base64.b64encode(best).decode()}"


def _cut(grid: Grid, rectangle: list[int], longer_side: int) -> str:
    left, top, width, height = rectangle
    return data_uri(grid.picture.crop((left, top, left + width, top + height)), longer_side)


def before_after(run: RunFiles) -> str:
    """The last grid as pairs, with rewards; the grid as a whole where it does not describe itself."""
    grid = next((g for g in (load_grid(step, path) for step, path in reversed(run.samples)) if g), None)
    if grid is None:
        return '<p class="quiet">No sample grid has been written yet (samples/ is empty).</p>'
    if grid.cells is None:
        return _whole(grid)
    pairs = "".join(_pair(grid, cell) for cell in grid.cells[:_MOST_PAIRS])
    left_out = len(grid.cells) - _MOST_PAIRS
    more = f'<p class="hint">{left_out} more in samples/step_{grid.step:06d}.png.</p>' if left_out > 0 else ""
    sort = (
        '<div class="toolbar"><label>Order <select id="pair-order"><option value="given">as given</option>'
        '<option value="best">largest gain first</option><option value="worst">smallest gain first</option>'
        "</select></label></div>"
        if any(_gain(cell) is not None for cell in grid.cells)
        else ""
    )
    return (
        f'<p class="quiet">Step {grid.step}. Left the base model, right the tuned one: same prompt, same seed. '
        f'Under each picture its reward.</p>{sort}<div class="pairs">{pairs}</div>{more}'
    )


def _gain(cell: dict[str, Any]) -> float | None:
    base, tuned = cell.get("base_reward"), cell.get("reward")
    return tuned - base if isinstance(base, (int, float)) and isinstance(tuned, (int, float)) else None


def _score(value: Any) -> str:
    return escape(format_number(float(value))) if isinstance(value, (int, float)) else ""


def _pair(grid: Grid, cell: dict[str, Any]) -> str:
    gain, prompt = _gain(cell), escape(str(cell["prompt"]))
    seed = "" if cell.get("seed") is None else f' <span class="seed">seed {escape(str(cell["seed"]))}</span>'
    tuned = _score(cell.get("reward"))
    if gain is not None:
        kind = "gain" if gain > 0 else "loss" if gain < 0 else "quiet"
        tuned += f' <span class="{kind}">{format_gain(gain, cell["reward"])}</span>'
    order = gain if gain is not None and math.isfinite(gain) else 0.0
    return (
        f'<figure class="pair" data-gain="{order!r}"><figcaption class="prompt">{prompt}{seed}</figcaption>'
        f'<div class="both"><div><img alt="base: {prompt}" src="{_cut(grid, cell["base"], _PAIR_SIDE)}">'
        f'<div class="score">{_score(cell.get("base_reward")) or "base"}</div></div>'
        f'<div><img alt="tuned: {prompt}" src="{_cut(grid, cell["tuned"], _PAIR_SIDE)}">'
        f'<div class="score">{tuned or "tuned"}</div></div></div></figure>'
    )


def _whole(grid: Grid) -> str:
    return (
        f'<figure class="whole"><figcaption>Step {grid.step}: base above tuned, same prompts and seeds.</figcaption>'
        f'<img alt="sample grid of step {grid.step}" src="{data_uri(grid.picture, 1600)}"></figure>'
    )


def over_training(run: RunFiles) -> str:
    """How the tuned model's pictures changed: prompts down, steps across; empty with fewer than two grids."""
    trained = [(step, path) for step, path in run.samples if step > 0]  # step 0 is the base model, shown anyway
    chosen = _spread(trained, _MOST_STEPS_OVER_TIME)
    grids = [grid for grid in (load_grid(step, path) for step, path in chosen) if grid]
    if len(grids) < 2:
        return ""
    if any(grid.cells is None for grid in grids):
        return "".join(_whole(grid) for grid in _spread(grids, 3))
    places = [{(cell["prompt"], cell.get("seed")): cell for cell in grid.cells or []} for grid in grids]
    common = [key for key in places[-1] if all(key in place for place in places)]
    first_seeds = list({key[0]: key for key in reversed(common)}.values())[::-1]  # more prompts rather than more seeds
    keys = [*first_seeds, *(key for key in common if key not in first_seeds)][:_MOST_PROMPTS_OVER_TIME]
    if not keys:
        return "".join(_whole(grid) for grid in _spread(grids, 3))
    head = "".join(f'<th scope="col">step {grid.step}</th>' for grid in grids)
    rows = []
    for key in keys:
        first = places[0][key]
        cells = [_step_cell(grids[0], first["base"], first.get("base_reward"), key[0], "base")]
        cells += [
            _step_cell(grid, place[key]["tuned"], place[key].get("reward"), key[0], f"step {grid.step}")
            for grid, place in zip(grids, places, strict=True)
        ]
        rows.append(f'<tr><th scope="row">{escape(str(key[0]))}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="scroll"><table class="evolution"><thead><tr><th></th><th scope="col">base</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _step_cell(grid: Grid, rectangle: list[int], reward: Any, prompt: Any, when: str) -> str:
    alt = escape(f"{when}: {prompt}")
    uri = _cut(grid, rectangle, _STEP_SIDE)
    return f'<td><img alt="{alt}" src="{uri}"><div class="score">{_score(reward)}</div></td>'


def _spread(items: list[Any], count: int) -> list[Any]:
    """``count`` items, first and last among them, evenly spread."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
