"""What a reward training did, on one page: the curves of loss and accuracy, the figures, the settings."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from pathlib import Path

import jinja2

from nemo_aligner_diffusion.evaluation.curves import Curve, curve_plot
from nemo_aligner_diffusion.evaluation.run_files import read_table
from nemo_aligner_diffusion.runtime.files import write_atomic

PAGE = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string("""\
<!doctype html><html lang="en"><meta charset="utf-8"><title>Reward training</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100% } td { padding: .15rem 1rem .15rem 0 } pre { overflow: auto; font-size: 13px }
</style><h1>Reward training</h1>
<table>{% for name, value in figures.items() %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}</table>
{% for name, data in plots.items() %}<img alt="{{ name }}" src="data:image/png;base64,{{ data }}">{% endfor %}
<details><summary>Settings</summary><pre>{{ settings }}</pre></details></html>
""")


def write_reward_report(run: Path, figures: Mapping[str, object]) -> Path:
    """Write ``loss.png``, ``accuracy.png`` and ``report.html`` (self-contained) into a run directory.

    Args:
        run: holds ``metrics.csv``, ``config.yaml`` and, where there was validation, ``validation.csv``.
        figures: shown in a table, in this order.
    """
    paths = run / "metrics.csv", run / "validation.csv"
    training, validation = (read_table(path) if path.is_file() else {} for path in paths)
    plots = {}
    for name, label in (("loss", "divergence from the labels"), ("accuracy", "accuracy without ties")):
        curves = [
            Curve("training", training.get("step", []), training.get(name, []), "base", smooth=True),
            Curve("validation", validation.get("step", []), validation.get(name, []), "tuned", markers=True),
        ]
        if any(math.isfinite(value) for curve in curves for value in curve.values):
            data, _ = curve_plot(curves, title=name.capitalize(), y_label=label)
            write_atomic(run / f"{name}.png", data)
            plots[name] = base64.b64encode(data).decode()
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in figures.items()}
    settings = (run / "config.yaml").read_text(encoding="utf-8")
    return write_atomic(run / "report.html", PAGE.render(figures=shown, plots=plots, settings=settings))
