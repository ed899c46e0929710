"""DDPO: Black et al., "Training Diffusion Models with Reinforcement Learning", 2023, arXiv 2305.13301."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from nemo_aligner_diffusion.algorithms.base import OF_ROLLOUTS, TrainingMethod, setting
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.settings import Kind, choice, integer, number


@dataclass(frozen=True)
class DDPO(TrainingMethod):
    """A policy gradient: sampling is a chain of Gaussian steps, whose density is raised where the reward was good.

    The reward gives numbers and needs no gradient. Denoising is sampled with noise in each step, by DDIM with ``η > 0``
    or, of a flow, by the SDE of Flow-GRPO (arXiv 2505.05470); the importance ratio of each drawn step is clipped (PPO).
    """

    name = "ddpo"
    title = "DDPO"
    source = "arXiv 2305.13301"
    kind = "policy"
    ignored: ClassVar[tuple[str, ...]] = (
        "model.reward_scale", "model.reward_margin", "model.kl_coeff", "model.kl_space",
        "model.first_stage_config.activation_checkpointing", *OF_ROLLOUTS,
    )  # fmt: skip

    clip_range: float = setting(
        1e-4, Kind("float", low=0, high=1, open_low=True, open_high=True), "c: ratios are clipped to 1 − c … 1 + c"
    )
    inner_passes: int = setting(
        1, integer(1), "optimizer steps over each global batch of trajectories; their prompts count once"
    )
    step_share: float = setting(
        1.0,
        Kind("float", low=0, high=1, open_low=True),
        "share of the steps that are trained in each pass, drawn anew; in (0, 1], one step at least",
    )
    noise_level: float | None = setting(
        None,
        number(above=0, nullable=True),
        "noise of training's sampling: DDIM's η in (0, 1], a flow's a > 0; null: as published, 1 and 0.7",
    )
    statistics: str = setting(
        "batch", choice("batch", "prompt"), "a reward is compared with: the global batch, or its prompt's last rewards"
    )
    buffer: int = setting(16, integer(1), "rewards of each prompt that are remembered, with statistics=prompt")
    min_count: int = setting(
        16, integer(1), "with statistics=prompt: prompts seen less often are compared with the batch; at most buffer"
    )
    advantage_clip: float | None = setting(
        10.0, number(above=0, nullable=True), "advantages are cut at plus and minus this; null: not at all"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.statistics == "prompt" and self.min_count > self.buffer:
            raise ConfigurationError(
                f"{self.given('min_count')} with {self.given('buffer')}: no prompt would ever have so many rewards; "
                f"expected 1 … {self.buffer}"
            )

    def check(self, steps: int) -> None:
        self.check_at_least_two(steps)

    def drawn(self, stochastic: Sequence[int], rng: random.Random) -> list[int]:
        """Steps to train, of those that have a density."""
        return sorted(rng.sample(list(stochastic), max(1, round(self.step_share * len(stochastic)))))
