"""What a reward training did, on one page: the curves of loss and accuracy, the figures, the settings."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping
from pathlib import Path

from nemo_aligner_diffusion.evaluation.curves import Curve, curve_plot
from nemo_aligner_diffusion.evaluation.run_files import read_table
from nemo_aligner_diffusion.runtime.files import write_atomic

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;color:#1c2026;max-width:46rem;margin:2rem auto;padding:0 1rem}"
    "img{max-width:100%}table{border-collapse:collapse}td{padding:.15rem 1rem .15rem 0}"
    "pre{background:#f5f6f8;padding:.8rem;overflow:auto;font-size:13px}"
)


def write_reward_report(run: Path, figures: Mapping[str, object]) -> Path:
    """Write ``loss.png``, ``accuracy.png`` and ``report.html`` (self-contained) into a run directory.

    Args:
        run: holds ``metrics.csv``, ``config.yaml`` and, where there was validation, ``validation.csv``.
        figures: shown in a table, in this order.
    """
    paths = run / "metrics.csv", run / "validation.csv"
    training, validation = (read_table(path) if path.is_file() else {} for path in paths)
    pictures = []
    for name, label in (("loss", "divergence from the labels"), ("accuracy", "accuracy without ties")):
        curves = [
            Curve(title, table["step"], table[name], colour, smooth=smooth, markers=not smooth)
            for title, table, colour, smooth in (
                ("training", training, "base", True),
                ("validation", validation, "tuned", False),
            )
            if any(math.isfinite(value) for value in table.get(name, ()))
        ]
        if curves:
            data, _ = curve_plot(curves, title=name.capitalize(), y_label=label)
            write_atomic(run / f"{name}.png", data)
            pictures.append(f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(data).decode()}">')
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(_shown(value))}</td></tr>" for name, value in figures.items()
    )
    settings = html.escape((run / "config.yaml").read_text(encoding="utf-8"))
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Reward training</title><style>{_STYLE}</style>'
        f"<h1>Reward training</h1><table>{rows}</table>{''.join(pictures)}"
        f"<details><summary>Settings</summary><pre>{settings}</pre></details></html>\n"
    )
    return write_atomic(run / "report.html", page)


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
