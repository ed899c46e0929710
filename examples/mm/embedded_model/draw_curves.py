"""Draw the loss curves of a rebuild into one figure.

Example::

    python examples/mm/embedded_model/draw_curves.py --work-dir ~/embedded_work --output docs/images/embedded_loss.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

#: Log file, title, unit of the loss, whether the axis is logarithmic.
PANELS = (
    ("clip.jsonl", "CLIP, both towers", "contrastive loss", False),
    ("clip_polish.jsonl", "CLIP, vision tower", "contrastive loss", False),
    ("vae.jsonl", "autoencoder", "reconstruction loss", True),
    ("unet.jsonl", "denoiser", "mean squared error of v", True),
)


def read_losses(path: Path) -> tuple[list[int], list[float]]:
    """Steps and losses of a log; where a resumed run repeats steps, the later record counts."""
    losses: dict[int, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "step" in row and "loss" in row:
            losses[row["step"]] = row["loss"]
    steps = sorted(losses)
    return steps, [losses[step] for step in steps]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="PNG file to write")
    arguments = parser.parse_args()
    figure, axes = plt.subplots(1, len(PANELS), figsize=(3.6 * len(PANELS), 3.0), layout="constrained")
    for axis, (name, title, unit, logarithmic) in zip(axes, PANELS, strict=True):
        steps, losses = read_losses(arguments.work_dir / name)
        axis.plot(steps, losses, linewidth=1.2)
        axis.set(title=title, xlabel="step", ylabel=unit)
        if logarithmic:
            axis.set_yscale("log")
        axis.grid(alpha=0.3, which="both")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output, dpi=110)


if __name__ == "__main__":
    main()
