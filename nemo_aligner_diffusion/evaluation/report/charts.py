"""The report's curves: matplotlib SVG set into the page and coloured by its style sheet, so that dark mode works."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace

from markupsafe import Markup, escape

from nemo_aligner_diffusion.errors import printable
from nemo_aligner_diffusion.evaluation.curves import GRID_LINE, INK, PALETTE, PAPER, QUIET, Curve, curve_plot
from nemo_aligner_diffusion.evaluation.metrics.base import Chart, TrainingMetric
from nemo_aligner_diffusion.evaluation.metrics.registry import metrics
from nemo_aligner_diffusion.evaluation.run_files import RunFiles, Table

_MOST_POINTS = 1200  # a curve; more cannot be seen at this width and only make the page heavy
_MOST_OTHERS = 24  # charts of columns that are no metric's
_THEME = {**{colour: f"var(--{name})" for name, colour in PALETTE.items()}, INK: "var(--ink)", QUIET: "var(--quiet)"}


@dataclass(frozen=True)
class Drawn:
    """One figure of the page; ``readings`` (JSON) is what the script shows under the pointer."""

    svg: Markup
    readings: Markup
    caption: str


def charts(run: RunFiles) -> dict[str, list[Drawn]]:
    """``main``: those of the metrics; ``more``: for a second look (speed, memory, columns that are no metric's)."""
    wanted = [chart for metric in metrics() for chart in metric.charts(run)]
    wanted += [*_others(run, "metrics"), *_others(run, "validation")][:_MOST_OTHERS]
    drawn = [(chart.main, _draw(chart)) for chart in wanted]
    return {
        "main": [figure for main, figure in drawn if main and figure],
        "more": [figure for main, figure in drawn if not main and figure],
    }


def _others(run: RunFiles, name: str) -> list[Chart]:
    table: Table = getattr(run, name)
    own = [metric for metric in metrics() if isinstance(metric, TrainingMetric) == (name == "metrics")]
    shown = {"step", *(column for metric in own for column in metric.columns(table))}
    steps = table.get("step", [])
    columns = {printable(column, 60): values for column, values in table.items() if column not in shown}
    return [
        Chart(title, [Curve(title, steps, values, smooth=True)], main=False)
        for title, values in columns.items()
        if len(set(values)) > 1  # constants tell nothing
    ]


def _draw(chart: Chart) -> Drawn | None:
    curves = [_thinned(curve) for curve in chart.curves if len(curve.values) and len(curve.values) == len(curve.steps)]
    if not any(math.isfinite(value) and value != 0 for curve in curves for value in curve.values):
        return None  # nothing measured (a KL penalty that is switched off is 0 throughout)
    data, area = curve_plot(curves, title=chart.title, log=chart.log, from_zero=chart.from_zero, file_format="svg")
    readings = {
        "area": {"left": area.left, "bottom": area.bottom, "width": area.width, "height": area.height}
        | {"x_range": area.x_range},
        "series": [
            {"label": curve.label, "x": list(curve.steps), "y": [_rounded(value) for value in curve.values]}
            for curve in curves
        ],
    }
    # matplotlib has escaped the words of the picture
    svg = Markup(_themed(data.decode(), chart.title))
    return Drawn(svg, escape(json.dumps(readings, separators=(",", ":"), allow_nan=False)), chart.caption)


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _thinned(curve: Curve) -> Curve:
    stride = math.ceil(len(curve.values) / _MOST_POINTS)
    return replace(curve, steps=list(curve.steps)[::stride], values=list(curve.values)[::stride])


def _themed(svg: str, title: str) -> str:
    """Strip what belongs to a file of its own, make ids unique in the page, and let the style sheet choose colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*;", "", svg)
    prefix = re.sub(r"\W+", "-", title).lower()
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg).replace('xlink:href="#', f'xlink:href="#{prefix}-')
    for colour, variable in {**_THEME, PAPER: "none", GRID_LINE: "var(--line)"}.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
