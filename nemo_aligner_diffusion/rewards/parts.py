"""What rewards of several parts share: each part's score, brought to a scale and kept within bounds, and logged raw."""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nemo_aligner_diffusion.errors import CheckpointError, RewardError
from nemo_aligner_diffusion.rewards.base import Reward, check_images

BY_BASE = "base"
STATISTICS_FILE = "reward_normalization.json"  # in a run directory: {place: {"mean": …, "std": …}}
CLIP_MODES = ("hard", "smooth")


@dataclass(frozen=True)
class Shaping:
    """What becomes of a part's score ``s`` before it counts: first normalised, then clipped.

    Attributes:
        normalize: ``(mean, std)``: ``(s − mean) / std``; ``"base"``: the mean and standard deviation over the base
            model's validation pictures, to be measured before the first use; ``None``: ``s`` as it is.
        clip: ``(low, high)``, either of them ``None`` for no bound; ``None``: no clipping.
        clip_mode: ``hard`` cuts at the bounds: beyond them the part has no gradient at all. ``smooth`` is
            ``c + h·tanh((s − c) / h)`` with centre ``c`` and half-width ``h`` of the bounds: slope 1 at the centre,
            0.42 at a bound, vanishing beyond; it needs both bounds.
    """

    normalize: tuple[float, float] | str | None = None
    clip: tuple[float | None, float | None] | None = None
    clip_mode: str = "hard"

    def __post_init__(self) -> None:
        if isinstance(self.normalize, str):
            if self.normalize != BY_BASE:
                raise RewardError(f"normalize is {self.normalize!r}; expected {{mean: …, std: …}}, or base.")
        elif self.normalize is not None:
            mean, std = self.normalize
            if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
                raise RewardError(f"normalize has mean {mean} and std {std}; expected finite numbers, std > 0.")
        if self.clip_mode not in CLIP_MODES:
            raise RewardError(f"clip_mode is {self.clip_mode!r}; known are {', '.join(CLIP_MODES)}.")
        if self.clip is not None:
            low, high = self.clip
            if (low is not None and high is not None and not low < high) or (low is None and high is None):
                raise RewardError(f"clip is [{low}, {high}]; expected [low, high] with low < high; one may be null.")
            if self.clip_mode == "smooth" and (low is None or high is None):
                raise RewardError(f"clip is [{low}, {high}] with clip_mode smooth, which needs both bounds.")

    def bounded(self, score: Tensor) -> Tensor:
        """``score`` clipped."""
        if self.clip is None:
            return score
        low, high = self.clip
        if self.clip_mode == "hard":
            return score.clamp(low, high)
        assert low is not None
        assert high is not None
        centre, half = (high + low) / 2, (high - low) / 2
        return centre + half * torch.tanh((score - centre) / half)


@dataclass(frozen=True)
class Part:
    """A part of a reward: what judges, and what becomes of its score."""

    reward: Reward
    shaping: Shaping = Shaping()


class PartedReward(Reward):
    """A reward out of several; :meth:`combine` says how.

    :meth:`components` gives the parts' own scores, raw, under the names given here (a part that has several components
    itself adds ``name/component``).

    Args:
        parts: by name.
        label: this reward's place in the configuration, by which measured statistics are kept.
    """

    def __init__(self, parts: Mapping[str, Part], label: str = "rm") -> None:
        super().__init__()
        if not parts:
            raise RewardError(f"A {self.name} reward needs at least one part under {label}.parts.")
        self.label = label
        self.parts = tuple(parts)
        self.shapings = {name: part.shaping for name, part in parts.items()}
        # A list, not a ModuleDict: part names are the user's and may hold dots.
        self.rewards = nn.ModuleList(part.reward for part in parts.values())
        self.statistics: dict[str, tuple[float, float]] = {
            name: shaping.normalize for name, shaping in self.shapings.items() if isinstance(shaping.normalize, tuple)
        }
        self.freeze()

    @abstractmethod
    def combine(self, scores: Sequence[Tensor]) -> Tensor:
        """The parts' shaped scores, each ``(B,)``, as one ``(B,)``."""

    def part(self, name: str) -> Reward:
        reward = self.rewards[self.parts.index(name)]
        assert isinstance(reward, Reward)
        return reward

    def place(self, name: str) -> str:
        """A part's place in the configuration, such as ``rm.parts.clip``."""
        return f"{self.label}.parts.{name}"

    def unmeasured(self) -> list[str]:
        """Parts that are to be normalised by the base model's pictures and are not yet."""
        return [
            name
            for name, shaping in self.shapings.items()
            if shaping.normalize == BY_BASE and name not in self.statistics
        ]

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scores(images, prompts)[0]

    def scores(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        check_images(images, prompts)
        components: dict[str, Tensor] = {}
        shaped: list[Tensor] = []
        for name in self.parts:
            score, inner = self.part(name).scores(images, prompts)
            components[name] = score
            if len(inner) > 1:
                components.update({f"{name}/{key}": value for key, value in inner.items()})
            shaped.append(self._shaped(name, score))
        return self.combine(shaped), components

    def _shaped(self, name: str, score: Tensor) -> Tensor:
        shaping = self.shapings[name]
        if shaping.normalize is not None:
            check_measured(self)
            mean, std = self.statistics[name]
            score = (score - mean) / std
        return shaping.bounded(score)


def parted_rewards(reward: nn.Module) -> list[PartedReward]:
    """All rewards of several parts in ``reward``, inner ones first: an outer part's figures depend on them."""
    return [module for module in reward.modules() if isinstance(module, PartedReward)][::-1]


def known_statistics(reward: nn.Module) -> dict[str, dict[str, float]]:
    """What was measured: ``{place: {"mean": …, "std": …}}``; :func:`apply_statistics` takes it back."""
    return {
        parted.place(name): {"mean": parted.statistics[name][0], "std": parted.statistics[name][1]}
        for parted in parted_rewards(reward)
        for name, shaping in parted.shapings.items()
        if shaping.normalize == BY_BASE and name in parted.statistics
    }


def check_measured(reward: nn.Module) -> None:
    """Raises :class:`RewardError` where a part is to be normalised by figures that are not there."""
    for parted in parted_rewards(reward):
        for name in parted.unmeasured():
            raise RewardError(
                f"{parted.place(name)}.normalize is base: the mean and standard deviation over the base model's "
                "pictures are not known here. A training run measures them before its first step and keeps them in its "
                f"{STATISTICS_FILE}; elsewhere give {{mean: …, std: …}}."
            )


def apply_statistics(reward: nn.Module, statistics: Mapping[str, Mapping[str, float]]) -> None:
    """Set what :func:`known_statistics` gave; places that the reward does not have are left out.

    Raises:
        RewardError: a figure is impossible.
    """
    for parted in parted_rewards(reward):
        for name, shaping in parted.shapings.items():
            figures = statistics.get(parted.place(name))
            if shaping.normalize == BY_BASE and figures is not None:
                mean, std = float(figures["mean"]), float(figures["std"])
                Shaping(normalize=(mean, std))  # checks them
                parted.statistics[name] = (mean, std)


def statistics_of(place: str, scores: Tensor) -> tuple[float, float]:
    """``(mean, standard deviation)`` of raw scores ``(N,)``, in float64, over the population.

    Raises:
        RewardError: fewer than two scores, or they do not differ, or are not finite.
    """
    scores = scores.double()
    mean, std = float(scores.mean()), float(scores.std(correction=0))
    if len(scores) < 2 or not math.isfinite(std) or std <= 1e-9 * max(1.0, abs(mean)):
        raise RewardError(
            f"{place}.normalize is base, but the {len(scores)} scores of the base model's pictures have mean "
            f"{mean:.6g} and standard deviation {std:.3g}, by which nothing can be normalised: validate on more "
            "prompts (model.data.validation), or give {mean: …, std: …}."
        )
    return mean, std


def read_statistics(run_dir: Path) -> dict[str, dict[str, float]]:
    """What a run recorded for :func:`apply_statistics`; ``{}`` where it recorded nothing.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = Path(run_dir) / STATISTICS_FILE
    if not path.is_file():
        return {}
    try:
        return {
            str(place): {"mean": float(figures["mean"]), "std": float(figures["std"])}
            for place, figures in json.loads(path.read_text(encoding="utf-8")).items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {error}); it holds what the run's reward is normalised "
            "by. Remove it, and a resumed run takes the figures from its checkpoint or measures them again."
        ) from error
