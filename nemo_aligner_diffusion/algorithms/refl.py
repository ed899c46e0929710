"""ReFL: Xu et al., "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation", 2023."""

from __future__ import annotations

import random
from dataclasses import dataclass

from nemo_aligner_diffusion.algorithms.reward_tuning import RewardTuning
from nemo_aligner_diffusion.diffusion.plan import Plan


@dataclass(frozen=True)
class OneLateStep:
    """Algorithm 1: stop at a random late step ``r`` and supervise that step alone, through ``Ẑ_r``.

    Attributes:
        min_step, max_step: the window of ``r``, both included, in steps of the sampler counted from pure noise
            (the paper: 30 to 39 of 40).
    """

    min_step: int
    max_step: int

    def __call__(self, path, rng: random.Random) -> Plan:
        stop = rng.randint(self.min_step, self.max_step)
        return Plan(active=(stop,), stop=stop)


class ReFL(RewardTuning):
    """One-step reward feedback; its loss is ``λ·mean(relu(margin − R))`` (``model.reward_margin``)."""
