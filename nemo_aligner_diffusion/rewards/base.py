"""The protocol every reward follows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from nemo_aligner_diffusion.errors import RewardError

_Self = TypeVar("_Self", bound="Reward")


class Reward(nn.Module, ABC):
    """A frozen, differentiable judge of pictures.

    ``reward(images, prompts)`` takes images ``(B, 3, H, W)``, floating point, in ``[0, 1]``, and ``B`` prompts, and
    gives ``(B,)`` scores, higher is better, in float32 (float64 where the reward computes in it), differentiable in the
    images. Values outside ``[0, 1]`` are scored as they are, and a score that comes out NaN or infinite is returned so:
    what to do then is the caller's decision.

    Parameters never require a gradient and the module stays in evaluation mode. A subclass implements :meth:`score` and
    sets ``name``; a reward of several parts overrides :meth:`scores` instead.
    """

    name: str = "reward"

    @abstractmethod
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores ``(B,)`` of images ``(B, 3, H, W)`` that have been checked already."""

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scores(images, prompts)[0]

    def components(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Each part's own scores ``(B,)``, unweighted, by name; one entry for a reward of one part."""
        return self.scores(images, prompts)[1]

    def scores(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """``(forward, components)`` for the price of one evaluation.

        Raises:
            RewardError: the images are no float ``(B, 3, H, W)``, or there isn't one prompt for each.
        """
        check_images(images, prompts)
        score = self.score(images, prompts)
        score = score if score.dtype == torch.float64 else score.float()
        return score, {self.name: score}

    def freeze(self: _Self) -> _Self:
        """Switch off gradients and training mode; constructors end with it."""
        self.requires_grad_(False)
        return self.eval()

    def train(self: _Self, mode: bool = True) -> _Self:
        """Stays in evaluation mode: a trainer that calls ``train()`` on everything must not switch dropout on here."""
        return super().train(False)


def scores_of(reward: Reward, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """``reward.scores(images, prompts)``; of videos ``(B, F, 3, H, W)`` the mean over their frames."""
    if images.ndim == 4:
        return reward.scores(images, prompts)
    frames = images.shape[1]
    score, parts = reward.scores(images.flatten(0, 1), [prompt for prompt in prompts for _ in range(frames)])

    def mean(scores: Tensor) -> Tensor:
        return scores.unflatten(0, (-1, frames)).mean(1)

    return mean(score), {name: mean(part) for name, part in parts.items()}


def check_images(images: Tensor, prompts: Sequence[str]) -> None:
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        found = f"{tuple(images.shape)} {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise RewardError(f"A reward needs float images (B, 3, H, W) in [0, 1], not {found}.")
    if isinstance(prompts, str) or len(prompts) != images.shape[0]:
        given = "one string" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise RewardError(
            f"A reward needs a list with one prompt per image: {given} given for {images.shape[0]} images."
        )
