"""DDPO against DRaFT-1 and DRaFT+: validation reward against generated pictures and against wall time.

On the CLIP reward, and on the size of a JPEG file, which DDPO learns from itself and the others by ``compressibility``,
its differentiable stand-in; all are judged by the file. Eight prompts, as DDPO was published on few (with more, every
prompt's mean reward is unknown for long, and nothing is learnt in an hour); five steps without guidance, for time.
Everything else is as shipped for the embedded model.

    python -m benchmarks.ddpo_vs_draft --work results/ddpo --docs docs --seeds 1 2 3

A finished run is not made again. Wall time is that of the training steps, one thread each, ``--workers`` at a time.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

REWARDS = {  # what is drawn -> its column in validation.csv
    "CLIP reward": "reward",
    "JPEG size, kB": "kilobytes",
}
PROMPTS = ("red apple", "cat face", "dog face", "butterfly", "green tree", "yellow banana", "sun", "rainbow")
POLICY_RATES = {"CLIP reward": 3e-4, "JPEG size, kB": 1e-3}  # the best of 1e-4, 3e-4, 1e-3; at 1e-3 CLIP falls
METHODS = {  # recipe, what it is given, and its reward by what is drawn
    "DRaFT-1": ("draft_k_sd", ["model.truncation_steps=1"], "compressibility"),
    "DRaFT+": ("draftp_sd", [], "compressibility"),
    "DDPO": (
        "ddpo_sd",
        [
            "model.infer.sampler_type=ddim",
            "model.ddpo.statistics=prompt",
            "model.ddpo.buffer=32",
            "model.ddpo.min_count=8",
            "model.micro_batch_size=16",
        ],
        "jpeg_size",
    ),
}


@dataclass(frozen=True)
class Run:
    method: str
    judged: str
    seed: int
    steps: int
    batch: int
    rate: float
    points: int
    directory: Path
    more: tuple[str, ...]

    @property
    def overrides(self) -> list[str]:
        recipe, own, stand_in = METHODS[self.method]
        return [
            *own,
            "model.infer.inference_steps=5",
            "model.infer.unconditional_guidance_scale=1",
            f"model.data.train.webdataset.local_root_path={self.directory.parent / 'prompts.txt'}",
            f"rm={'clip' if self.judged == 'CLIP reward' else stand_in}",
            f"model.seed={self.seed}",
            f"model.global_batch_size={self.batch}",
            f"model.optim.lr={self.rate}",
            "sched=constant",
            f"trainer.{recipe}.max_steps={self.steps}",
            f"trainer.{recipe}.val_check_interval={max(1, self.steps // self.points)}",
            f"trainer.{recipe}.save_interval=0",
            "trainer.accelerator=cpu",
            "report.enable=false",
            f"exp_manager.explicit_log_dir={self.directory}",
            *self.more,
        ]

    def rows(self) -> list[dict[str, Any]]:
        """Of the finished run: what had been made and had passed at each validation; the base model's first."""

        def table(name: str) -> list[dict[str, float]]:
            with (self.directory / name).open(encoding="utf-8", newline="") as file:
                return [{key: float(value or "nan") for key, value in row.items()} for row in csv.DictReader(file)]

        steps, validations, column = table("metrics.csv"), table("validation.csv"), REWARDS[self.judged]
        first = {"step": 0.0, column: validations[0][f"base_{column}"]}
        return [
            {
                "reward": self.judged,
                "method": self.method,
                "seed": self.seed,
                "pictures": sum(row["images"] for row in steps if row["step"] <= at["step"]),
                "seconds": sum(row["seconds"] for row in steps if row["step"] <= at["step"]),
                "value": at[column],
            }
            for at in (first, *validations)
        ]


def make(run: Run) -> None:
    """Train, with the size of the validation pictures' files beside the other figures."""
    import torch

    import nemo_aligner_diffusion.training.run as training
    from nemo_aligner_diffusion.config.load import load_config
    from nemo_aligner_diffusion.rewards import JPEGSize

    torch.set_num_threads(1)
    figures, size = training.validation_figures, JPEGSize(wanted="large").build()

    def with_size(pictures: Any, **options: Any) -> dict[str, float]:
        sizes = {"kilobytes": pictures.tuned, "base_kilobytes": pictures.base}
        measured = {name: float(size(images, pictures.prompts).mean()) for name, images in sizes.items()}
        return {**figures(pictures, **options), **measured}

    training.validation_figures = with_size  # type: ignore[assignment]
    if training.run_training(load_config(METHODS[run.method][0], run.overrides)):
        raise SystemExit(f"{run.directory} was stopped")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Means over seeds, each seed pale; pictures and seconds on logarithmic scales."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    panels: Any = figure.subplots(len(REWARDS), 2, squeeze=False)
    axes_of = {
        (judged, x): panels[i][j] for i, judged in enumerate(REWARDS) for j, x in enumerate(("pictures", "seconds"))
    }
    for (judged, x), axes in axes_of.items():
        axes.set(xlabel=f"{x} (training)", ylabel=judged)
        axes.set_xscale("symlog", linthresh=10)
        for colour, method in zip(("#0072B2", "#E69F00", "#AA3377"), METHODS, strict=True):
            mine = [row for row in rows if (row["reward"], row["method"]) == (judged, method)]
            seeds = [[row for row in mine if row["seed"] == seed] for seed in sorted({row["seed"] for row in mine})]
            for one in seeds:
                axes.plot([row[x] for row in one], [row["value"] for row in one], color=colour, alpha=0.25)
            together = [
                {key: fmean(row[key] for row in at) for key in (x, "value")} for at in zip(*seeds, strict=False)
            ]
            axes.plot([p[x] for p in together], [p["value"] for p in together], color=colour, marker=".", label=method)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("results/ddpo"), help="run directories")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where the table and the figure go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--pictures", type=int, default=640, help="that DRaFT-1 and DRaFT+ may generate")
    parser.add_argument("--batch", type=int, default=16, help="of these two")
    parser.add_argument("--rate", type=float, default=4e-4, help="of these two")
    parser.add_argument("--policy-pictures", type=int, default=5120, help="that DDPO may generate")
    parser.add_argument("--policy-batch", type=int, default=128)
    parser.add_argument("--points", type=int, default=10, help="validations of a run")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("overrides", nargs="*", help="of every run")
    given = parser.parse_args()
    runs = []
    for judged, method, seed in itertools.product(REWARDS, METHODS, given.seeds):
        policy = method == "DDPO"
        batch = given.policy_batch if policy else given.batch
        pictures, rate = (given.policy_pictures, POLICY_RATES[judged]) if policy else (given.pictures, given.rate)
        name = f"{judged.split()[0]}_{method}_lr{rate:g}_seed{seed}"
        steps = max(1, pictures // batch)
        runs.append(
            Run(method, judged, seed, steps, batch, rate, given.points, given.work / name, tuple(given.overrides))
        )
    given.work.mkdir(parents=True, exist_ok=True)
    (given.work / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    todo = [run for run in runs if not (run.directory / "export").exists()]
    with ProcessPoolExecutor(given.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(make, todo))
    rows = [row for run in runs for row in run.rows()]
    given.docs.mkdir(parents=True, exist_ok=True)
    with (given.docs / "ddpo_vs_draft.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, given.docs / "images" / "ddpo_vs_draft.png")


if __name__ == "__main__":
    main()
