"""Draws docs/images/parallel_layout.png: which piece of each kind of weight a process holds under TP2 × DP2 with FSDP.

The pieces are computed by the classes that training uses (:class:`TensorCut`) and by FSDP2's rule (rows in equal
parts, after the cut), not drawn by hand.

python -m benchmarks.parallel_layout_figure --docs docs
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from nemo_aligner_diffusion.parallel.placements import TensorCut

TENSOR, DATA = 2, 2
COLORS = ("#2f6db3", "#d9822b")  # by tensor rank
INK, FAINT = "#20262d", "#8a949e"
NOTE, EDGE = "#5f6a75", "#c3cad1"
ROWS, COLUMNS = 8, 8
UNIT, SLOT = 0.14, 1.85  # of the drawing: an entry's side, a weight's place
WIDTH, HEIGHT = 6 * SLOT + 0.2, 3.5

# name, rows × columns drawn, how it is cut over the tensor group, note
WEIGHTS: tuple[tuple[str, tuple[int, int], TensorCut | None, str], ...] = (
    ("to_q, to_k,\nto_v, conv1", (ROWS, COLUMNS), TensorCut(0), "by outputs"),
    ("to_out.0,\nnet.2, conv2", (ROWS, COLUMNS), TensorCut(1), "by inputs"),
    ("ff.net.0.proj\n(value, gate)", (ROWS, COLUMNS), TensorCut(0, blocks=2), "halves alike"),
    ("LoRA A\nof to_q", (4, COLUMNS), None, "whole"),
    ("LoRA B\nof to_q", (ROWS, 4), TensorCut(0), "as to_q"),
    ("proj_in,\nconv_shortcut", (ROWS, COLUMNS), None, "whole"),
)


def held(shape: tuple[int, int], cut: TensorCut | None, tensor_rank: int, data_rank: int) -> torch.Tensor:
    """Which entries of a weight a rank keeps between steps: a mask of the whole weight."""
    numbers = torch.arange(shape[0] * shape[1]).reshape(shape)
    piece = numbers if cut is None else cut.take(numbers, tensor_rank, TENSOR)
    piece = piece.chunk(DATA, 0)[data_rank]
    return torch.isin(numbers, piece)


def draw_rank(axes: Axes, left: float, bottom: float, tensor_rank: int, data_rank: int) -> None:
    rank = data_rank * TENSOR + tensor_rank
    box = FancyBboxPatch((left, bottom), WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=0.15", fc="white", ec=EDGE)
    axes.add_patch(box)
    axes.text(left + 0.25, bottom + 3.2, f"rank {rank}", fontsize=11, weight="bold", color=INK, va="center")
    where = f"data rank {data_rank}, tensor rank {tensor_rank}"
    axes.text(left + 1.75, bottom + 3.19, where, fontsize=9, color=FAINT, va="center")
    for number, (name, shape, cut, note) in enumerate(WEIGHTS):
        centre = left + 0.1 + (number + 0.5) * SLOT
        width, height = shape[1] * UNIT, shape[0] * UNIT
        x, y = centre - width / 2, bottom + 2.15 - height / 2
        mask = held(shape, cut, tensor_rank, data_rank)
        for row in range(shape[0]):
            for column in range(shape[1]):
                color = COLORS[tensor_rank] if mask[row, column] else "#edf0f3"
                corner = (x + column * UNIT, y + height - (row + 1) * UNIT)
                axes.add_patch(Rectangle(corner, UNIT, UNIT, fc=color, ec="none"))
        axes.add_patch(Rectangle((x, y), width, height, fc="none", ec=FAINT, lw=0.8))
        if cut is not None and cut.blocks == 2:
            axes.plot([x, x + width], [y + height / 2] * 2, color=INK, lw=0.9, ls=(0, (3, 2)))
        axes.text(centre, bottom + 1.42, name, fontsize=7.5, color=INK, ha="center", va="top", linespacing=1.15)
        share = round(1 / mask.double().mean().item())
        axes.text(centre, bottom + 0.78, f"{note}\n1/{share} here", fontsize=7.2, color=NOTE, ha="center", va="top")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], style: str = "<|-|>") -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=13, color=INK, lw=1.3))


def draw(path: Path) -> None:
    figure, axes = plt.subplots(figsize=(14, 5.6))
    lefts, bottoms = (2.3, 2.3 + WIDTH + 2.2), (4.8, 0.3)
    for data_rank in range(DATA):
        middle = bottoms[data_rank] + HEIGHT / 2
        axes.text(0.8, middle, f"prompts of\ngroup {data_rank}", fontsize=9, color=INK, ha="center", va="center")
        arrow(axes, (1.7, middle), (2.25, middle), "-|>")
        for tensor_rank in range(TENSOR):
            draw_rank(axes, lefts[tensor_rank], bottoms[data_rank], tensor_rank, data_rank)
        arrow(axes, (lefts[0] + WIDTH + 0.05, middle), (lefts[1] - 0.05, middle))
        between = (lefts[0] + WIDTH + lefts[1]) / 2
        axes.text(between, middle + 0.18, "activations,\nadded up", fontsize=8, color=INK, ha="center", va="bottom")
    for left in lefts:
        arrow(axes, (left + 1.2, bottoms[0] - 0.05), (left + 1.2, bottoms[1] + HEIGHT + 0.05))
        text = "weights: gathered before use; gradients: averaged and scattered"
        axes.text(left + 1.5, (bottoms[0] + bottoms[1] + HEIGHT) / 2, text, fontsize=8, color=INK, va="center")
    title = "What a process keeps between steps: tensor_model_parallel_size=2, two data-parallel groups, fsdp=true"
    axes.text(lefts[0], 9.15, title, fontsize=12, weight="bold", color=INK, va="center")
    legend = (
        "Grey: not here. Optimizer moments and the moving average lie as the weights do. "
        "Without fsdp both data ranks of a column keep the same pieces, twice as large."
    )
    axes.text(lefts[0], 8.72, legend, fontsize=9, color=NOTE, va="center")
    axes.set_xlim(0, lefts[1] + WIDTH + 0.1)
    axes.set_ylim(0.2, 9.4)
    axes.set_aspect("equal")
    axes.axis("off")
    figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.1, facecolor="white")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    target = parser.parse_args().docs / "images" / "parallel_layout.png"
    draw(target)
    print(target)


if __name__ == "__main__":
    main()
