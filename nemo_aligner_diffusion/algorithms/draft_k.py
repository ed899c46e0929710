"""DRaFT-K: Clark et al., "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", ICLR 2024, section 4.1."""

from __future__ import annotations

import random
from dataclasses import dataclass

from nemo_aligner_diffusion.algorithms.base import Method, setting
from nemo_aligner_diffusion.diffusion.plan import Plan, SamplingPath
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.settings import choice, integer

TRUNCATION_STEPS = "model.truncation_steps"  # NeMo-Aligner's key
TRUNCATION_MEANING = "K, last steps that get a gradient; 1 … inference_steps"


@dataclass(frozen=True)
class DRaFTK(Method):
    """The last K steps are supervised; the reward reads the finished picture.

    ``read = x0`` scores the clean estimate of the last step instead, as NeMo-Aligner's code does. For the last step of
    DDIM the two differ by ᾱ_0 alone, for other solvers by more.
    """

    name = "draft_k"
    title = "DRaFT-K"
    source = "arXiv 2309.17400"

    truncation_steps: int = setting(1, integer(1), TRUNCATION_MEANING, key=TRUNCATION_STEPS)
    read: str = setting(
        "z_T",
        choice("z_T", "x0"),
        "what is decoded and scored: z_T, the finished latent, or x0, its last clean estimate",
    )

    def check(self, steps: int) -> None:
        if self.truncation_steps > steps:
            raise ConfigurationError(
                f"{self.given('truncation_steps')} is beyond model.infer.inference_steps = {steps}: "
                f"expected 1 … {steps}"
            )

    def plan(self, path: SamplingPath, rng: random.Random) -> Plan:
        steps = path.steps
        return Plan(
            active=tuple(range(steps - self.truncation_steps, steps)), stop=steps - 1 if self.read == "x0" else None
        )
