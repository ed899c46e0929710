"""Whatever scores, held to the protocol of a reward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nemo_aligner_diffusion.errors import RewardError
from nemo_aligner_diffusion.rewards.base import Reward, check_images, wide


class CustomReward(Reward):
    """A :class:`Reward`, an ``nn.Module`` or any callable ``(images, prompts) -> (B,)``, held to the protocol.

    Modules are frozen and moved along with the reward, also those that a plain object holds as attributes. Pictures
    come in float32 (or float64) with autocast off; what to compute in is the reward's own decision.

    Args:
        judge: what scores.
        origin: where it came from, for messages.
    """

    name = "custom"

    def __init__(self, judge: Callable[..., Any], origin: str = "the custom reward") -> None:
        super().__init__()
        if not callable(judge):
            raise RewardError(
                f"{origin} is a {type(judge).__name__}; expected a Reward, an nn.Module, or a callable "
                "(images, prompts) -> one score for each picture."
            )
        self.judge = judge
        self.origin = origin
        held = [] if isinstance(judge, nn.Module) else vars(judge).values() if hasattr(judge, "__dict__") else []
        self.held = nn.ModuleList(module for module in held if isinstance(module, nn.Module))
        self._checked_gradient = False
        self.freeze()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scores(images, prompts)[0]

    def scores(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        check_images(images, prompts)
        images = wide(images)
        parts: dict[str, Tensor] = {}
        with torch.autocast(images.device.type, enabled=False):
            if isinstance(self.judge, Reward):
                score, parts = self.judge.scores(images, prompts)
            else:
                score = self.judge(images, prompts)
        score = wide(self._checked(score, images))
        return score, parts if len(parts) > 1 else {self.name: score}

    def _checked(self, given: Any, images: Tensor) -> Tensor:
        """Scores as a tensor. Plain numbers are enough where no gradient is wanted: for DDPO, and to look at."""
        wanted = images.requires_grad and torch.is_grad_enabled()
        score = given
        if not isinstance(given, Tensor) and not wanted:
            with contextlib.suppress(TypeError, ValueError, RuntimeError):
                score = torch.as_tensor(given, dtype=images.dtype, device=images.device)
        if not isinstance(score, Tensor):
            more = ", with a gradient in the pictures; methods that need none, such as ddpo, take numbers" * wanted
            raise RewardError(f"{self.origin} gave a {type(given).__name__}; expected a tensor ({len(images)},){more}.")
        if score.shape != (len(images),) or not (score.is_floating_point() or not wanted):
            raise RewardError(
                f"{self.origin} gave {tuple(score.shape)} {score.dtype} for {len(images)} pictures; expected one "
                f"floating-point score for each, ({len(images)},)."
            )
        if not wanted:
            return score
        if not score.requires_grad:
            raise RewardError(self._without_gradient())
        if not self._checked_gradient:  # it may come from elsewhere than the pictures; one look is enough
            (gradient,) = torch.autograd.grad(score.sum(), images, retain_graph=True, allow_unused=True)
            if gradient is None:
                raise RewardError(self._without_gradient())
            self._checked_gradient = True
        return score

    def _without_gradient(self) -> str:
        return (
            f"{self.origin} gave scores without a gradient in the pictures, so there is nothing to train on. Something "
            "in it cuts the graph: torch.no_grad or inference_mode, .detach(), .item(), torch.tensor(…), a comparison, "
            "argmax, or a way through NumPy or PIL. Compute the score from the given images with torch operations, or "
            "take algorithm=ddpo, which needs no gradient."
        )
