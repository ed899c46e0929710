"""How well scores predict preferences: accuracy, ties, calibration.

The predicted probability that the first picture is preferred is ``softmax(scores)[0]``. Its *confidence* is that of the
picture it prefers, in ``[0.5, 1]``. Scores are calibrated where of all pairs judged with confidence 0.8, 80 % are right
(Guo et al., 2017, arXiv 1706.04599, equation 3: expected calibration error over bins of equal width).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from nemo_aligner_diffusion.data.bad_samples import BadSamples, OnBadSample, warn_of
from nemo_aligner_diffusion.data.paths import PathSpec, expand_paths
from nemo_aligner_diffusion.data.preferences.reward_pairs import pictures
from nemo_aligner_diffusion.data.preferences.shards import read_preference_file
from nemo_aligner_diffusion.errors import DataError
from nemo_aligner_diffusion.evaluation.curves import Curve, curve_plot
from nemo_aligner_diffusion.reward_training.loss import correct, decided, preference_loss
from nemo_aligner_diffusion.rewards.base import Reward
from nemo_aligner_diffusion.rewards.clip.reward import CLIPReward
from nemo_aligner_diffusion.runtime.files import write_atomic


@dataclass(frozen=True)
class PreferenceFigures:
    """Figures of one set of pairs.

    Attributes:
        pairs, ties: counts; ``pairs`` includes the ties.
        accuracy: share of the other pairs whose preferred picture scores higher (equal scores count half); NaN where
            all are ties.
        loss: mean :func:`.preference_loss`, ties included.
        calibration_error: expected calibration error of the pairs that are no ties, 0…0.5; NaN without any.
        mean_confidence: of these pairs.
        bins: of these pairs by confidence: ``low`` and ``high`` end of the bin, ``pairs`` in it, their mean
            ``confidence`` and ``accuracy`` (NaN without any).
    """

    pairs: int
    ties: int
    accuracy: float
    loss: float
    calibration_error: float
    mean_confidence: float
    bins: tuple[dict[str, float], ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: NaN as None."""
        return json.loads(json.dumps(asdict(self)), parse_constant=lambda _: None)


def preference_figures(scores: Tensor, labels: Tensor, bins: int = 10) -> PreferenceFigures:
    """Figures of scores and labels ``(N, 2)``, in float64.

    Raises:
        DataError: there is no pair, or a score is not finite.
    """
    scores, labels = scores.double(), labels.double()
    if not len(scores):
        raise DataError("there is no pair to judge; expected at least one")
    if not torch.isfinite(scores).all():
        bad = int((~torch.isfinite(scores)).any(1).sum())
        raise DataError(
            f"{bad} of {len(scores)} pairs have a score that is NaN or infinite: the model is damaged, or overflows in "
            "its precision (try 32)"
        )
    sure = decided(labels)
    right = correct(scores, labels)[sure]
    confidence = scores.softmax(dim=1).max(dim=1).values[sure]
    index = ((confidence - 0.5) * 2 * bins).long().clamp(0, bins - 1)
    counts = index.bincount(minlength=bins)
    mean_confidence, accuracy = (index.bincount(values, minlength=bins) / counts for values in (confidence, right))
    gap = ((accuracy - mean_confidence).abs() * counts).nansum() / len(right)
    edges = torch.linspace(0.5, 1, bins + 1, dtype=torch.float64).tolist()
    columns = (edges[:-1], edges[1:], counts.tolist(), mean_confidence.tolist(), accuracy.tolist())
    names = ("low", "high", "pairs", "confidence", "accuracy")
    return PreferenceFigures(
        pairs=len(scores),
        ties=int((~sure).sum()),
        accuracy=float(right.mean()),
        loss=float(preference_loss(scores, labels).mean()),
        calibration_error=float(gap),
        mean_confidence=float(confidence.mean()),
        bins=tuple(dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)),
    )


@torch.no_grad()
def score_pairs(
    reward: Reward,
    paths: PathSpec,
    *,
    batch_size: int = 32,
    on_bad_sample: OnBadSample = "error",
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor]:
    """Scores and labels ``(N, 2)`` of all pairs, in file order, on the CPU.

    A CLIP takes batches of pictures prepared as it wants them; any other reward one picture at a time as it is.
    """
    bad = BadSamples(on_bad_sample)
    files = expand_paths(paths)
    read = chain.from_iterable(read_preference_file(file, bad, decode=on_bad_sample == "skip") for file in files)
    pairs = iter(tqdm(read, unit=" pairs", disable=None))  # None: shown on a terminal only
    scores, labels = [torch.empty(0, 2)], [torch.empty(0, 2)]
    while batch := list(islice(pairs, batch_size)):
        both = [picture[None].to(device) for pair in batch for picture in pictures(pair)]
        prompts = [pair.prompt for pair in batch for _ in (0, 1)]
        if isinstance(reward, CLIPReward):
            values = reward(torch.cat([reward.preprocessing.square(picture) for picture in both]), prompts)
        else:
            values = torch.cat([reward(picture, [prompt]) for picture, prompt in zip(both, prompts, strict=True)])
        scores.append(values.view(-1, 2).float().cpu())
        labels.append(torch.tensor([pair.label for pair in batch]))
    warn_of(bad.summary())
    return torch.cat(scores), torch.cat(labels)


def reliability_plot(path: str | Path, figures: PreferenceFigures) -> Path:
    """Accuracy over confidence, a point a bin, with the diagonal of perfect calibration."""
    filled = [part for part in figures.bins if part["pairs"]]
    confidence, accuracy = ([100 * part[name] for part in filled] for name in ("confidence", "accuracy"))
    curves = [
        Curve("perfectly calibrated", [50, 100], [50, 100], "base"),
        Curve(f"this reward, error {figures.calibration_error:.3f}", confidence, accuracy, markers=True),
    ]
    x_label = "confidence: predicted probability of the preferred picture, %"
    data, _ = curve_plot(curves, title="Reliability", x_label=x_label, y_label="accuracy, %")
    return write_atomic(path, data)
