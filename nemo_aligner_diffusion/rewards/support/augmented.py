"""A reward that sees perturbed pictures while training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_aligner_diffusion.rewards.augmentation import Augmentation
from nemo_aligner_diffusion.rewards.base import Reward, check_images
from nemo_aligner_diffusion.rewards.support.micro_batches import own_precision
from nemo_aligner_diffusion.rewards.support.sample_keys import current_keys


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
        self.name = reward.name
        self.freeze()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scores(images, prompts)[0]

    def scores(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        check_images(images, prompts)
        keys = current_keys(len(images))
        if keys is None or not self.augmentation.perturbs:
            return self.reward.scores(images, prompts)
        if images.dtype != torch.float64:
            images = images.float()
        views = []
        for view in range(self.augmentation.views):
            with own_precision(images.device.type):
                seen = self.augmentation(images, keys.generators(self.label, view))
            views.append(self.reward.scores(seen, prompts))
        score = torch.stack([view for view, _ in views]).mean(0)
        parts = {name: torch.stack([parts[name] for _, parts in views]).mean(0) for name in views[0][1]}
        return score, parts


def augmented(reward: Reward, augmentation: Augmentation, where: str = "rm") -> Reward:
    """``reward`` with its augmentation: itself, if nothing is switched on."""
    return AugmentedReward(reward, augmentation, where) if augmentation.perturbs else reward
