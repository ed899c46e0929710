"""The report's curves: matplotlib SVG set into the page and coloured by its style sheet, so that dark mode works."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

from markupsafe import Markup, escape

from nemo_aligner_diffusion.evaluation.curves import GRID_LINE, INK, PALETTE, PAPER, QUIET, Curve, curve_plot
from nemo_aligner_diffusion.evaluation.metrics.base import Chart, metrics
from nemo_aligner_diffusion.evaluation.run_files import RunFiles

_MOST_POINTS = 1200  # a curve; more cannot be seen at this width and only make the page heavy
_THEME = {**{colour: f"var(--{name})" for name, colour in PALETTE.items()}, INK: "var(--ink)", QUIET: "var(--quiet)"}


def charts(run: RunFiles) -> dict[str, list[dict[str, Any]]]:
    """``main``: those of the metrics; ``more``: for a second look (speed, memory).

    Each is its ``svg``, its ``caption``, and ``readings`` (JSON), which the script shows under the pointer.
    """
    drawn = [(chart.main, _draw(chart)) for metric in metrics() for chart in metric.charts(run)]
    return {
        "main": [figure for main, figure in drawn if main and figure],
        "more": [figure for main, figure in drawn if not main and figure],
    }


def _draw(chart: Chart) -> dict[str, Any] | None:
    curves = [_thinned(curve) for curve in chart.curves if len(curve.values) and len(curve.values) == len(curve.steps)]
    if not any(math.isfinite(value) and value != 0 for curve in curves for value in curve.values):
        return None  # nothing measured (a KL penalty that is switched off is 0 throughout)
    kind: dict[str, Any] = {
        "title": chart.title,
        "x_label": chart.x_label,
        "log": chart.log,
        "from_zero": chart.from_zero,
    }
    data, area = curve_plot(curves, **kind, file_format="svg")
    series = [
        {"label": curve.label, "x": curve.steps, "y": [_rounded(value) for value in curve.values]} for curve in curves
    ]
    readings = escape(json.dumps({"area": area, "series": series}, separators=(",", ":"), allow_nan=False))
    svg = Markup(_themed(data.decode(), chart.title))  # matplotlib has escaped the words of the picture
    return {"svg": svg, "readings": readings, "caption": chart.caption}


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
