"""The protocol every reward follows, and the kinds of reward that are made of settings or of a frozen network."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nemo_aligner_diffusion.errors import RewardError
from nemo_aligner_diffusion.rewards.settings import NetworkSettings, RewardSettings

logger = logging.getLogger(__name__)

_Self = TypeVar("_Self", bound="Reward")


class Reward(nn.Module, ABC):
    """A frozen, differentiable judge of pictures.

    ``reward(images, prompts)`` takes images ``(B, 3, H, W)``, floating point, in ``[0, 1]``, and ``B`` prompts, and
    gives ``(B,)`` scores, higher is better, in float32 (float64 where the reward computes in it), differentiable in the
    images. Values outside ``[0, 1]`` are scored as they are, and a score that comes out NaN or infinite is returned so:
    what to do then is the caller's decision. Autocast is off inside: a reward computes in its own dtype.

    Parameters never require a gradient and the module stays in evaluation mode. A subclass implements :meth:`score` and
    sets ``name``; a reward of several parts overrides :meth:`scores` instead.
    """

    name: str = "reward"
    measures: bool = True  # else no figure is made of its scores

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
        with torch.autocast(images.device.type, enabled=False):
            score = wide(self.score(images, prompts))
        return score, {self.name: score}

    def freeze(self: _Self) -> _Self:
        """Switch off gradients and training mode; constructors end with it."""
        self.requires_grad_(False)
        return self.eval()

    def train(self: _Self, mode: bool = True) -> _Self:
        """Stays in evaluation mode: a trainer that calls ``train()`` on everything must not switch dropout on here."""
        return super().train(False)


class FunctionReward(Reward):
    """``settings.score(images, prompts)``, in float32 or the images' float64."""

    def __init__(self, settings: RewardSettings) -> None:
        super().__init__()
        self.settings: Any = settings
        self.name, self.measures = settings.name, settings.measures
        self.freeze()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        score: Tensor = self.settings.score(wide(images), prompts)
        return score


class ModelReward(Reward):
    """A reward with a frozen network.

    Args:
        model: the network; frozen in place.
        tokenizer: of a network that reads prompts.
        max_length: tokens a prompt may have, both ends included; longer ones are truncated, and counted.
        micro_batch_size: pictures per forward pass; all at once when left out.
        activation_checkpointing: recompute the network in the backward pass, one micro-batch at a time, so that its
            memory doesn't grow with the number of pictures.

    Attributes:
        text_rows: what was made of prompts.
        truncated_prompts: how many were too long so far.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        max_length: int = 0,
        micro_batch_size: int | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.micro_batch_size = micro_batch_size
        self.activation_checkpointing = activation_checkpointing
        self.text_rows = TextRows()
        self.truncated_prompts = 0
        self.freeze()

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    def in_micro_batches(self, function: Callable[..., Tensor], *batched: Tensor) -> Tensor:
        """``function(*batched)`` of tensors ``(B, …)``, which treats each row by itself and without randomness."""
        run = function
        if self.activation_checkpointing and torch.is_grad_enabled() and any(given.requires_grad for given in batched):
            # Without randomness the generator's state need not be kept.
            run = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
        size = max(len(batched[0]), 1) if self.micro_batch_size is None else self.micro_batch_size
        with torch.autocast(self.device.type, enabled=False):
            pieces = zip(*(given.split(size) for given in batched), strict=True)
            return torch.cat([run(*piece) for piece in pieces])

    def tokenized(self, prompt: str, **options: Any) -> Any:
        """What the tokenizer makes of a prompt, at most ``max_length`` tokens; ``options`` are the tokenizer's."""
        if len(self.tokenizer(prompt).input_ids) > self.max_length:
            self.truncated_prompts += 1
            if str(self.truncated_prompts).rstrip("0") == "1":  # the 1st, 10th, 100th, …: a count, not a flood
                logger.warning(
                    "%d prompt(s) so far are longer than the reward's %d tokens and were truncated; the latest: %.80r",
                    self.truncated_prompts,
                    self.max_length,
                    prompt,
                )
        return self.tokenizer(prompt, truncation=True, max_length=self.max_length, **options)

    def _apply(self: Any, fn: Callable[..., Any], recurse: bool = True) -> Any:
        self.text_rows.clear()  # they stay behind on the old device, in the old dtype
        return super()._apply(fn, recurse)


class NetworkReward(ModelReward):
    """``settings.score(self, images, *rows)`` with a frozen network, in micro-batches and its own dtype.

    Attributes:
        settings: see :class:`.settings.NetworkSettings`.
        processor: what it does to a picture first; ``(B, 3, H, W)`` in ``[0, 1]`` to its input.
    """

    def __init__(self, settings: NetworkSettings, model: Any, processor: Any, tokenizer: Any = None) -> None:
        super().__init__(
            model,
            tokenizer,
            max_length=model.config.text_config.max_position_embeddings if tokenizer is not None else 0,
            micro_batch_size=settings.micro_batch_size,
            activation_checkpointing=settings.activation_checkpointing,
        )
        self.settings = settings
        self.name = settings.name
        self.processor = processor
        settings.setup(self)

    def pixels(self, images: Tensor) -> Tensor:
        """The network's input, of pictures ``(B, 3, H, W)`` in ``[0, 1]``."""
        pixels: Tensor = self.processor(images)
        return pixels.to(self.dtype)

    def tokens(self, prompt: str) -> Any:
        """A prompt as the text model's keyword arguments, padded to its length."""
        return self.tokenized(prompt, padding="max_length", return_tensors="pt").to(self.device)

    def rows(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """What :meth:`.NetworkSettings.embed` makes of the prompts, ``(B, D)``; nothing of one that reads none."""
        if self.tokenizer is None:
            return ()
        return (self.text_rows(partial(self.settings.embed, self), self.settings.texts(prompts), self.device),)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.in_micro_batches(partial(self.settings.score, self), images.to(self.device), *self.rows(prompts))


class TextRows:
    """What is made of each prompt, without gradient, computed once; the ``size`` latest are kept."""

    def __init__(self, size: int = 4096) -> None:
        self.size = size
        self._rows: dict[str, Tensor] = {}

    def __call__(self, embed: Callable[[str], Tensor], prompts: Sequence[str], device: torch.device) -> Tensor:
        """``(B, …)``; ``embed`` makes a row of a prompt, on ``device``."""
        rows: dict[str, Tensor] = {}
        # Inference mode is left, not only entered: its tensors, once kept, could never meet autograd again.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            for prompt in dict.fromkeys(prompts):
                # One at a time, which is cheap beside making a picture: in a batch the last digits would depend on the
                # neighbours, so on what happened to be kept, and a resumed run would differ from one that went on.
                kept = self._rows.pop(prompt, None)
                rows[prompt] = embed(prompt) if kept is None else kept
        self._rows |= rows
        for oldest in list(self._rows)[: -self.size]:
            del self._rows[oldest]
        return torch.stack([rows[prompt] for prompt in prompts])

    def __len__(self) -> int:
        return len(self._rows)

    def clear(self) -> None:
        """Forget all: the weights changed, or moved to another device or dtype."""
        self._rows.clear()


def wide(values: Tensor) -> Tensor:
    """Float32 or float64: what came in half precision, for the few operations that follow."""
    return values if values.dtype == torch.float64 else values.float()


def unit_length(embeddings: Tensor) -> Tensor:
    """Rows of length 1, in float32 or float64: a half-precision norm would cost two digits of the score."""
    return functional.normalize(wide(embeddings), dim=-1)


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
