"""CLIP against compressibility: DRaFT+ on ``clip + w · compressibility`` at several ``w``; table, figure, pictures.

The real size of the pictures as JPEG files (Pillow, quality 80) is measured beside the differentiable
reward: it is what a user of compressibility wants.

    python -m benchmarks.composite_tradeoff --work results/composite --docs docs
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from torch import Tensor

from benchmarks.judge import Job, Judge, run_jobs, table
from nemo_aligner_diffusion.evaluation.figures import picture_grid, save_image, to_pictures
from nemo_aligner_diffusion.rewards import Compressibility

COLUMNS = ["w", "CLIP reward", "compressibility", "JPEG bytes a picture", "CLIP top-1", "KL", "diversity of the base's"]
QUALITY = 80  # of the files that are measured; the reward has its own, coarser default


def jpeg_bytes(images: Tensor) -> float:
    """Mean size in bytes of images ``(N, 3, H, W)`` in ``[0, 1]`` as JPEG files."""
    sizes = []
    for picture in to_pictures(images):
        with io.BytesIO() as file:
            picture.save(file, "JPEG", quality=QUALITY)
            sizes.append(file.tell())
    return sum(sizes) / len(sizes)


def overrides_of(weight: float) -> tuple[str, ...]:
    """The reward of a run: CLIP alone for ``w = 0``."""
    parts = f"{{clip: {{weight: 1.0}}, compressibility: {{weight: {weight}}}}}"
    return ("rm=composite", f"rm.parts={parts}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("results/composite"), help="run directories")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where the table and the pictures go")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.05, 0.2, 0.8])
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of 16 pictures")
    parser.add_argument("--overrides", nargs="*", default=[], help="further key=value for every run")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    arguments = parser.parse_args()
    judge = Judge()
    base = judge(None)
    compressibility = Compressibility().build()
    names = [prompt for prompt in judge.prompts for _ in range(2)]
    common = (
        f"trainer.draftp_sd.max_steps={arguments.steps}",
        "trainer.draftp_sd.val_check_interval=0",
        "trainer.draftp_sd.save_interval=0",
        "report.enable=false",
        *arguments.overrides,
    )
    jobs = [Job("draftp_sd", arguments.work / f"w_{w:g}", overrides_of(w), common) for w in arguments.weights]
    rows: list[tuple[object, ...]] = []
    points: list[tuple[str, float, float]] = []
    strips = []
    results = [base, *run_jobs(jobs, arguments.workers)]
    for label, result in zip(["base", *(f"{w:g}" for w in arguments.weights)], results, strict=True):
        clip = float(judge.clip(result.images, names).mean())
        size = jpeg_bytes(result.images)
        squares = float(compressibility(result.images, names).mean())
        ratio = result.diversity / base.diversity
        rows.append((label, clip, squares, size, result.top1, result.divergence, ratio))
        points.append((label if label == "base" else f"w = {label}", size, clip))
        strips.append(result.images)
    print(table(COLUMNS, rows), flush=True)
    (arguments.docs / "composite_table.md").write_text(table(COLUMNS, rows), encoding="utf-8")
    draw(points, arguments.docs / "images" / "composite_tradeoff.png")
    shown = range(0, min(20, len(base.images)), 2)  # the first seed of ten prompts
    rows = {point[0]: [images[i] for i in shown] for point, images in zip(points, strips, strict=True)}
    grid = picture_grid(rows, [judge.prompts[i // 2] for i in shown])
    # 256 colours: a quarter of the bytes
    save_image(grid.quantize(256), arguments.docs / "images" / "composite_pictures.png")


def draw(points: list[tuple[str, float, float]], path: Path) -> None:
    """``(label, bytes, CLIP reward)`` of each run as a picture at ``path``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    trained = points[1:]
    axes.plot(
        [size for _, size, _ in trained], [clip for *_, clip in trained], "o-", label="CLIP + w · compressibility"
    )
    axes.plot(points[0][1], points[0][2], "ks", label="base model")
    for label, size, clip in trained:
        axes.annotate(label, (size, clip), xytext=(6, 4), textcoords="offset points")
    axes.set(xlabel=f"size as a JPEG file, quality {QUALITY} (bytes, mean)", ylabel="CLIP reward (mean)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
