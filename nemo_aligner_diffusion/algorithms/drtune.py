"""DRTune: Wu et al., "Deep Reward Supervisions for Tuning Text-to-Image Diffusion Models", ECCV 2024, Algorithm 1."""

from __future__ import annotations

import random
from dataclasses import dataclass

from nemo_aligner_diffusion.algorithms.base import Method, setting
from nemo_aligner_diffusion.diffusion.plan import Plan, SamplingPath
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.settings import integer


@dataclass(frozen=True)
class DRTune(Method):
    """K evenly spaced steps, the network's input cut from the gradient; the reward reads Ẑ at a random late step.

    Deep supervision: the network's Jacobian is what makes deep backpropagation explode; the solver's own path is well
    conditioned, so early steps get a clean signal. The stop is ``r = T − u``, ``u`` uniform in ``{1, …, m}``; without
    early stop (``m = 0``) the reward reads ``z_T``. FlowBP's code (arXiv 2606.11075) reads ``Ẑ_{T−1}`` there; the rest
    is the same, and in both the stop step is among the supervised ones in some draws.
    """

    name = "drtune"
    title = "DRTune"
    source = "arXiv 2405.00760"

    train_steps: int = setting(
        4, integer(1), "K, evenly spaced steps that get a gradient; 1 … executed steps; published: 3 to 5"
    )
    early_stop_steps: int | None = setting(
        None,
        integer(0, nullable=True),
        "m: sampling ends u steps early, u uniform in 1 … m; 0: never; null: 40 % of the steps, about as published",
    )

    def most_early(self, steps: int) -> int:
        """``m`` of a trajectory of ``steps``."""
        return round(0.4 * steps) if self.early_stop_steps is None else self.early_stop_steps

    def check(self, steps: int) -> None:
        within, most = f"model.infer.inference_steps = {steps}", self.most_early(steps)
        if most > steps:
            raise ConfigurationError(
                f"{self.given('early_stop_steps')} is beyond {within}: expected 0 … {steps} "
                f"(about {round(0.4 * steps)} is usual)"
            )
        shortest = steps - most + 1 if most else steps
        if self.train_steps > shortest:
            if not most:
                raise ConfigurationError(f"{self.given('train_steps')} is beyond {within}: expected 1 … {steps}")
            usual = ", 40 % of the steps" if self.early_stop_steps is None else ""
            keys = self.keys()
            whole = f"{keys['early_stop_steps']}=0, " if self.train_steps <= steps else ""
            raise ConfigurationError(
                f"{self.given('train_steps')}, but of {steps} sampling steps early stopping (up to {most}{usual}: "
                f"{keys['early_stop_steps']}) may leave {shortest}: set {keys['train_steps']}={shortest}, {whole}or "
                "more model.infer.inference_steps"
            )

    def plan(self, path: SamplingPath, rng: random.Random) -> Plan:
        most = self.most_early(path.steps)
        stop = path.steps - rng.randint(1, most) if most else None
        last = path.steps - 1 if stop is None else stop
        stride = (last + 1) // self.train_steps
        offset = rng.randint(0, last - (self.train_steps - 1) * stride)
        active = tuple(offset + j * stride for j in range(self.train_steps))
        return Plan(active=active, cut=True, stop=stop)
