"""The report's curves: matplotlib SVG set into the page and coloured by its style sheet, so that dark mode works."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace

from nemo_aligner_diffusion.evaluation.curves import GRID_LINE, INK, PALETTE, PAPER, QUIET, Curve, curve_plot
from nemo_aligner_diffusion.evaluation.run_files import RunFiles, Table, column

_MOST_POINTS = 1200  # a curve; more cannot be seen at this width and only make the page heavy
_THEME = {**{colour: f"var(--{name})" for name, colour in PALETTE.items()}, INK: "var(--ink)", QUIET: "var(--quiet)"}
_SHOWN = {"step", "reward", "kl_penalty", "loss", "grad_norm", "lr", "images_per_second", "peak_memory_bytes"}
_COLOURS = ("tuned", "second", "third", "fourth", "base")


def charts(run: RunFiles) -> tuple[list[str], list[str]]:
    """HTML of the main charts, and of those for a second look (speed, memory, every further column)."""
    metrics, validation = run.metrics, run.validation
    tuned, base = column(validation, "reward"), column(validation, "base_reward")
    sparse = len(tuned) <= 40
    main = [
        _chart(
            "Validation reward",
            [
                Curve("tuned", _steps(validation), tuned, "tuned", markers=sparse),
                Curve("base", _steps(validation), base, "base", markers=sparse),
            ],
            "Fixed prompts and seeds: the same noise for both models.",
        ),
        _chart(
            "Training reward",
            [Curve("mean of the step's pictures", _steps(metrics), column(metrics, "reward"), "tuned", smooth=True)],
            "Pale: each step. Strong: running mean.",
        ),
        _chart(
            "KL penalty",
            [Curve("KL", _steps(metrics), column(metrics, "kl_penalty"), "second", smooth=True)],
            "Squared distance of the tuned model's predictions from the base model's, before its coefficient "
            f"({html.escape(str(run.setting('model.kl_coeff', 'not recorded')))}).",
            from_zero=True,
        ),
        _chart(
            "Gradient norm",
            [Curve("norm", _steps(metrics), column(metrics, "grad_norm"), "third", smooth=True)],
            "Before clipping.",
            log=True,
            from_zero=True,
        ),
        _chart(
            "Learning rate",
            [Curve("rate", _steps(metrics), column(metrics, "lr"), "fourth")],
            f"Optimizer: {html.escape(str(run.setting('model.optim.name', 'not recorded')))}.",
            from_zero=True,
        ),
        _diversity(validation),
        _parts(metrics),
    ]
    more = [
        _chart("Loss", [Curve("loss", _steps(metrics), column(metrics, "loss"), "tuned", smooth=True)], ""),
        _chart(
            "Pictures per second",
            [Curve("pictures/s", _steps(metrics), column(metrics, "images_per_second"), "third", smooth=True)],
            "",
            from_zero=True,
        ),
        _chart(
            "Peak memory, GiB",
            [
                Curve(
                    "GiB",
                    _steps(metrics),
                    [value / 2**30 for value in column(metrics, "peak_memory_bytes")],
                    "second",
                )
            ],
            "",
            from_zero=True,
        ),
        *[
            _chart(name, [Curve(name, _steps(metrics), column(metrics, name), "tuned", smooth=True)], "")
            for name, values in metrics.items()
            if name not in _SHOWN and not _is_part(name) and len(set(values)) > 1  # constants tell nothing
        ],
    ]
    return [chart for chart in main if chart], [chart for chart in more if chart]


def _steps(table: Table) -> list[float]:
    return table.get("step", [])


def _is_part(name: str) -> bool:
    return bool(re.match(r"reward[/_.]", name))


def _parts(metrics: Table) -> str:
    names = [name for name in metrics if _is_part(name)]
    if not names:
        return ""
    curves = [
        Curve(name[len("reward") + 1 :], _steps(metrics), metrics[name], colour, smooth=True)
        for name, colour in zip(names, _COLOURS, strict=False)
    ]
    return _chart("Parts of the reward", curves, "Before their weights.")


def _diversity(validation: Table) -> str:
    curves = [
        Curve("tuned", _steps(validation), column(validation, "diversity"), "tuned", markers=True),
        Curve("base", _steps(validation), column(validation, "base_diversity"), "base", markers=True),
    ]
    caption = "Mean distance between pictures of one prompt with different seeds, in CLIP's image space."
    if not curves[0].values:
        curves = [Curve("ratio", _steps(validation), column(validation, "diversity_ratio"), "tuned", markers=True)]
        caption += " Tuned divided by base."
    return _chart("Diversity", curves, caption, from_zero=True)


def _chart(title: str, curves: Sequence[Curve], caption: str, log: bool = False, from_zero: bool = False) -> str:
    curves = [_thinned(curve) for curve in curves if len(curve.values) and len(curve.values) == len(curve.steps)]
    if not any(math.isfinite(value) and value != 0 for curve in curves for value in curve.values):
        return ""  # nothing measured (a KL penalty that is switched off is 0 throughout)
    data, area = curve_plot(curves, title=title, log=log, from_zero=from_zero, file_format="svg")
    readings = {
        "area": {"left": area.left, "bottom": area.bottom, "width": area.width, "height": area.height}
        | {"x_range": area.x_range},
        "series": [
            {"label": curve.label, "x": list(curve.steps), "y": [_rounded(value) for value in curve.values]}
            for curve in curves
        ],
    }
    note = f"<figcaption>{caption}</figcaption>" if caption else ""
    payload = html.escape(json.dumps(readings, separators=(",", ":"), allow_nan=False))
    return f'<figure class="chart" data-curves="{payload}">{_themed(data.decode(), title)}{note}</figure>'


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
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)
