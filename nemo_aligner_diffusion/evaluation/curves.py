"""Curves over training steps, drawn by matplotlib's object interface (no ``pyplot``, no state shared by threads)."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

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


def running_mean(values: Sequence[float], half_life: float) -> list[float]:
    """Exponential mean, unbiased at the start; NaN entries are passed over (and stay NaN)."""
    decay = 0.5 ** (1.0 / half_life)
    total = weight = 0.0
    result = []
    for value in values:
        if math.isfinite(value):
            total, weight = decay * total + value, decay * weight + 1
        result.append(total / weight if math.isfinite(value) else math.nan)
    return result


def curve_plot(
    curves: Sequence[Curve],
    *,
    title: str = "",
    y_label: str = "",
    x_label: str = "optimizer step",
    log: bool = False,
    from_zero: bool = False,
    file_format: Literal["png", "svg"] = "png",
) -> tuple[bytes, dict[str, Any]]:
    """Draw curves; return the encoded picture and where its axes lie.

    ``log`` takes effect where every finite value is positive and they span more than a factor of 20; ``from_zero``
    starts a linear axis at 0, for quantities whose proportion matters. Curves without a finite value are left out.

    Returns:
        the file, and ``left, bottom, width, height`` of the axes as fractions of the picture (origin bottom left), and
        ``x_range``, the steps that they span.

    Raises:
        ValueError: no curve has a finite value.
    """
    drawn = [curve for curve in curves if any(map(math.isfinite, curve.values))]
    if not drawn:
        raise ValueError(f"no finite value in any of the curves {[curve.label for curve in curves]}")
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    finite = [value for curve in drawn for value in curve.values if math.isfinite(value)]
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)  # inches
    figure = Figure(figsize=(6.0, 3.2), dpi=150, facecolor=PAPER, layout=layout)
    axes = figure.add_subplot(facecolor=PAPER)
    for curve in drawn:
        _draw(axes, curve)
    if log and min(finite) > 0 and max(finite) > 20 * min(finite):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
        if from_zero and min(finite) >= 0 and max(finite) > 0:
            axes.set_ylim(0, 1.06 * max(finite))
    if len({step for curve in drawn for step in curve.steps}) == 1:
        only = drawn[0].steps[0]
        axes.set_xlim(only - 1, only + 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.set_xlabel(x_label, color=QUIET, fontsize=9)
    axes.set_ylabel(y_label, color=QUIET, fontsize=9)
    axes.set_title(title, color=INK, fontsize=11, loc="left", fontweight="bold", parse_math=False)
    axes.grid(True, color=GRID_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=QUIET, labelsize=8.5, length=0, which="both")
    axes.spines[:].set_visible(False)
    if len(drawn) > 1:
        legend = axes.legend(
            frameon=False, fontsize=8.5, labelcolor=INK, ncols=len(drawn), loc="lower right", bbox_to_anchor=(1, 1)
        )
        for text in legend.get_texts():
            text.set_parse_math(False)  # a label is a name from a file, not TeX
    buffer = io.BytesIO()
    # Text stays text (searchable, small); a fixed salt makes the same data the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nemo_aligner_diffusion"}):
        nothing = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}
        figure.savefig(buffer, format=file_format, metadata=nothing[file_format])
    area = dict(zip(("left", "bottom", "width", "height"), axes.get_position().bounds, strict=True))
    return buffer.getvalue(), {**area, "x_range": axes.get_xlim()}


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
