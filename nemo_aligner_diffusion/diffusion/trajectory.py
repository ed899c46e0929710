"""One sampled trajectory, and what of it carries gradient.

All direct-gradient methods (DRaFT, DRaFT-K, DRaFT-LV, DRaFT+, AlignProp, ReFL, DRTune) are a :class:`Plan` over the
same trajectory. The trajectory holds latents, never network activations: an active step's network call is recomputed
in its own backward pass, so activation memory does not grow with the number of active steps, and the forward pass
runs without gradient throughout, at inference speed. The gradient is exactly that of the naive graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemo_aligner_diffusion.diffusion.guidance import Predictor
from nemo_aligner_diffusion.diffusion.sampler import Sampler

NoiseSource = Callable[[], Tensor]  # a fresh standard normal tensor, shaped like the latents


@dataclass(frozen=True)
class Plan:
    """Which steps of a trajectory are supervised, and where the reward looks.

    Attributes:
        active: steps ``i`` (sampler order, 0 is pure noise) whose network call carries gradient to the parameters.
        cut: call the network on ``sg[z_i]`` at active steps. The gradient then reaches earlier steps only through
            the solver's own dependence on ``z_i``, never through the network's Jacobian (DRTune).
        stop: the reward reads the clean estimate ``Ẑ_stop`` and the trajectory ends there; ``None``: it reads ``z_T``.
        renoise: instead of the trajectory's own last step, noise the finished ``z_T`` this many times to the level of
            the last step and supervise that one step from each (DRaFT-LV); 0: off.
    """

    active: tuple[int, ...]
    cut: bool = False
    stop: int | None = None
    renoise: int = 0


@dataclass(frozen=True)
class Trajectory:
    """The outcome of :func:`run_trajectory`.

    Attributes:
        reads: the latents ``(B, C, h, w)`` that the reward looks at; one entry, or ``renoise`` of them.
        divergence: mean squared distance of the active steps' predictions to the frozen model's at the same latents,
            a scalar with gradient (DRaFT+ KL, design notes 3.3); ``None`` without a reference.
        network_calls: guided network calls made (forward, the reference's not counted).
    """

    reads: list[Tensor]
    divergence: Tensor | None
    network_calls: int


def run_trajectory(
    predict: Predictor,
    sampler: Sampler,
    plan: Plan,
    noise: NoiseSource,
    *,
    reference: Predictor | None = None,
    recompute: bool = True,
) -> Trajectory:
    """Sample with the gradient that ``plan`` asks for.

    Args:
        predict: guided prediction ``e_i`` of the model being trained.
        sampler: the solver; its ``len`` is the number of network calls ``T``.
        plan: see :class:`Plan`.
        noise: gives ``z_0 / initial_scale`` first, then whatever noise the solver and the plan need, in order.
        reference: guided prediction of the frozen model; ``None`` costs no call.
        recompute: hold latents only and recompute active calls in the backward pass. ``False`` keeps every active
            step's activations (the naive graph: more memory, one forward pass per active step less).

    Returns:
        latents for the reward, and the divergence from the reference; to be differentiated by ``backward()``, which
        ``torch.autograd.grad`` cannot replace where calls are recomputed.
    """
    total = len(sampler)
    last = total - 1 if plan.stop is None else plan.stop
    _check(plan, total, last)
    divergences: list[Tensor] = []

    def supervised(latents: Tensor, i: int) -> Tensor:
        network_input, timestep = sampler.network_input(i, latents), sampler.timesteps[i]
        if recompute:
            # Reentrant: each call has a backward pass of its own, which adds to the parameters' gradients. In one pass
            # through all calls autograd would sum every parameter's gradient beside what `grad` holds already, and
            # whole where FSDP2 shards it, until the earliest call has added its share.
            prediction = checkpoint(_call, predict, network_input, timestep, handle, use_reentrant=True)
        else:
            prediction = predict(network_input, timestep)
        if reference is not None:
            with torch.no_grad():
                frozen = reference(network_input.detach(), timestep)
            divergences.append((prediction - frozen).square().mean())
        return prediction

    handle = torch.empty(0, requires_grad=True)  # for checkpoints: one input must have a gradient, and latents may not
    active = frozenset(plan.active) if not plan.renoise else frozenset()
    latents = [sampler.initial_scale * noise()]
    predictions: list[Tensor] = []
    for i in range(last + 1):
        z = latents[i]
        if i in active:
            prediction = supervised(z.detach() if plan.cut else z, i)
        else:
            with torch.no_grad():
                prediction = predict(sampler.network_input(i, z), sampler.timesteps[i])
        predictions.append(prediction)
        if i == plan.stop:
            read = sampler.clean_estimate(i, z, prediction)
        else:
            read = sampler.step(i, latents, predictions, noise() if sampler.steps[i].noise else None)
            latents.append(read)
    reads = [read]

    if plan.renoise:
        reads = []
        for _ in range(plan.renoise):
            noised = sampler.renoise(read, noise())
            injected = noise() if sampler.steps[-1].noise else None
            reads.append(sampler.last_step_alone(noised, supervised(noised, total - 1), injected))

    divergence = torch.stack(divergences).mean() if divergences else None
    return Trajectory(reads, divergence, network_calls=last + 1 + plan.renoise)


def reward_gradient(
    reads: Sequence[Tensor],
    decode: Callable[[Tensor], Tensor],
    objective: Callable[[Tensor, slice], Tensor],
    micro_batch_size: int | None = None,
) -> list[Tensor]:
    """``∂/∂read`` of the sum of ``objective(decode(read))``, with the decoder's and reward's graph freed on return.

    This is what keeps the decoder's activations and the denoiser's from ever being alive together.

    Args:
        reads: latents ``(B, C, h, w)``; their own graphs are left alone.
        decode: latents to images ``(b, 3, H, W)`` in [0, 1].
        objective: ``(images, rows) -> scalar`` contribution to the loss of those rows of the batch.
        micro_batch_size: rows decoded and scored at a time; ``None``: all.

    Returns:
        one gradient per read, same shape and dtype.
    """
    gradients = []
    for read in reads:
        size = micro_batch_size or read.shape[0]
        parts = []
        for start in range(0, read.shape[0], size):
            rows = slice(start, min(start + size, read.shape[0]))
            leaf = read[rows].detach().requires_grad_()
            with torch.enable_grad():
                loss = objective(decode(leaf), rows)
            parts.append(torch.autograd.grad(loss, leaf)[0])
        gradients.append(torch.cat(parts))
    return gradients


def _call(predict: Predictor, network_input: Tensor, timestep: Tensor, _: Tensor) -> Tensor:
    return predict(network_input, timestep)


def _check(plan: Plan, total: int, last: int) -> None:
    if not 0 <= last < total:
        raise ValueError(f"plan stops at step {last}, but the sampler has steps 0…{total - 1}")
    outside = [i for i in plan.active if not 0 <= i <= last]
    if outside or not plan.active:
        raise ValueError(f"active steps must lie in 0…{last} and be at least one, got {plan.active}")
    if plan.renoise and plan.stop is not None:
        raise ValueError("a plan that re-noises z_T cannot also stop early")
