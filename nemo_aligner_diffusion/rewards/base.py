"""The protocol every reward follows, and the two kinds of reward that are made of settings alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nemo_aligner_diffusion.errors import RewardError
from nemo_aligner_diffusion.rewards.settings import NetworkSettings, RewardSettings
from nemo_aligner_diffusion.rewards.support.micro_batches import in_micro_batches, own_precision
from nemo_aligner_diffusion.rewards.support.text_rows import TextRows, TruncationCounter

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
        score = wide(score)
        return score, {self.name: score}

    def freeze(self: _Self) -> _Self:
        """Switch off gradients and training mode; constructors end with it."""
        self.requires_grad_(False)
        return self.eval()

    def train(self: _Self, mode: bool = True) -> _Self:
        """Stays in evaluation mode: a trainer that calls ``train()`` on everything must not switch dropout on here."""
        return super().train(False)


class FunctionReward(Reward):
    """``settings.score(images, prompts)``, in float32 or the images' float64, whatever autocast is on."""

    def __init__(self, settings: RewardSettings) -> None:
        super().__init__()
        self.settings: Any = settings
        self.name = settings.name
        self.freeze()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        with own_precision(images.device.type):
            score: Tensor = self.settings.score(images if images.dtype == torch.float64 else images.float(), prompts)
            return score


class NetworkReward(Reward):
    """``settings.score(self, images, *rows)`` with a frozen network, in micro-batches and its own dtype.

    Attributes:
        settings: see :class:`.settings.NetworkSettings`.
        model: the network.
        processor: what it does to a picture first; ``(B, 3, H, W)`` in ``[0, 1]`` to its input.
        tokenizer: of a network that reads prompts.
    """

    def __init__(self, settings: NetworkSettings, model: Any, processor: Any, tokenizer: Any = None) -> None:
        super().__init__()
        self.settings = settings
        self.name = settings.name
        self.model = model
        self.processor = processor
        self.tokenizer = tokenizer
        self._rows = TextRows()
        if tokenizer is not None:
            self.truncated = TruncationCounter(model.config.text_config.max_position_embeddings)
        self.freeze()
        settings.setup(self)

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    def pixels(self, images: Tensor) -> Tensor:
        """The network's input, of pictures ``(B, 3, H, W)`` in ``[0, 1]``."""
        pixels: Tensor = self.processor(images)
        return pixels.to(self.dtype)

    def tokens(self, prompt: str) -> Any:
        """A prompt as the text model's keyword arguments, padded to its length; longer ones are cut, and counted."""
        longest = self.truncated.max_length
        tokens = self.tokenizer(prompt, padding="max_length", truncation=True, max_length=longest, return_tensors="pt")
        if bool(tokens.attention_mask.all()) and len(self.tokenizer(prompt).input_ids) > longest:
            self.truncated.count(prompt)
        return tokens.to(self.device)

    def rows(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """What :meth:`.NetworkSettings.embed` makes of the prompts, ``(B, D)``; nothing of one that reads none."""
        if self.tokenizer is None:
            return ()
        return (self._rows(partial(self.settings.embed, self), self.settings.texts(prompts), self.device.type),)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        with own_precision(self.device.type):
            return in_micro_batches(
                partial(self.settings.score, self),
                images.to(self.device),
                *self.rows(prompts),
                micro_batch_size=self.settings.micro_batch_size,
                activation_checkpointing=self.settings.activation_checkpointing,
            )

    def _apply(self: Any, fn: Callable[..., Any], recurse: bool = True) -> Any:
        self._rows.clear()  # they stay behind on the old device, in the old dtype
        return super()._apply(fn, recurse)


def wide(values: Tensor) -> Tensor:
    """Float32 or float64: what a network computed in half precision, for the few operations that follow."""
    return values if values.dtype == torch.float64 else values.float()


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
