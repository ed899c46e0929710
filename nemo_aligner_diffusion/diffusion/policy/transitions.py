"""What a stochastic solver's step is as a distribution: ``p(z_{i+1} | z_i) = N(μ_i(z_i, e_i), s_i² I)``."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_aligner_diffusion.diffusion.schedule import untapped
from nemo_aligner_diffusion.errors import ConfigurationError

ETA = 1.0  # DDIM's η where none is given (Black et al., 2023)
FLOW_NOISE = 0.7  # a of a flow's SDE where none is given (Flow-GRPO's code)
DDIM, FLOW = "DDIMScheduler", "FlowMatchEulerDiscreteScheduler"


class Transitions:
    """The steps of a trajectory, by the scheduler's own numbers.

    DDIM with ``η > 0``: ``μ`` is the scheduler's own step without its noise, ``s = η·√variance``. A flow is sampled by
    the SDE with the marginals of its ODE (Flow-GRPO, arXiv 2505.05470, equation 9): with ``s̃ = a·√(σ/(1 − σ))`` and
    ``dt = σ_{i+1} − σ_i < 0``,

        ``μ = z·(1 + s̃²/(2σ)·dt) + e·(1 + s̃²·(1 − σ)/(2σ))·dt``,  ``s = s̃·√(−dt)``,

    where a level of ``σ = 1`` takes ``1 − σ`` of the next one, as the authors' code does.

    A step of ``s = 0`` has no density: the last one of DDIM where its final level is free of noise. The last step of a
    flow is Euler's here, so that no noise is left in the picture; the authors' code adds noise there, too, and leaves
    the step out of the loss, as here.

    Args:
        scheduler: its timesteps are set.
        steps: how many of them the pipeline visits, the last ones.
        noise_level: DDIM's ``η`` in (0, 1], or a flow's ``a`` > 0; ``None``: :data:`ETA`, :data:`FLOW_NOISE`.

    Attributes:
        deviations: ``s_0 … s_{T−1}``.
        draws_itself: the scheduler's own step adds the noise, given ``eta``.

    Raises:
        ConfigurationError: the density of this scheduler's steps is not known; says of which it is.
    """

    def __init__(self, scheduler: Any, steps: int, noise_level: float | None = None) -> None:
        kind = type(scheduler).__name__
        self.draws_itself = kind == DDIM
        altered = [name for name in ("invert_sigmas", "stochastic_sampling") if scheduler.config.get(name)]
        if kind not in (DDIM, FLOW) or altered:
            raise ConfigurationError(
                f"the steps of {kind}{''.join(f' with {name}' for name in altered)} have no density here, which a "
                f"policy gradient needs: expected model.infer.sampler_type=ddim, or a flow's own {FLOW}"
            )
        self.noise_level = (ETA if self.draws_itself else FLOW_NOISE) if noise_level is None else noise_level
        if self.draws_itself and self.noise_level > 1:
            raise ConfigurationError(
                f"a noise level of {self.noise_level:g} with {DDIM}, whose η it is: expected more than 0, at most 1"
            )
        self._scheduler = copy.deepcopy(untapped(scheduler))
        skipped = len(scheduler.timesteps) - steps
        self._timesteps = scheduler.timesteps[skipped:]
        if self.draws_itself:
            zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
            self.deviations: Sequence[float] = [float(self._ddim(i, zero, zero, one)) for i in range(steps)]
            return
        sigmas = [float(sigma) for sigma in scheduler.sigmas]
        self._flow = []  # σ, 1 − σ or what stands for it, dt
        for sigma, after in zip(sigmas[skipped:-1], sigmas[skipped + 1 :], strict=True):
            self._flow.append((sigma, 1 - (sigma if sigma < 1 - 1e-6 else sigmas[1]), after - sigma))
        spread = [self.noise_level * math.sqrt(s / rest) * math.sqrt(-dt) for s, rest, dt in self._flow]
        self.deviations = [*spread[:-1], 0.0]

    @property
    def stochastic(self) -> list[int]:
        """Steps that have a density."""
        return [i for i, deviation in enumerate(self.deviations) if deviation > 0]

    def mean(self, i: int, z: Tensor, e: Tensor) -> Tensor:
        """``μ_i``, at least float32, differentiable in both; of a step without a density where it ends."""
        z, e = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (z, e))
        if self.draws_itself:
            return self._ddim(i, z, e, torch.zeros_like(z))
        sigma, _, dt = self._flow[i]
        if not self.deviations[i]:
            return z + e * dt
        drift = self.deviations[i] ** 2 / (2 * sigma)  # s̃²·(−dt)/(2σ)
        return z * (1 - drift) + e * (dt - drift * (1 - sigma))

    def log_density(self, i: int, after: Tensor, z: Tensor, e: Tensor) -> Tensor:
        """``(B,)``: of ``z_{i+1} = after``, the mean over a latent's elements."""
        deviation = self.deviations[i]
        mean = self.mean(i, z, e)
        squares = ((after.to(mean.dtype) - mean) / deviation).square().flatten(1).mean(1)
        return -squares / 2 - math.log(deviation * math.sqrt(2 * math.pi))

    def _ddim(self, i: int, z: Tensor, e: Tensor, noise: Tensor) -> Tensor:
        step = self._scheduler.step
        after: Tensor = step(e, self._timesteps[i], z, eta=self.noise_level, variance_noise=noise, return_dict=False)[0]
        return after
