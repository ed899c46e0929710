"""Curves over training steps, drawn by matplotlib's object interface (no ``pyplot``, no state shared by threads)."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_aligner_diffusion.runtime.files import write_atomic

# Blue/orange/… told apart by people with any common colour blindness; base is always grey.
PALETTE = {"tuned": "#2563eb", "base": "#8a93a0", "second": "#d97706", "third": "#0d9488", "fourth": "#9333ea"}
INK, QUIET, GRID_LINE, PAPER = "#1c2026", "#6b7280", "#e3e6ea", "#ffffff"


@dataclass(frozen=True)
class Curve:
    """One line of a plot: ``values`` at ``steps`` (NaN leaves a gap).

    ``smooth`` draws the data pale and a running mean over it; ``colour`` is a key of :data:`PALETTE` or any colour.
    """

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    colour: str = "tuned"
    smooth: bool = False
    markers: bool = False


@dataclass(frozen=True)
class PlotArea:
    """Where the axes lie in the picture (fractions of width and height, origin bottom left) and what they span."""

    left: float
    bottom: float
    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log: bool


def running_mean(values: Sequence[float], half_life: float) -> list[float]:
    """Exponential mean, unbiased at the start; NaN entries are passed over (and stay NaN)."""
    decay = 0.5 ** (1.0 / max(half_life, 1e-6))
    total = weight = 0.0
    result = []
    for value in values:
        if math.isfinite(value):
            total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
            result.append(total / weight)
        else:
            result.append(math.nan)
    return result


def curve_plot(
    curves: Sequence[Curve],
    *,
    title: str = "",
    y_label: str = "",
    x_label: str = "optimizer step",
    log: bool = False,
    from_zero: bool = False,
    file_format: str = "png",
    width_inches: float = 6.0,
    height_inches: float = 3.2,
) -> tuple[bytes, PlotArea]:
    """Draw curves; return the encoded picture (``file_format``: ``png`` or ``svg``) and where its axes lie.

    ``log`` takes effect where every finite value is positive and they span more than a factor of 20; ``from_zero``
    starts a linear axis at 0, for quantities whose proportion matters. Curves without a finite value are left out.

    Raises:
        ValueError: no curve has a finite value, or the format is another.
    """
    if file_format not in ("png", "svg"):
        raise ValueError(f"file_format={file_format!r} was given, expected 'png' or 'svg'")
    drawn = [curve for curve in curves if any(map(math.isfinite, curve.values))]
    if not drawn:
        raise ValueError(f"no finite value in any of the curves {[curve.label for curve in curves]}")
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    finite = [value for curve in drawn for value in curve.values if math.isfinite(value)]
    log = log and min(finite) > 0 and max(finite) > 20 * min(finite)
    figure = Figure(figsize=(width_inches, height_inches), dpi=150, facecolor=PAPER)
    axes = figure.add_axes((0.1, 0.15, 0.87, 0.7), facecolor=PAPER)
    for curve in drawn:
        _draw(axes, curve)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif from_zero and min(finite) >= 0 and max(finite) > 0:
        axes.set_ylim(0, 1.06 * max(finite))
    if len({step for curve in drawn for step in curve.steps}) == 1:
        only = drawn[0].steps[0]
        axes.set_xlim(only - 1, only + 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.set_xlabel(x_label, color=QUIET, fontsize=9)
    axes.set_ylabel(y_label, color=QUIET, fontsize=9)
    if title:
        axes.set_title(title, color=INK, fontsize=11, loc="left", fontweight="bold", parse_math=False)
    axes.grid(True, color=GRID_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=QUIET, labelsize=8.5, length=0, which="both")
    axes.ticklabel_format(axis="y", useOffset=False) if not log else None
    for spine in axes.spines.values():
        spine.set_visible(False)
    if len(drawn) > 1:
        legend = axes.legend(
            frameon=False, fontsize=8.5, labelcolor=INK, ncols=len(drawn), loc="lower right", bbox_to_anchor=(1, 1)
        )
        for text in legend.get_texts():
            text.set_parse_math(False)  # a label is a name from a file, not TeX
    _place(axes, width_inches, height_inches)
    canvas = FigureCanvasAgg(figure) if file_format == "png" else FigureCanvasSVG(figure)
    buffer = io.BytesIO()
    # Text stays text (searchable, small); a fixed salt makes the same data the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nemo_aligner_diffusion"}):
        if file_format == "svg":
            canvas.print_figure(buffer, format="svg", metadata={"Date": None, "Creator": None})
        else:
            canvas.print_figure(buffer, format="png", metadata={"Software": None})
    box = axes.get_position()
    area = PlotArea(box.x0, box.y0, box.width, box.height, axes.get_xlim(), axes.get_ylim(), log)
    return buffer.getvalue(), area


def _place(axes: Any, width: float, height: float) -> None:
    """Margins for the tick labels there are (matplotlib's constrained layout draws everything twice for that)."""
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.yaxis.get_major_locator()() if low <= tick <= high]
    longest = max((len(label) for label in axes.yaxis.get_major_formatter().format_ticks(ticks)), default=1)
    left = 0.14 + 0.077 * longest + (0.2 if axes.get_ylabel() else 0.0)  # inches; 8.5 pt digits are 0.075 wide
    bottom, top, right = 0.48, 0.36, 0.14
    axes.set_position((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height))


def _draw(axes: Any, curve: Curve) -> None:
    colour = PALETTE.get(curve.colour, curve.colour)
    finite = sum(map(math.isfinite, curve.values))
    marker = "o" if curve.markers or finite == 1 else ""
    plot = axes.plot
    if curve.smooth and finite >= 12:
        plot(curve.steps, curve.values, color=colour, linewidth=0.9, alpha=0.35)
        plot(
            curve.steps, running_mean(curve.values, max(2.0, finite / 25)), color=colour, linewidth=2, label=curve.label
        )
    else:
        plot(curve.steps, curve.values, color=colour, linewidth=2, marker=marker, markersize=4, label=curve.label)


def save_curve_plot(path: str | Path, curves: Sequence[Curve], **options: object) -> Path:
    """Draw curves into a file named ``*.png`` or ``*.svg``; options as for :func:`curve_plot`."""
    data, _ = curve_plot(curves, file_format=Path(path).suffix.lstrip(".").lower(), **options)  # type: ignore[arg-type]
    return write_atomic(path, data)
