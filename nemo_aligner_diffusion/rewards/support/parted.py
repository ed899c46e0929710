"""A reward of several: each part's score, brought to a scale and kept within bounds, and logged raw."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nemo_aligner_diffusion.errors import CheckpointError, RewardError
from nemo_aligner_diffusion.rewards.base import Reward, check_images
from nemo_aligner_diffusion.rewards.parts import BY_BASE, PartedSettings, Shaping

logger = logging.getLogger(__name__)

STATISTICS_FILE = "reward_normalization.json"  # in a run directory: what known_statistics gives
# Settings on which a picture's score does not depend, but for rounding; random changes are for training alone.
_BESIDE_THE_SCORE = {"augment", "precision", "micro_batch_size", "activation_checkpointing"}


class PartedReward(Reward):
    """A reward out of several; its settings say how they are combined.

    :meth:`components` gives the parts' own scores, raw, under the names given here (a part that has several components
    itself adds ``name/component``). A NaN in a part of weight 0 stays visible there and in the sum.

    Args:
        settings: a composite's or an ensemble's.
        rewards: the parts, by name.
        label: this reward's place in the configuration, by which measured statistics are kept.
    """

    def __init__(self, settings: PartedSettings, rewards: Mapping[str, Reward], label: str = "rm") -> None:
        super().__init__()
        self.settings = settings
        self.name = settings.name
        self.label = label
        self.parts = tuple(rewards)
        # A list, not a ModuleDict: part names are the user's and may hold dots.
        self.rewards = nn.ModuleList(rewards.values())
        self.statistics: dict[str, tuple[float, float]] = {
            name: part.shaping.normalize
            for name, part in settings.members.items()
            if isinstance(part.shaping.normalize, tuple)
        }
        self.freeze()

    def part(self, name: str) -> Reward:
        reward = self.rewards[self.parts.index(name)]
        assert isinstance(reward, Reward)
        return reward

    def place(self, name: str) -> str:
        """A part's place in the configuration, such as ``rm.parts.clip``."""
        return f"{self.label}.parts.{name}"

    def unmeasured(self) -> list[str]:
        """Parts that are to be normalised by the base model's pictures and are not yet."""
        return [name for name in self._by_base() if name not in self.statistics]

    def measured(self) -> dict[str, dict[str, Any]]:
        """What was measured, by place: ``mean``, ``std``, and ``of``, which tells what reward it was."""
        known = {name: self.statistics[name] for name in self._by_base() if name in self.statistics}
        return {
            self.place(name): {"mean": mean, "std": std, "of": self._identity(name)}
            for name, (mean, std) in known.items()
        }

    def take(self, statistics: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on with what :meth:`measured` gave; of another reward than is in the place now, it is left out."""
        for name in self._by_base():
            place, figures = self.place(name), statistics.get(self.place(name))
            if figures is None:
                continue
            if figures.get("of", self._identity(name)) != self._identity(name):
                logger.warning(
                    "%s: its scale was measured of a reward with other settings; those figures are not used", place
                )
                continue
            mean, std = float(figures["mean"]), float(figures["std"])
            Shaping(normalize=(mean, std)).check(place)
            self.statistics[name] = (mean, std)

    def _by_base(self) -> list[str]:
        return [name for name, part in self.settings.members.items() if part.shaping.normalize == BY_BASE]

    def _identity(self, name: str) -> str:
        """Changes when a part's settings do, as far as its scores depend on them."""
        return hashlib.sha256(repr(_scored_by(self.settings.members[name].reward)).encode()).hexdigest()[:16]

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scores(images, prompts)[0]

    def scores(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        check_images(images, prompts)
        check_measured(self)
        components: dict[str, Tensor] = {}
        shaped: list[Tensor] = []
        for name in self.parts:
            score, inner = self.part(name).scores(images, prompts)
            components[name] = score
            if len(inner) > 1:
                components.update({f"{name}/{key}": value for key, value in inner.items()})
            if name in self.statistics:
                mean, std = self.statistics[name]
                score = (score - mean) / std
            shaped.append(self.settings.members[name].shaping.bounded(score))
        return self.settings.combine(shaped), components


def _scored_by(value: Any) -> Any:
    """Settings as plain values without those beside the score; of a reward made in Python, what it is."""
    if isinstance(value, Mapping):
        return {key: _scored_by(below) for key, below in value.items()}
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if field.name not in _BESIDE_THE_SCORE]
        return type(value).__name__, {name: _scored_by(getattr(value, name)) for name in names}
    return type(value).__name__ if isinstance(value, nn.Module) else value


def parted_rewards(reward: nn.Module) -> list[PartedReward]:
    """All rewards of several parts in ``reward``, inner ones first: an outer part's figures depend on them."""
    return [module for module in reward.modules() if isinstance(module, PartedReward)][::-1]


def known_statistics(reward: nn.Module) -> dict[str, dict[str, Any]]:
    """What was measured: ``{place: {"mean": …, "std": …, "of": …}}``; :func:`apply_statistics` takes it back."""
    return {place: figures for parted in parted_rewards(reward) for place, figures in parted.measured().items()}


def check_measured(reward: nn.Module) -> None:
    """Raises :class:`RewardError` where a part is to be normalised by figures that are not there."""
    for parted in parted_rewards(reward):
        for name in parted.unmeasured():
            raise RewardError(
                f"{parted.place(name)}.normalize is base: the mean and standard deviation over the base model's "
                "pictures are not known here. A training run measures them before its first step and keeps them in its "
                f"{STATISTICS_FILE}; elsewhere give {{mean: …, std: …}}."
            )


def apply_statistics(reward: nn.Module, statistics: Mapping[str, Mapping[str, Any]]) -> None:
    """Set what :func:`known_statistics` gave; places that the reward does not have are left out.

    Raises:
        ConfigurationError: a figure is impossible.
    """
    for parted in parted_rewards(reward):
        parted.take(statistics)


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


def read_statistics(run_dir: Path) -> dict[str, dict[str, Any]]:
    """What a run recorded for :func:`apply_statistics`; ``{}`` where it recorded nothing.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = Path(run_dir) / STATISTICS_FILE
    if not path.is_file():
        return {}
    try:
        return {
            str(place): {**figures, "mean": float(figures["mean"]), "std": float(figures["std"])}
            for place, figures in json.loads(path.read_text(encoding="utf-8")).items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {error}); it holds what the run's reward is normalised "
            "by. Remove it, and a resumed run takes the figures from its checkpoint or measures them again."
        ) from error
