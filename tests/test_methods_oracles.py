"""LeapAlign and FlowBP against their definitions, written out on a toy trajectory in float64 (design notes, 3.6)."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nemo_aligner_diffusion import DRTune, FlowBPBridge, FlowBPLagrange, FlowBPSparse, LeapAlign
from nemo_aligner_diffusion.algorithms.flowbp_lagrange import integrals, supports
from nemo_aligner_diffusion.diffusion.plan import Plan

STEPS = 7
SG = torch.Tensor.detach


class Path:
    """A flow with uneven noise levels under Euler, or an ε-model under DDIM: both ``z_{i+1} = α' Ẑ + σ' n``."""

    def __init__(self, flow: bool, steps: int = STEPS) -> None:
        self.flow, self.steps = flow, steps
        sigma = [1 - (i / steps) ** 1.3 for i in range(steps + 1)]
        if not flow:
            sigma = [0.99 * s for s in sigma]
        self.levels = [(1 - s if flow else (1 - s * s) ** 0.5, s) for s in sigma]
        self.weights = []
        for i in range(steps):  # a_i, and what the later steps do to it
            (a0, s0), (a1, s1) = self.levels[i], self.levels[i + 1]
            weight = s1 - s0 if flow else s1 - a1 * s0 / a0
            later = 1.0 if flow else self.levels[-1][0] / a1
            self.weights.append(weight * later)

    def clean(self, step: int, latents: Tensor, prediction: Tensor) -> Tensor:
        alpha, sigma = self.levels[step]
        return latents - sigma * prediction if self.flow else (latents - sigma * prediction) / alpha

    def noise(self, step: int, latents: Tensor, prediction: Tensor) -> Tensor:
        alpha, _ = self.levels[step]
        return latents + alpha * prediction if self.flow else prediction

    def step(self, i: int, z: Tensor, e: Tensor) -> Tensor:
        alpha, sigma = self.levels[i + 1]
        return alpha * self.clean(i, z, e) + sigma * self.noise(i, z, e)


@dataclass
class Trace:
    path: Path
    latents: list[Tensor] = field(default_factory=list)
    predictions: dict[int, Tensor] = field(default_factory=dict)

    @staticmethod
    def connect(estimate: Tensor, value: Tensor) -> Tensor:
        return estimate + SG(value - estimate)

    @staticmethod
    def share(tensor: Tensor, factor: float) -> Tensor:
        return factor * tensor + (1 - factor) * SG(tensor)


class Toy:
    """A network of two layers, ``(B, 2, 3)`` latents."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.first, self.second, self.start = (
            torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((7, 9), (9, 6), (3, 2, 3))
        )
        self.parameters = [self.first.requires_grad_(), self.second.requires_grad_()]

    def __call__(self, z: Tensor, i: int) -> Tensor:
        time = torch.full((len(z), 1), i / STEPS, dtype=z.dtype)
        hidden = torch.tanh(torch.cat([z.flatten(1), time], 1) @ self.first * 0.4)
        return (hidden @ self.second).reshape(z.shape)

    def gradient(self, ends: Tensor, weights: Tensor | float = 1.0) -> Tensor:
        rewards = (ends.sin() * ends).flatten(1).sum(1) + ends.flatten(1).prod(1)
        return torch.cat([g.flatten() for g in torch.autograd.grad((rewards * weights).mean(), self.parameters)])

    def sampled(self, path: Path) -> tuple[list[Tensor], list[Tensor]]:
        """``z_0 … z_T`` and ``e_0 … e_{T−1}`` without gradient."""
        z, e = [self.start], []
        with torch.no_grad():
            for i in range(path.steps):
                e.append(self(z[i], i))
                z.append(path.step(i, z[i], e[i]))
        return z, e


def carried_out(toy: Toy, path: Path, plan: Plan) -> Tensor:
    """What a loop that honours the plan's contract gives: the gradient of the weighted mean reward."""
    trace = Trace(path, [toy.start])
    for i in range(path.steps):
        z = trace.latents[i]
        kept = plan.input_share.get(i, 0.0 if plan.cut else 1.0)
        e = toy(trace.share(z, kept), i)
        trace.predictions[i] = trace.share(e, plan.gain.get(i, 1.0)) if i in plan.active else SG(e)
        solved = path.step(i, z, trace.predictions[i])
        after: Any = plan.carry(i + 1, solved, trace)
        torch.testing.assert_close(after, solved, rtol=1e-13, atol=1e-13)
        trace.latents.append(after)
    weights = plan.sample_weights(trace)
    if weights is not None:
        assert weights.shape == (len(toy.start),)
        assert not weights.requires_grad
    return toy.gradient(trace.latents[-1], 1.0 if weights is None else weights)


def distance(a: Tensor, b: Tensor, tau: float) -> Tensor:
    return SG(a - b).abs().mean((1, 2)).clamp(min=tau)


def sparse(toy: Toy, path: Path, plan: Plan, method: FlowBPSparse) -> Tensor:
    """``ẑ_T = sg[z_T] + ρ·Σ_{i∈A} a_i (e_i − sg[e_i])``."""
    z, _ = toy.sampled(path)
    total, active = sum(map(abs, path.weights)), sum(abs(path.weights[i]) for i in plan.active)
    rho = 1 + method.compensation * (total / active - 1)
    end = z[-1].clone()
    for i in plan.active:
        e = toy(SG(z[i]), i)
        end = end + rho * path.weights[i] * (e - SG(e))
    return toy.gradient(end)


def bridge(toy: Toy, path: Path, plan: Plan, method: FlowBPBridge) -> Tensor:
    z, _ = toy.sampled(path)
    (j,) = plan.input_share
    total, active = sum(map(abs, path.weights)), sum(abs(path.weights[i]) for i in plan.active)
    rho = 1 + method.compensation * (total / active - 1)
    onward = 1.0 if path.flow else path.levels[-1][0] / path.levels[j][0]  # ∂z_T/∂z_j through the solver alone

    def moved(e: Tensor, i: int) -> Tensor:
        return rho * path.weights[i] * (e - SG(e))

    z_j = z[j] + sum(moved(toy(SG(z[i]), i), i) for i in plan.active if i < j) / onward
    seen = method.share * z_j + (1 - method.share) * SG(z_j)
    end = SG(z[-1]) + onward * (z_j - SG(z_j)) + moved(toy(seen, j), j)
    return toy.gradient(end + sum(moved(toy(SG(z[i]), i), i) for i in plan.active if i > j))


def ddim(path: Path, z: Tensor, e: Tensor, start: int, end: int) -> Tensor:
    (a0, s0), (a1, s1) = path.levels[start], path.levels[end]
    return z + (s1 - s0) * e if path.flow else a1 * (z - s0 * e) / a0 + s1 * e


def leapalign(toy: Toy, path: Path, plan: Any, method: LeapAlign) -> Tensor:
    z, _ = toy.sampled(path)
    k, j = plan.active
    z_j = ddim(path, z[k], toy(z[k], k), k, j)
    weight = distance(z_j, z[j], method.tau)
    z_j = z_j + SG(z[j] - z_j)
    end = ddim(path, z_j, toy(method.share * z_j + (1 - method.share) * SG(z_j), j), j, path.steps)
    weight = 1 / (weight + distance(end, z[-1], method.tau))
    return toy.gradient(end + SG(z[-1] - end), weight)


def lagrange(toy: Toy, path: Path, plan: Any, method: FlowBPLagrange) -> Tensor:
    """Integrals of the interpolant by solving for its coefficients, not by its basis polynomials."""
    z, e = toy.sampled(path)
    k, j = plan.k, plan.j
    place = [s if path.flow else s / a for a, s in path.levels]
    scale = [1.0 if path.flow else a for a, _ in path.levels]

    def leap(z_start: Tensor, e_start: Tensor, start: int, end: int) -> Tensor:
        on = supports(start, end, method.order)
        values = [e_start]
        for count, i in enumerate(on[1:]):
            again = toy(SG(z[i]), i)
            values.append(SG(e[i]) + (method.support_gain * (again - SG(again)) if count == 0 else 0))
        powers = np.vander([place[i] for i in on], increasing=True)
        ends = [(place[end] ** (p + 1) - place[start] ** (p + 1)) / (p + 1) for p in range(len(on))]
        weights = np.linalg.solve(powers.T, ends)
        return scale[end] * (z_start / scale[start] + sum(float(w) * v for w, v in zip(weights, values, strict=True)))

    z_j = leap(z[k], toy(z[k], k), k, j)
    weight = distance(z_j, z[j], method.tau)
    z_j = z_j + SG(z[j] - z_j)
    end = leap(z_j, toy(method.share * z_j + (1 - method.share) * SG(z_j), j), j, path.steps)
    weight = 1 / (weight + distance(end, z[-1], method.tau))
    return toy.gradient(end + SG(z[-1] - end), weight)


METHODS: list[tuple[Any, Any]] = [
    (FlowBPSparse(train_steps=3), sparse),
    (FlowBPSparse(train_steps=2, compensation=0), sparse),
    (FlowBPBridge(train_steps=4, compensation=0.5, late_bias=1), bridge),
    (FlowBPBridge(train_steps=2, share=0.0), bridge),
    (LeapAlign(tau=0.01), leapalign),
    (LeapAlign(tau=50.0, share=1.0), leapalign),
    (FlowBPLagrange(tau=0.001), lagrange),
    (FlowBPLagrange(order=4, support_gain=1.0, most_after=1.0, share=0.6), lagrange),
    (FlowBPLagrange(order=1), lagrange),
]


@pytest.mark.parametrize("flow", [True, False])
@pytest.mark.parametrize(("method", "written_out"), METHODS)
def test_the_gradient_is_that_of_the_written_out_definition(method: Any, written_out: Any, flow: bool) -> None:
    path = Path(flow)
    for seed in range(12):
        toy = Toy()
        plan = method.plan(path, random.Random(seed))
        expected = written_out(toy, path, plan, method)
        got = carried_out(toy, path, plan)
        assert float((got - expected).norm() / expected.norm()) < 1e-9, plan


def test_what_is_known_of_special_cases() -> None:
    path, toy = Path(True), Toy()
    everything = carried_out(toy, path, Plan(active=tuple(range(STEPS)), cut=True))
    sparse_all = FlowBPSparse(train_steps=STEPS).plan(path, random.Random(0))
    assert torch.allclose(carried_out(toy, path, sparse_all), everything)
    drtune = DRTune(train_steps=STEPS, early_stop_steps=0).plan(path, random.Random(0))
    assert torch.allclose(carried_out(toy, path, drtune), everything)
    one = FlowBPLagrange(order=1, share=0.3, tau=0.1, most_after=1.0)
    plan = one.plan(path, random.Random(3))
    leaps = LeapAlign().plan(path, _Draws((plan.k, plan.j)))  # of order one the interpolant is the first prediction
    assert torch.allclose(carried_out(toy, path, plan), carried_out(toy, path, leaps), rtol=1e-12)


class _Draws(random.Random):
    def __new__(cls, drawn: tuple[int, ...]) -> Any:
        return super().__new__(cls)

    def __init__(self, drawn: tuple[int, ...]) -> None:
        self.drawn = drawn

    def sample(self, population: Any, k: int, *, counts: Any = None) -> list[int]:
        return list(self.drawn)


def test_without_signal_at_the_first_step_lagrange_begins_with_ddim() -> None:
    """Zero terminal SNR: ``σ/α`` is infinite at ``z_0``, and the estimate needs a model that predicts v."""

    class VPath(Path):
        def __init__(self) -> None:
            super().__init__(flow=False)
            self.levels[0] = (0.0, 1.0)

        def clean(self, step: int, latents: Tensor, prediction: Tensor) -> Tensor:
            alpha, sigma = self.levels[step]
            return alpha * latents - sigma * prediction

        def noise(self, step: int, latents: Tensor, prediction: Tensor) -> Tensor:
            alpha, sigma = self.levels[step]
            return sigma * latents + alpha * prediction

    path = VPath()
    plans = [FlowBPLagrange().plan(path, random.Random(seed)) for seed in range(30)]
    assert any(plan.active[0] == 0 for plan in plans)
    for plan in plans:
        assert carried_out(Toy(), path, plan).isfinite().all()


def test_lagrange_on_a_path_that_is_at_a_level_twice() -> None:
    """As PNDM is, Stable Diffusion 1.5's own solver."""
    path = Path(flow=False)
    path.levels[1] = path.levels[2]
    for seed in range(30):
        assert carried_out(Toy(), path, FlowBPLagrange().plan(path, random.Random(seed))).isfinite().all()


def test_lagrange_integrals_are_exact_for_polynomials() -> None:
    nodes = [0.93, 0.8, 0.55, 0.41]
    weights = integrals(nodes, nodes[0], 0.3)
    assert sum(weights) == pytest.approx(0.3 - 0.93, abs=1e-14)
    for power in range(4):
        exact = (0.3 ** (power + 1) - 0.93 ** (power + 1)) / (power + 1)
        assert sum(w * x**power for w, x in zip(weights, nodes, strict=True)) == pytest.approx(exact, abs=1e-13)


def test_supports_are_evenly_spaced_from_the_first() -> None:
    assert supports(3, 4, 3) == [3]
    assert supports(3, 5, 3) == [3, 4]
    assert supports(2, 12, 3) == [2, 6, 11]
    assert supports(2, 12, 1) == [2]
    assert supports(0, 3, 9) == [0, 1, 2]
