"""AlignProp: Prabhudesai et al., "Aligning Text-to-Image Diffusion Models with Reward Backpropagation", 2023."""

from __future__ import annotations

import random
from dataclasses import dataclass
from statistics import NormalDist

from nemo_aligner_diffusion.algorithms.base import Method, setting
from nemo_aligner_diffusion.diffusion.plan import Plan, SamplingPath
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.settings import FRACTION, choice, integer, number


@dataclass(frozen=True)
class AlignProp(Method):
    """The last K steps are supervised, K drawn anew for each step of training; the reward reads the finished picture.

    The paper's section 4.2 draws ``K`` uniformly; the authors' code draws the first supervised step from
    Normal(42, 5), rounded down, of 50 steps, and draws again outside of the trajectory. Here the normal is given in
    shares of the steps, and truncated to the bounds of ``K``.
    """

    name = "alignprop"
    title = "AlignProp"
    source = "arXiv 2310.03739"

    min_truncation_steps: int = setting(1, integer(1), "least K; integer >= 1")
    max_truncation_steps: int | None = setting(
        None, integer(1, nullable=True), "greatest K; integer, null: inference_steps"
    )
    distribution: str = setting(
        "normal",
        choice("normal", "uniform"),
        "how K is drawn: normal, as the authors' code does, or uniform, as their paper",
    )
    mean: float = setting(
        0.84,
        FRACTION,
        "normal: where the supervised steps begin, as a share of the steps; in [0, 1); published: 42 of 50",
    )
    std: float = setting(0.1, number(above=0), "normal: its standard deviation, as a share; > 0; published: 5 of 50")

    def bounds(self, steps: int) -> tuple[int, int]:
        return self.min_truncation_steps, self.max_truncation_steps or steps

    def check(self, steps: int) -> None:
        least, most = self.bounds(steps)
        if not least <= most <= steps:
            raise ConfigurationError(
                f"{self.given('min_truncation_steps')}, max_truncation_steps = {most} do not fit "
                f"model.infer.inference_steps = {steps}: expected 1 <= min <= max <= {steps}"
            )

    def plan(self, path: SamplingPath, rng: random.Random) -> Plan:
        steps = path.steps
        least, most = self.bounds(steps)
        if self.distribution == "uniform":
            k = rng.randint(least, most)
        else:
            normal = NormalDist(self.mean * steps, self.std * steps)
            quantile = rng.uniform(normal.cdf(steps - most), normal.cdf(steps - least + 1))
            first = int(normal.inv_cdf(min(max(quantile, 1e-15), 1 - 1e-15)))
            k = min(max(steps - first, least), most)
        return Plan(active=tuple(range(steps - k, steps)))
