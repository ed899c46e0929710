"""DRTune: Wu et al., "Deep Reward Supervisions for Tuning Text-to-Image Diffusion Models", ECCV 2024, Algorithm 1."""

from __future__ import annotations

import random
from dataclasses import dataclass

from nemo_aligner_diffusion.algorithms.reward_tuning import RewardTuning
from nemo_aligner_diffusion.diffusion.plan import Plan


@dataclass(frozen=True)
class SpacedSteps:
    """``K`` evenly spaced train steps of a trajectory that stops early, the network's input cut off.

    Attributes:
        train_steps: ``K``, at least 1 and at most the number of executed steps.
        early_stop_steps: ``m``: the stop is ``r = T − u``, ``u`` uniform in ``{1, …, m}``; 0: no early stop, the reward
            reads ``z_T``.
    """

    train_steps: int
    early_stop_steps: int

    def __call__(self, path, rng: random.Random) -> Plan:
        steps = path.steps
        stop = steps - rng.randint(1, self.early_stop_steps) if self.early_stop_steps else None
        last = steps - 1 if stop is None else stop
        stride = (last + 1) // self.train_steps
        offset = rng.randint(0, last - (self.train_steps - 1) * stride)
        active = tuple(offset + j * stride for j in range(self.train_steps))
        return Plan(active=active, cut=True, stop=stop)


class DRTune(RewardTuning):
    """Deep supervision by stopping the gradient of the denoiser's *input*: early steps get a clean signal."""
