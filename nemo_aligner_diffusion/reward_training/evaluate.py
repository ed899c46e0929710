"""Scoring preference shards with a finished reward, and the reliability plot."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nemo_aligner_diffusion.data.bad_samples import BadSamples, OnBadSample, warn_of
from nemo_aligner_diffusion.data.paths import PathSpec, expand_paths
from nemo_aligner_diffusion.evaluation.curves import GRID_LINE, INK, PALETTE, PAPER, QUIET
from nemo_aligner_diffusion.reward_training.calibration import PreferenceFigures
from nemo_aligner_diffusion.reward_training.preference_data import PreferenceDataset, pictures
from nemo_aligner_diffusion.reward_training.preference_shards import read_preference_file
from nemo_aligner_diffusion.rewards.base import Reward
from nemo_aligner_diffusion.rewards.clip.reward import CLIPReward
from nemo_aligner_diffusion.runtime.files import write_atomic


@torch.no_grad()
def score_pairs(
    reward: Reward,
    paths: PathSpec,
    *,
    batch_size: int = 32,
    num_workers: int = 0,
    on_bad_sample: OnBadSample = "error",
    device: str | torch.device = "cpu",
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[Tensor, Tensor]:
    """Scores and labels ``(N, 2)`` of all pairs, in file order, on the CPU.

    A CLIP takes batches of pictures resized as it wants them; any other reward one picture at a time as it is.

    Args:
        progress: called with the number of pairs done.
    """
    scores: list[Tensor] = []
    labels: list[Tensor] = []
    done = 0
    if isinstance(reward, CLIPReward):
        dataset = PreferenceDataset(
            paths,
            preprocessing=reward.preprocessing,
            micro_batch_size=batch_size,
            shuffle_buffer=0,
            epochs=1,
            incomplete="wrap",
            on_bad_sample=on_bad_sample,
        )
        for batch in torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=num_workers):
            prompts = [prompt for prompt in batch["prompts"] for _ in (0, 1)]
            counts = batch["counts"]
            scores.append(reward(batch["images"].flatten(0, 1).to(device), prompts).view(-1, 2).cpu()[counts])
            labels.append(batch["labels"][counts])
            done += int(counts.sum())
            progress(done)
    else:
        bad = BadSamples(on_bad_sample)
        for file in expand_paths(paths):
            for pair in read_preference_file(file, bad, decode=on_bad_sample == "skip"):
                both = [reward(picture[None].to(device), [pair.prompt]).cpu() for picture in pictures(pair)]
                scores.append(torch.stack(both, dim=1))
                labels.append(torch.tensor([pair.label]))
                done += 1
                progress(done)
        warn_of(bad.summary())
    return (torch.cat(scores), torch.cat(labels)) if scores else (torch.empty(0, 2), torch.empty(0, 2))


def reliability_plot(path: str | Path, figures: PreferenceFigures, title: str = "Reliability") -> Path:
    """Accuracy over confidence, a bar a bin, with the diagonal of perfect calibration and the number of pairs below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 4.6), dpi=150, facecolor=PAPER, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [4, 1]})
    filled = [part for part in figures.bins if part.pairs]
    centres = [(part.low + part.high) / 2 for part in filled]
    width = 0.9 * (figures.bins[0].high - figures.bins[0].low)
    upper.plot([0.5, 1], [0.5, 1], color=PALETTE["base"], linewidth=1.2, linestyle="--", label="perfectly calibrated")
    upper.bar(centres, [part.accuracy for part in filled], width, color=PALETTE["tuned"], alpha=0.55)
    means = [part.confidence for part in filled]
    upper.plot(means, [part.accuracy for part in filled], "o", color=PALETTE["tuned"], markersize=4)
    upper.set_ylim(0, 1.02)
    upper.set_ylabel("accuracy", color=QUIET, fontsize=9)
    upper.set_title(title, color=INK, fontsize=11, loc="left", fontweight="bold", parse_math=False)
    upper.legend(frameon=False, fontsize=8, loc="lower right")
    lower.bar(centres, [part.pairs for part in filled], width, color=PALETTE["base"])
    lower.set_xlim(0.49, 1.01)
    lower.set_ylabel("pairs", color=QUIET, fontsize=9)
    lower.set_xlabel("confidence: predicted probability of the preferred picture", color=QUIET, fontsize=9)
    for axes in (upper, lower):
        axes.grid(True, axis="y", color=GRID_LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=QUIET, labelsize=8.5, length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", metadata={"Software": None})
    return write_atomic(path, buffer.getvalue())
