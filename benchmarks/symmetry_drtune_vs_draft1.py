"""DRTune against DRaFT-1 on mirror symmetry: reward and recognisability at the same number of generated pictures.

Three learning rates for each method, then the best of them with the KL term; a table, and pictures of the best.

    python -m benchmarks.symmetry_drtune_vs_draft1 --work results/symmetry --docs docs
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from benchmarks.judge import Job, Judge, Judgement, run_jobs, table
from nemo_aligner_diffusion.evaluation.figures import picture_grid, save_image

METHODS = {
    "DRaFT-1": ("draft_k_sd", "trainer.draft_k_sd", ["model.truncation_steps=1"]),
    "DRTune K=4": ("drtune_sd", "trainer.drtune_sd", ["model.drtune.train_steps=4", "model.drtune.early_stop_steps=8"]),
}


@dataclass(frozen=True)
class Setting:
    method: str
    kl: float
    rate: float

    @property
    def label(self) -> str:
        return f"{self.method}, KL {self.kl:g}, lr {self.rate:g}"

    def job(self, work: Path, steps: int) -> Job:
        recipe, loop, own = METHODS[self.method]
        overrides = (
            *own,
            f"model.kl_coeff={self.kl}",
            f"model.optim.lr={self.rate}",
            f"{loop}.max_steps={steps}",
            f"{loop}.val_check_interval=0",
            f"{loop}.save_interval=0",
            "report.enable=false",
            "model.global_batch_size=8",
        )
        name = f"{self.method}_kl{self.kl:g}_lr{self.rate:g}".replace(" ", "_")
        return Job(recipe, work / name, ("rm=symmetry",), overrides)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("results/symmetry"), help="run directories")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where the table and the picture go")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of 8 pictures")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--kl", type=float, nargs="*", default=[0.1], help="kl_coeff tried at the best rate of KL 0")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    arguments = parser.parse_args()
    judge = Judge(["rm=symmetry"])
    base = judge(None)
    columns = ["method", "kl_coeff", "lr", "symmetry", "KL", "CLIP top-1", "CLIP MRR"]
    rows: list[tuple[object, ...]] = [("base", "–", "–", base.reward, 0.0, base.top1, base.mean_reciprocal_rank)]
    done: dict[Setting, Judgement] = {}

    def run(settings: list[Setting]) -> None:
        jobs = [setting.job(arguments.work, arguments.steps) for setting in settings]
        for setting, result in zip(settings, run_jobs(jobs, arguments.workers), strict=True):
            done[setting] = result
            figures = (result.reward, result.divergence, result.top1, result.mean_reciprocal_rank)
            rows.append((setting.method, setting.kl, setting.rate, *figures))
            print(table(columns, rows), flush=True)

    run([Setting(method, 0.0, rate) for method in METHODS for rate in arguments.learning_rates])
    best = [max((s for s in done if s.method == method), key=lambda s: done[s].reward) for method in METHODS]
    run([Setting(setting.method, kl, setting.rate) for setting in best for kl in arguments.kl])
    (arguments.docs / "symmetry_table.md").write_text(table(columns, rows), encoding="utf-8")
    drawn = [*best, *(setting for setting in done if setting.kl)]
    shown = range(0, min(20, len(base.images)), 2)  # the first seed of ten prompts
    strips = {"base": base.images, **{setting.label: done[setting].images for setting in drawn}}
    rows = {label: [images[i] for i in shown] for label, images in strips.items()}
    grid = picture_grid(rows, [judge.prompts[i // 2] for i in shown])
    # 256 colours: a quarter of the bytes
    save_image(grid.quantize(256), arguments.docs / "images" / "symmetry_drtune_vs_draft1.png")


if __name__ == "__main__":
    main()
