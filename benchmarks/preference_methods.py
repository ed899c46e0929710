"""The preference methods on one set of pairs of the embedded model: rates and β by search, then three seeds, then parts
of the range of noise levels; judged by pictures of other prompts.

python -m benchmarks.preference_methods --work results/preferences

Every finished run is kept in WORK/results.jsonl, so that a second call goes on where the first one ended.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import random
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from benchmarks.judge import BROAD, table
from nemo_aligner_diffusion.algorithms.preference.self_made import labeller_of, make_rule_preferences
from nemo_aligner_diffusion.config.load import load_config
from nemo_aligner_diffusion.data.prompts import read_prompts
from nemo_aligner_diffusion.diffusion.generate import Sampling, generate
from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.diffusion.lora import load_lora_weights
from nemo_aligner_diffusion.embedded_assets import embedded_model_path, embedded_prompts_path, embedded_reward_path
from nemo_aligner_diffusion.evaluation.diversity import diversity, embed_images
from nemo_aligner_diffusion.rewards import restore_reward
from nemo_aligner_diffusion.training.run import run_training

METHODS = ("dde", "dde_single", "dde_step", "dpo", "discounted", "sft")
RATES = (3e-4, 1e-3, 3e-3)
BETAS = (0.2, 1.0, 5.0)  # times the method's own default
# The best rate and β: of the highest labeller's score among the runs whose pictures still show what was asked for, that
# is, whose CLIP reward is at most this below the base's. Any method pleases the labeller if it may forget the rest.
CLIP_GIVEN_UP = 1.0
TENTHS = [(low, low + 100) for low in (0, 300, 600, 900)]  # of claim (d), and one more


@dataclass(frozen=True)
class Trial:
    """One run; ``beta``: times the method's default; ``steps``: noise levels, ``None``: all."""

    method: str
    rate: float
    beta: float = 1.0
    seed: int = 0
    steps: tuple[int, int] | None = None
    iterations: int = 60
    pairs: int = 8
    labeller: str = "colourfulness"

    @property
    def name(self) -> str:
        levels = "all" if self.steps is None else f"{self.steps[0]}_{self.steps[1]}"
        return f"{self.method}_{self.rate:g}_{self.beta:g}_{levels}_{self.iterations}x{self.pairs}_{self.seed}"


class Judge:
    """Pictures of the validation prompts, the same seeds for every model, away from those of the pairs."""

    def __init__(self, labeller: str, seeds: int, steps: int) -> None:
        self.label, self.clip = labeller_of(labeller), restore_reward(embedded_reward_path())
        prompts = [p for p in read_prompts(str(embedded_prompts_path("validation"))) if p not in BROAD]
        self.names = [prompt for prompt in prompts for _ in range(seeds)]
        self.seeds = list(range(100, 100 + seeds)) * len(prompts)
        self.broad = [prompt for prompt in BROAD for _ in range(4)]
        self.sampling = Sampling(steps, 2.0)

    @torch.no_grad()
    def __call__(self, lora: Path | None) -> dict[str, Any]:
        """``label``: by prompt, the labeller's mean score; ``clip``: mean; ``diversity`` of broad prompts."""
        model = load_model(embedded_model_path())
        if lora is not None:
            load_lora_weights(model.denoiser, lora, "judged")
        images = generate(model, self.names, self.seeds, self.sampling)
        broad = generate(model, self.broad, [100, 101, 102, 103] * len(BROAD), self.sampling)
        scores: dict[str, list[float]] = {}
        for prompt, score in zip(self.names, self.label(images, self.names).tolist(), strict=True):
            scores.setdefault(prompt, []).append(score)
        return {
            "label": {prompt: fmean(values) for prompt, values in scores.items()},
            "clip": float(self.clip(images, self.names).mean()),
            "diversity": diversity(embed_images(self.clip, broad), self.broad),
        }


def words_of(trial: Trial, folder: Path) -> list[str]:
    """Its overrides of ``dde_sd``."""
    words = [
        f"algorithm={trial.method}",
        "peft=sdlora",
        "sched=constant",
        f"model.optim.lr={trial.rate}",
        f"model.seed={1234 + trial.seed}",
        f"model.global_batch_size={trial.pairs}",
        f"model.micro_batch_size={trial.pairs}",
        f"trainer.dde_sd.max_steps={trial.iterations}",
        "trainer.dde_sd.val_check_interval=0",
        "trainer.dde_sd.save_interval=0",
        "report.enable=false",
        f"model.data.train.webdataset.local_root_path={folder / 'encoded'}",
        f"exp_manager.explicit_log_dir={folder / 'runs' / trial.name}",
    ]
    if trial.method != "sft":
        default = load_config("dde_sd", [f"algorithm={trial.method}"]).model[trial.method].beta
        words.append(f"model.{trial.method}.beta={trial.beta * default}")
    if trial.steps is not None:
        words.append(f"model.preference.steps=[{trial.steps[0]},{trial.steps[1]}]")
    return words


def work(job: tuple[Trial, Path, int, int]) -> dict[str, Any]:
    trial, folder, seeds, steps = job
    torch.set_num_threads(1)
    run = folder / "runs" / trial.name
    if not (run / "export").exists():  # else it is only judged by more pictures
        shutil.rmtree(run, ignore_errors=True)
        if code := run_training(load_config("dde_sd", words_of(trial, folder))):
            raise SystemExit(code)
    judged = Judge(trial.labeller, seeds, steps)(run / "export" / "pytorch_lora_weights.safetensors")
    return {**asdict(trial), "name": trial.name, "seeds": seeds, **judged}


class Results:
    """Judged runs by name and by how they were judged."""

    def __init__(self, folder: Path, steps: int, workers: int) -> None:
        self.folder, self.steps, self.workers = folder, steps, workers
        self.file = folder / "results.jsonl"
        lines = self.file.read_text("utf-8").splitlines() if self.file.exists() else []
        self.known = {(row["name"], row["seeds"]): row for row in map(json.loads, lines)}

    def of(self, trials: Iterable[Trial], seeds: int) -> list[dict[str, Any]]:
        trials = list(trials)
        missing = [trial for trial in trials if (trial.name, seeds) not in self.known]
        jobs = [(trial, self.folder, seeds, self.steps) for trial in missing]
        with ProcessPoolExecutor(self.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            for row in pool.map(work, jobs):
                self.known[row["name"], row["seeds"]] = row
                with self.file.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(row) + "\n")
                print(row["name"], f"{fmean(row['label'].values()):.3f} {row['clip']:.3f}", flush=True)
        return [self.known[trial.name, seeds] for trial in trials]

    def base(self, labeller: str, seeds: int) -> dict[str, Any]:
        """The base model, judged alike."""
        if ("base", seeds) not in self.known:
            row = {"name": "base", "method": "base", "seeds": seeds, **Judge(labeller, seeds, self.steps)(None)}
            self.known["base", seeds] = row
            with self.file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
        return self.known["base", seeds]


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    rng = random.Random(0)
    means = sorted(fmean(rng.choices(values, k=len(values))) for _ in range(draws))
    return means[round(0.025 * draws)], means[round(0.975 * draws) - 1]


def in_words(rows: Sequence[dict[str, Any]], base: dict[str, Any]) -> tuple[object, ...]:
    """Labeller, CLIP, diversity and share over seeds."""

    def spread(values: Sequence[float]) -> str:
        return f"{fmean(values):.4g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")

    # prompts are drawn, each with all seeds: seeds of one prompt are not independent
    better = [fmean(float(row["label"][prompt] > score) for row in rows) for prompt, score in base["label"].items()]
    low, high = interval(better)
    return (
        spread([fmean(row["label"].values()) for row in rows]),
        spread([row["clip"] for row in rows]),
        spread([row["diversity"] for row in rows]),
        f"{fmean(better):.0%} ({low:.0%} to {high:.0%})",
    )


COLUMNS = ["", "labeller's score", "CLIP", "diversity", "prompts better than the base"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("results/preferences"))
    parser.add_argument("--labeller", default="colourfulness")
    parser.add_argument("--label-noise", type=float, default=0.1)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--pairs", type=int, default=8, help="an iteration")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds of the final runs")
    parser.add_argument("--steps", type=int, default=10, help="sampling steps of the judged pictures")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--stages", nargs="+", default=["search", "final", "ranges"])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    arguments = parser.parse_args()
    folder: Path = arguments.work.resolve()
    prepare(folder, arguments.labeller, arguments.label_noise)
    results = Results(folder, arguments.steps, arguments.workers)
    common = {"iterations": arguments.iterations, "pairs": arguments.pairs, "labeller": arguments.labeller}
    text = ""
    grids = {
        method: [Trial(method, rate, beta, **common)
                 for rate, beta in itertools.product(RATES, BETAS if method != "sft" else (1.0,))]
        for method in arguments.methods
    }  # fmt: skip
    if "search" in arguments.stages:
        results.of(itertools.chain(*grids.values()), seeds=1)
    least = results.base(arguments.labeller, 1)["clip"] - CLIP_GIVEN_UP
    best: dict[str, Trial] = {}
    for method, grid in grids.items():
        if all((trial.name, 1) in results.known for trial in grid):
            found = {trial: results.known[trial.name, 1] for trial in grid}
            kept = [trial for trial, row in found.items() if row["clip"] >= least] or grid
            best[method] = max(kept, key=lambda trial: fmean(found[trial]["label"].values()))
    base = results.base(arguments.labeller, 2)
    if "final" in arguments.stages:
        rows: list[tuple[object, ...]] = [("base", *in_words([base], base)[:3], "")]
        finals = {m: [seeded(t, seed) for seed in range(arguments.seeds)] for m, t in best.items()}
        results.of(itertools.chain(*finals.values()), seeds=2)
        for method, trials in finals.items():
            label = f"{method} (rate {best[method].rate:g}, β × {best[method].beta:g})"
            rows.append((label, *in_words(results.of(trials, seeds=2), base)))
        text += table(COLUMNS, rows) + "\n"
    if "ranges" in arguments.stages and "dde" in best:
        rows = []
        parts = {f"{low} to {high}": (low, high) for low, high in [(0, 1000), (200, 700), *TENTHS]}
        runs = {label: [seeded(best["dde"], seed, steps) for seed in range(arguments.seeds)]
                for label, steps in parts.items()}  # fmt: skip
        results.of(itertools.chain(*runs.values()), seeds=2)
        for label, trials in runs.items():
            rows.append((label, *in_words(results.of(trials, seeds=2), base)))
        text += table(["noise levels t", *COLUMNS[1:]], rows)
    print(text)


def seeded(trial: Trial, seed: int, steps: tuple[int, int] | None = None) -> Trial:
    return Trial(**{**asdict(trial), "seed": seed, "steps": steps})


def prepare(folder: Path, labeller: str, noise: float) -> None:
    """The pairs, once: 96 prompts of four pictures each, ten steps, without guidance; and their latents."""
    if (folder / "encoded").exists():
        return
    from nemo_aligner_diffusion.cli.encode_latents import main as encode

    make_rule_preferences(folder / "pairs", labeller, 120, 4, 10, 0, True, noise)
    if code := encode([str(folder / "pairs" / "train"), str(folder / "encoded")]):
        raise SystemExit(code)


if __name__ == "__main__":
    main()
