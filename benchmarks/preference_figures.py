"""Figures of :mod:`benchmarks.preference_methods`' runs: what each method gains and loses, where its gradient is from.

    python -m benchmarks.preference_figures --work results/preferences --docs docs

The second figure's middle panel and its right one make runs of their own, a few minutes, kept in WORK.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.preference_methods import METHODS, Trial, words_of
from nemo_aligner_diffusion.algorithms.preference.corrections import Corrections
from nemo_aligner_diffusion.config.load import load_config
from nemo_aligner_diffusion.data.preferences.pairs import PairDataModule
from nemo_aligner_diffusion.data.preferences.settings import PairSettings
from nemo_aligner_diffusion.diffusion.generate import Sampling
from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.diffusion.lora import add_lora
from nemo_aligner_diffusion.diffusion.network.call import DirectCalls
from nemo_aligner_diffusion.diffusion.network.latents import from_moments
from nemo_aligner_diffusion.embedded_assets import embedded_model_path
from nemo_aligner_diffusion.training.run import run_training

COLOURS = dict(zip(METHODS, ("tab:blue", "tab:cyan", "tab:red", "tab:green", "tab:orange", "tab:grey"), strict=True))
LEAST_CLIP = 9.0  # drawn; worse runs stand at the edge
BINS = 20  # of gradient_weight.csv


def slopes(latents: Path, pairs: int = 16) -> list[float]:
    """Mean norm of ``∂(d(z^w) − d(z^l))/∂θ`` at each twentieth of the noise levels: of a fresh LoRA, pair by pair."""
    model = load_model(embedded_model_path())
    model.pipe.set_progress_bar_config(disable=True)
    data = PairDataModule(str(latents), settings=PairSettings(), micro_batch_size=pairs, epochs=1, rank=0, world_size=1)
    data.setup("fit")
    data.fit_to(model, Sampling())
    batch = next(iter(data.train_dataloader()))
    add_lora(model.denoiser, 8, target_modules=model.lora_targets)
    calls = DirectCalls(model, Sampling())
    levels, trained = calls.levels, [p for p in model.denoiser.parameters() if p.requires_grad]
    both = from_moments(model, batch["moments"].flatten(0, 1), latent_shape=calls.latent_shape).unflatten(0, (-1, 2))
    found = []
    for place in range(BINS):
        norms = []
        for row, prompt in enumerate(batch["prompts"]):
            generator = torch.Generator().manual_seed(row)
            t = torch.full((2,), round((place + 0.5) * levels.size / BINS))
            noise = torch.randn(calls.latent_shape, generator=generator).expand_as(both[row])
            prediction = calls.predict(calls.conditioning([prompt]), levels.noised(both[row], noise, t), t)
            winner, loser = levels.error(both[row], noise, prediction, t)
            gradients = torch.autograd.grad(winner - loser, trained)
            norms.append(float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt()))
        found.append(fmean(norms))
    return found


def tables(folder: Path, rate: float, beta: float, iterations: int, pairs: int, every: int) -> list[Tensor]:
    """DDE's table of corrections after each ``every`` iterations; made once."""
    file = folder / "corrections.pt"
    if not file.exists():
        found: list[Tensor] = []
        learn = Corrections.learn

        def watched(table: Corrections, rows: Any) -> None:
            learn(table, rows)
            watched.calls += 1  # type: ignore[attr-defined]
            if watched.calls % every == 0:  # type: ignore[attr-defined]
                found.append(table.table.clone())

        watched.calls = 0  # type: ignore[attr-defined]
        Corrections.learn = watched  # type: ignore[method-assign]
        try:
            trial = Trial("dde", rate, beta, iterations=iterations, pairs=pairs)
            if code := run_training(load_config("dde_sd", words_of(trial, folder))):
                raise SystemExit(code)
        finally:
            Corrections.learn = learn  # type: ignore[method-assign]
        torch.save(torch.stack(found), file)
    return list(torch.load(file, weights_only=True))


def weights_of(runs: Sequence[Path]) -> list[float]:
    """Mean gradient weight at each twentieth of the noise levels, over pairs."""
    sums = [[0.0, 0.0] for _ in range(BINS)]
    for run in runs:
        with (run / "gradient_weight.csv").open(encoding="utf-8", newline="") as rows:
            for place, row in enumerate(csv.DictReader(rows)):
                sums[place][0] += float(row["pairs"])
                sums[place][1] += float(row["pairs"]) * float(row["gradient_weight"])
    return [weight / pairs for pairs, weight in sums]


def draw_front(rows: Sequence[dict[str, Any]], base: dict[str, Any], path: Path) -> None:
    """Every run of the search, and how the noise levels that DDE is trained on matter."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes = {rate: 12 * 3**place for place, rate in enumerate(sorted({row["rate"] for row in rows}))}
    for method in METHODS:
        mine = [row for row in rows if row["method"] == method and row["steps"] is None and row["seed"] == 0]
        mine = list({row["name"]: row for row in mine}.values())
        x = [max(row["clip"], LEAST_CLIP) for row in mine]
        y = [fmean(row["label"].values()) for row in mine]
        left.scatter(x, y, [sizes[row["rate"]] for row in mine], COLOURS[method], alpha=0.6, label=method)
    left.scatter(base["clip"], fmean(base["label"].values()), 160, "black", marker="*", label="base model")
    left.set(
        xlabel=f"CLIP reward (those at {LEAST_CLIP:g}: there or below)",
        ylabel="labeller's score of pictures (colourfulness)",
        title="Every run of the search; larger: higher rate",
    )
    legend = left.legend()
    for handle in legend.legend_handles:
        handle.set_sizes([40])
    parts: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        if row["steps"] is not None:
            parts.setdefault(tuple(row["steps"]), []).append(fmean(row["label"].values()))
    for place, (_, values) in enumerate(sorted(parts.items())):
        right.bar(place, fmean(values) - fmean(base["label"].values()), color="tab:blue", alpha=0.5)
        right.scatter([place] * len(values), [v - fmean(base["label"].values()) for v in values], 12, "black")
    right.axhline(0, color="black", linewidth=0.8)
    right.set_xticks(range(len(parts)), [f"{low}–{high}" for low, high in sorted(parts)], rotation=60)
    right.set(
        xlabel="noise levels t that are trained",
        ylabel="labeller's score above the base model's",
        title="DDE on parts of the range; points: seeds",
    )
    figure.savefig(path, dpi=110)


def draw_weights(
    weights: dict[str, list[float]], norms: Sequence[float], corrections: Sequence[Tensor], every: int, path: Path
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.2), layout="constrained")
    first, second, third = figure.subplots(1, 3)
    t = [(place + 0.5) * 1000 / BINS for place in range(BINS)]
    for method, values in weights.items():
        pulled = [weight * norm for weight, norm in zip(values, norms, strict=True)]
        for axes, curve in ((first, values), (second, pulled)):
            axes.plot(t, [v / fmean(curve) for v in curve], color=COLOURS[method], marker=".", label=method)
    first.set(ylabel="mean |∂loss/∂(Δ_winner − Δ_loser)|, of its own mean", title="Weight of a pair")
    second.set(ylabel="weight × ‖∂(d_winner − d_loser)/∂θ‖, of its own mean", title="Pull on the parameters")
    for axes in (first, second):
        axes.set(yscale="log", xlabel="noise level t")
        axes.legend()
    shades = torch.linspace(0.85, 0.0, len(corrections)).tolist()
    for place, table in enumerate(corrections):
        gap = (table[:, 0] - table[:, 1]).abs().unflatten(0, (BINS, -1)).mean(1)
        label = f"after {(place + 1) * every} iterations" if place in (0, len(corrections) - 1) else None
        third.plot(t, gap, color=str(shades[place]), label=label)
    third.set(yscale="log", xlabel="noise level s", ylabel="mean |c_winner − c_loser|", title="DDE's corrections")
    third.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("results/preferences"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--iterations", type=int, default=150, help="of the run that DDE's corrections are read in")
    parser.add_argument("--pairs", type=int, default=32, help="an iteration of it")
    parser.add_argument("--every", type=int, default=15, help="iterations between two looks at them")
    arguments = parser.parse_args()
    folder: Path = arguments.work.resolve()
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text("utf-8").splitlines()]
    base = next(row for row in rows if row["name"] == "base" and row["seeds"] == 2)
    rows = [row for row in rows if row["name"] != "base"]
    finals = [row for row in rows if row["steps"] is None and row["seeds"] == 2]
    (arguments.docs / "images").mkdir(parents=True, exist_ok=True)
    draw_front(rows, base, arguments.docs / "images" / "preference_methods.png")
    compared = {m: [folder / "runs" / row["name"] for row in finals if row["method"] == m] for m in METHODS[:-1]}
    weights = {method: weights_of(runs) for method, runs in compared.items()}
    norms = slopes(folder / "encoded")
    best = next(row for row in finals if row["method"] == "dde")
    corrections = tables(folder, best["rate"], best["beta"], arguments.iterations, arguments.pairs, arguments.every)
    draw_weights(weights, norms, corrections, arguments.every, arguments.docs / "images" / "preference_weights.png")
    above = [table.flip(0).cumsum(0).flip(0) for table in corrections]
    gaps = [(sums[:, 0] - sums[:, 1]) for sums in above]
    print("iterations  change of Σ_{s>t} from one look to the next, of the last one's size")
    for place, (before, after) in enumerate(itertools.pairwise(gaps)):
        print(f"{(place + 2) * arguments.every:10d}  {float((after - before).norm() / gaps[-1].norm()):.3f}")


if __name__ == "__main__":
    main()
