"""DRTune against DRaFT-1 on mirror symmetry: reward and recognisability at the same number of generated pictures.

Three learning rates for each method, with and without the KL term; a table, and pictures of the best of each.

    python -m benchmarks.symmetry_drtune_vs_draft1 --work results/symmetry --docs docs
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.judge import Job, Judge, Judgement, run_jobs, table
from nemo_aligner_diffusion.evaluation.figures import labelled_grid, save_image, to_pictures

METHODS = {
    "DRaFT-1": ("draft_k_sd", "trainer.draft_k_sd", ["model.truncation_steps=1"]),
    "DRTune K=4": ("drtune_sd", "trainer.drtune_sd", ["model.drtune.train_steps=4", "model.drtune.early_stop_steps=8"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("results/symmetry"), help="run directories")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where the table and the picture go")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of 8 pictures")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--kl", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    arguments = parser.parse_args()
    judge = Judge(["rm=symmetry"])
    base = judge(None)
    settings, jobs = [], []
    for method, (recipe, loop, own) in METHODS.items():
        for kl in arguments.kl:
            for rate in arguments.learning_rates:
                settings.append((method, kl, rate))
                name = f"{method}_kl{kl:g}_lr{rate:g}".replace(" ", "_")
                overrides = (
                    *own,
                    f"model.kl_coeff={kl}",
                    f"model.optim.lr={rate}",
                    f"{loop}.max_steps={arguments.steps}",
                    f"{loop}.val_check_interval=0",
                    f"{loop}.save_interval=0",
                    "report.enable=false",
                    "model.global_batch_size=8",
                )
                jobs.append(Job(recipe, arguments.work / name, ("rm=symmetry",), overrides))
    columns = ["method", "kl_coeff", "lr", "symmetry", "KL", "CLIP top-1", "CLIP MRR"]
    rows: list[tuple[object, ...]] = [("base", "–", "–", base.reward, 0.0, base.top1, base.mean_reciprocal_rank)]
    best: dict[str, tuple[float, str, Judgement]] = {}
    for (method, kl, rate), result in zip(settings, run_jobs(jobs, arguments.workers), strict=True):
        rows.append((method, kl, rate, result.reward, result.divergence, result.top1, result.mean_reciprocal_rank))
        key = f"{method}, KL {kl:g}"
        if key not in best or result.reward > best[key][0]:
            best[key] = (result.reward, f"{key}, lr {rate:g}", result)
        print(table(columns, rows), flush=True)
    (arguments.docs / "symmetry_table.md").write_text(table(columns, rows), encoding="utf-8")
    shown = range(0, min(20, len(base.images)), 2)  # the first seed of ten prompts
    grid = labelled_grid(
        [[to_pictures(images[i : i + 1])[0] for i in shown] for images in
         (base.images, *(result.images for _, _, result in best.values()))],
        ["base", *(label for _, label, _ in best.values())],
        [judge.prompts[i // 2] for i in shown],
    )  # fmt: skip
    save_image(grid, arguments.docs / "images" / "symmetry_drtune_vs_draft1.png")


if __name__ == "__main__":
    main()
