"""A pipeline's stochastic trajectory and the log-densities of its steps, drawn ones with gradient.

The pipeline's own loop under its taps (:mod:`~nemo_aligner_diffusion.diffusion.loop`). Latents carry no gradient from
step to step: a log-density depends on the weights through its own step's prediction alone. The network is recomputed in
the backward pass, so that memory does not grow with the number of drawn steps but by the latents that are held.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_aligner_diffusion.diffusion.loop import Loop
from nemo_aligner_diffusion.diffusion.plan import Plan, SamplingPath
from nemo_aligner_diffusion.diffusion.policy.transitions import Transitions
from nemo_aligner_diffusion.diffusion.schedule import KeyedNoise

if TYPE_CHECKING:
    from nemo_aligner_diffusion.diffusion.model import DiffusionModel

Choice = Callable[[Sequence[int], random.Random], Sequence[int]]  # steps that have a density -> those that are trained


@dataclass(frozen=True)
class PolicyRollout:
    """What one call of the pipeline leaves.

    Attributes:
        pictures: ``(B, 3, H, W)`` in [0, 1], without gradient; of a replay latents, of no use.
        log_densities: step → ``(B,)``; with gradient at the drawn steps. Of a replay these alone.
        drawn: the steps with gradient.
        latents: ``(B, T, …)``, ``z_1 … z_T``; ``None`` where they were not to be kept.
        network_calls: of the trained network.
    """

    pictures: Tensor
    log_densities: dict[int, Tensor]
    drawn: tuple[int, ...]
    latents: Tensor | None
    network_calls: int

    @property
    def trajectory_densities(self) -> Tensor:
        """``(B, T)`` without gradient; 0 at steps that have no density."""
        assert self.latents is not None
        none = torch.zeros_like(next(iter(self.log_densities.values())))
        steps = range(self.latents.shape[1])
        return torch.stack([self.log_densities.get(i, none).detach() for i in steps], 1)


def policy_rollout(
    model: DiffusionModel,
    generators: Sequence[torch.Generator],
    inputs: dict[str, Any],
    choose: Choice,
    rng: random.Random,
    *,
    noise_level: float | None = None,
    keep: bool = False,
    decode_rows: int | None = None,
    stored: Tensor | None = None,
) -> PolicyRollout:
    """Sample, or with ``stored`` go along a trajectory that was sampled before.

    Args:
        generators: one CPU generator a sample; all noise of a sample comes from its own.
        inputs: arguments of the pipeline's call (:meth:`.DiffusionModel.inputs`).
        choose: draws the steps whose log-density has a gradient, by ``rng``.
        noise_level: see :class:`.Transitions`.
        keep: the latents, for ``stored`` of a later call.
        decode_rows: pictures decoded at a time; ``None``: all.
        stored: ``(B, T, …)``: steps return these latents, nothing is decoded, and the network is called at drawn steps
            only (and once more where the first one is not drawn: an output is needed that is passed on). The
            generators must be as they were.

    Raises:
        ConfigurationError: the pipeline refused its arguments, or its scheduler's steps have no density.
    """
    loop = _PolicyLoop(model, generators, inputs, choose, rng, noise_level, decode_rows, stored)
    loop.keep = keep
    pictures = loop.run("train").detach()
    latents = torch.stack(loop.visited, 1) if keep else None
    return PolicyRollout(pictures, loop.log_densities, tuple(loop.plan.active), latents, loop.calls)


class _PolicyLoop(Loop):
    keep = False

    def __init__(
        self,
        model: DiffusionModel,
        generators: Sequence[torch.Generator],
        inputs: dict[str, Any],
        choose: Choice,
        rng: random.Random,
        noise_level: float | None,
        decode_rows: int | None,
        stored: Tensor | None,
    ) -> None:
        given = inputs if stored is None else {**inputs, "output_type": "latent"}
        super().__init__(model, generators, given, self._drawn, rng, False, 0, decode_rows)
        self.choose, self.noise_level, self.stored = choose, noise_level, stored
        self.visited: list[Tensor] = []
        self.log_densities: dict[int, Tensor] = {}

    @property
    def reads(self) -> bool:
        """No reward's gradient is taken: pictures are decoded without one."""
        return False

    def _drawn(self, path: SamplingPath, rng: random.Random) -> Plan:
        self.transitions = Transitions(self.scheduler, path.steps, self.noise_level)
        return Plan(active=tuple(sorted(self.choose(self.transitions.stochastic, rng))), cut=True)

    def _network(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if self.stored is not None and self.started and name in self.outputs and self.i not in self.active:
            return self.outputs[name]
        return super()._network(name, *args, **kwargs)

    def _real_step(self, i: int, bound: inspect.BoundArguments, prediction: Tensor, timestep: Any, z: Tensor) -> Any:
        z, plain, transitions = z.detach(), prediction.detach(), self.transitions
        bound.arguments.update(model_output=plain, sample=z)
        if transitions.draws_itself:
            bound.arguments["eta"] = transitions.noise_level
        with torch.no_grad():
            out = super()._real_step(i, bound, plain, timestep, z)  # a replay's, too: the scheduler counts its steps
            if self.stored is not None:
                out = self._returned(self.stored[:, i].to(out[0]).contiguous())
            elif transitions.deviations[i] and not transitions.draws_itself:
                mean = transitions.mean(i, z, plain)
                noise = KeyedNoise(self.generators).draw(mean.shape, mean)
                out = self._returned((mean + transitions.deviations[i] * noise).to(out[0].dtype))
        if i in self.active or (self.stored is None and transitions.deviations[i]):
            self.log_densities[i] = transitions.log_density(i, out[0], z, prediction)
        if self.keep:
            self.visited.append(out[0])
        torch.set_grad_enabled(False)  # until the next drawn step's network call
        return out
