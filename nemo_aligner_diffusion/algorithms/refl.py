"""ReFL: Xu et al., "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation", 2023."""

from __future__ import annotations

import random
from dataclasses import dataclass

from nemo_aligner_diffusion.algorithms.base import Method, setting
from nemo_aligner_diffusion.diffusion.plan import Plan, SamplingPath
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.settings import Kind


@dataclass(frozen=True)
class ReFL(Method):
    """One random late step r is supervised (Algorithm 1); the reward reads its clean estimate Ẑ_r.

    Its loss is ``λ·mean(relu(margin − R))`` (``model.reward_margin``). The authors' settings, margin 2 and scale 1e-3
    without guidance, are the recipe ``refl_imagereward_sd``; their denoising loss on real pictures is not built.
    """

    name = "refl"
    title = "ReFL"
    source = "arXiv 2304.05977"

    window: tuple[int, int] | None = setting(
        None,
        Kind("ints", low=0, length=2, nullable=True),
        "[first, last] step the reward may read, counted from 0; null: the last quarter of the steps (30 … 39 of 40)",
    )

    def check(self, steps: int) -> None:
        if self.window is not None and not self.window[0] <= self.window[1] < steps:
            first, last = self.window
            raise ConfigurationError(
                f"{self.keys()['window']} = [{first}, {last}] does not fit model.infer.inference_steps = {steps}: "
                f"expected [first, last] with 0 <= first <= last <= {steps - 1}"
            )

    def plan(self, path: SamplingPath, rng: random.Random) -> Plan:
        late = (min(-(-3 * path.steps // 4), path.steps - 1), path.steps - 1)
        stop = rng.randint(*(self.window or late))
        return Plan(active=(stop,), stop=stop)
