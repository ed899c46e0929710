"""A reward that sees perturbed pictures while training, and which samples its random numbers are for.

It must draw the same numbers for a sample under any layout (devices, micro-batches) and after any resume, as the
sampler's noise does (:mod:`~nemo_aligner_diffusion.diffusion.noise`). The training step says around each scoring call
which samples it holds; without that (validation, evaluation, a call by hand) a reward is free of randomness.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_aligner_diffusion.diffusion.noise import key_to_seed
from nemo_aligner_diffusion.errors import RewardError
from nemo_aligner_diffusion.rewards.augmentation import Augmentation
from nemo_aligner_diffusion.rewards.base import Reward, check_images, wide


@dataclass(frozen=True)
class SampleKeys:
    """The samples of one scoring call.

    Attributes:
        seed: the run's.
        step: optimizer steps done.
        indices: global index of each picture of the call, in order.
        draw: tells apart the calls that score a sample more than once in a step (DRaFT-LV).
    """

    seed: int
    step: int
    indices: tuple[int, ...]
    draw: int = 0

    def generators(self, *purpose: int | str) -> list[torch.Generator]:
        """A CPU generator for each picture; the same one for the same keys and purpose, anywhere."""
        return [
            torch.Generator().manual_seed(key_to_seed("reward", self.seed, self.step, index, self.draw, *purpose))
            for index in self.indices
        ]


_CURRENT: ContextVar[SampleKeys | None] = ContextVar("nemo_aligner_diffusion_sample_keys", default=None)


@contextlib.contextmanager
def scoring_samples(keys: SampleKeys) -> Iterator[None]:
    """Within, :func:`current_keys` gives ``keys``."""
    token = _CURRENT.set(keys)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current_keys(pictures: int) -> SampleKeys | None:
    """The keys of the ``pictures`` being scored, or ``None`` where nothing random is wanted.

    Raises:
        RewardError: the keys are for another number of pictures.
    """
    keys = _CURRENT.get()
    if keys is not None and len(keys.indices) != pictures:
        raise RewardError(
            f"A reward was given {pictures} pictures where the training step announced {len(keys.indices)}: a reward "
            "that calls another must pass on the whole batch."
        )
    return keys


class AugmentedReward(Reward):
    """A reward that sees perturbed pictures while training, and the pictures as they are otherwise.

    Args:
        reward: judges the perturbed pictures; the score and the components are means over the views.
        augmentation: what is done to them.
        label: tells the random numbers of several augmented rewards of a run apart; its place in the configuration.
    """

    def __init__(self, reward: Reward, augmentation: Augmentation, label: str = "rm") -> None:
        super().__init__()
        self.reward = reward
        self.augmentation = augmentation
        self.label = label
        self.name, self.measures = reward.name, reward.measures
        self.freeze()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scores(images, prompts)[0]

    def scores(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        check_images(images, prompts)
        keys = current_keys(len(images))
        if keys is None:
            return self.reward.scores(images, prompts)
        views = []
        for view in range(self.augmentation.views):
            with torch.autocast(images.device.type, enabled=False):
                seen = self.augmentation(wide(images), keys.generators(self.label, view))
            views.append(self.reward.scores(seen, prompts))
        score = torch.stack([view for view, _ in views]).mean(0)
        parts = {name: torch.stack([parts[name] for _, parts in views]).mean(0) for name in views[0][1]}
        return score, parts


def augmented(reward: Reward, augmentation: Augmentation, where: str = "rm") -> Reward:
    """``reward`` with its augmentation: itself, if nothing is switched on."""
    return AugmentedReward(reward, augmentation, where) if augmentation.perturbs else reward
