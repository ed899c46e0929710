"""How much better than usual a picture's reward is. Imports no torch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import fmean
from typing import Any


class Advantages:
    """``A = (R − mean)/(standard deviation + ε)``, over a global batch or over the last rewards of the same prompt.

    As in DDPO's code: ``ε = 1e-8`` over the batch and 1e-6 of a prompt; a prompt that has been seen fewer than
    ``min_count`` times is compared with the batch; a batch's own rewards are in its prompts' buffers before it is
    compared. It is the same under any layout, given the batch in the order of its samples.

    Args:
        buffer: rewards of each prompt that are remembered; ``None``: the statistics of the batch alone.
        min_count: see above.
        clip: bound of ``|A|``; ``None``: none.
    """

    def __init__(self, buffer: int | None = None, min_count: int = 16, clip: float | None = None) -> None:
        self.buffer, self.min_count, self.clip = buffer, min_count, clip
        self._rewards: dict[str, deque[float]] = {}

    def __call__(self, prompts: Sequence[str], rewards: Sequence[float]) -> list[float]:
        """Of a global batch. A reward that is not finite makes every advantage NaN, and is not remembered."""
        if not all(map(math.isfinite, rewards)):
            return [math.nan] * len(rewards)
        batch = (*moments(rewards), 1e-8 if self.buffer is None else 1e-6)
        of: dict[str, tuple[float, float, float]] = {}
        if self.buffer is not None:
            for prompt, reward in zip(prompts, rewards, strict=True):
                self._rewards.setdefault(prompt, deque(maxlen=self.buffer)).append(reward)
            for prompt in set(prompts):
                if len(self._rewards[prompt]) >= self.min_count:
                    of[prompt] = (*moments(self._rewards[prompt]), 1e-6)
        found = []
        for prompt, reward in zip(prompts, rewards, strict=True):
            mean, deviation, epsilon = of.get(prompt, batch)
            advantage = (reward - mean) / (deviation + epsilon)
            found.append(advantage if self.clip is None else min(max(advantage, -self.clip), self.clip))
        return found

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"rewards": [[prompt, list(rewards)] for prompt, rewards in self._rewards.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rewards = {prompt: deque(rewards, maxlen=self.buffer) for prompt, rewards in state["rewards"]}


def moments(values: Sequence[float] | deque[float]) -> tuple[float, float]:
    """Mean and standard deviation over the population."""
    mean = fmean(values)
    return mean, math.sqrt(fmean((value - mean) ** 2 for value in values))
