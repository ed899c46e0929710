"""A naive loop for any pipeline: its undecorated call with the gradient on, and two plain hooks. One graph, no tricks.

The network is hooked at its ``forward``, the scheduler at its ``step``; every network call and every step is really
made, nothing is recomputed, skipped or stored. Surrogates (LeapAlign, FlowBP) are written out again, from the papers.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from naive_loop import clean, levels_of, part, sg
from tiny.gradients import generators, reward
from torch import Tensor
from torch.utils._pytree import tree_map

from nemo_aligner_diffusion.algorithms.flowbp_lagrange import QuadratureLeaps
from nemo_aligner_diffusion.algorithms.leapalign import Leaps
from nemo_aligner_diffusion.diffusion.plan import Plan

Step = Callable[[int, Any, Callable[..., Any], Tensor, Tensor, Tensor], Tensor]


def tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return tree_map(lambda x: change(x) if isinstance(x, Tensor) and x.is_floating_point() else x, tree)


def picture(pipe: Any, network: Any, inputs: dict[str, Any], noise: list[torch.Generator], step: Step, plan: Plan,
            active: tuple[int, ...]) -> Tensor:  # fmt: skip
    """The pipeline's picture; ``step(i, scheduler, take, e, t, z)`` returns ``z_{i+1}``, ``take`` is the plain step."""
    own = pipe.scheduler
    scheduler = pipe.scheduler = copy.deepcopy(own)
    forward, plain_step, steps = network.forward, scheduler.step, [0]

    @functools.wraps(forward)
    def hooked_forward(*args: Any, **kwargs: Any) -> Any:
        kept = plan.input_share.get(steps[0], 0.0 if plan.cut else 1.0)
        args, kwargs = tensors((args, kwargs), lambda x: part(x, kept))
        out = forward(*args, **kwargs)
        return out if steps[0] in active else tensors(out, sg)

    @functools.wraps(plain_step)
    def hooked_step(e: Tensor, t: Tensor, z: Tensor, **kwargs: Any) -> Any:
        take = functools.partial(plain_step, **{**kwargs, "return_dict": True})
        result = step(steps[0], scheduler, take, e, t, z)
        steps[0] += 1
        return SimpleNamespace(prev_sample=result) if kwargs.get("return_dict", True) else (result,)

    network.forward, scheduler.step = hooked_forward, hooked_step
    call = type(pipe).__call__.__wrapped__
    try:
        return call(pipe, generator=noise, output_type="pt", return_dict=False, **inputs)[0]
    finally:
        del network.forward
        pipe.scheduler = own


def leap(plan: Leaps, scheduler: Any, z: list[Tensor], e: list[Tensor], start: int, end: int) -> Tensor:
    """``ẑ_end`` from ``z_start``: one step, or (FlowBP-Lagrange) the integral of the predictions' interpolant."""
    flow = type(scheduler).__name__.startswith("FlowMatch")
    levels = [*(levels_of(scheduler, i) for i in range(len(scheduler.timesteps))), (1.0, 0.0)]
    scale = [1.0 if flow else alpha for alpha, _ in levels]  # of a noise model, z/α moves by n d(σ/α)
    time = [sigma / s for (_, sigma), s in zip(levels, scale, strict=True)]

    def slope(i: int) -> Tensor:
        if scheduler.config.get("prediction_type") != "v_prediction":
            return e[i]
        (alpha, sigma), before = levels[i], z[i] if i == start else sg(z[i])
        return alpha * e[i] + sigma * before  # n of z = α x + σ n and v = α n − σ x

    if not isinstance(plan, QuadratureLeaps):
        return scale[end] * (z[start] / scale[start] + (time[end] - time[start]) * slope(start))
    most = max(plan.order - 1, 1)
    nodes = sorted({start + round(k * (end - start - 1) / most) for k in range(plan.order)})
    points, weights = np.polynomial.legendre.leggauss(8)  # exact up to degree 15
    half = (time[end] - time[start]) / 2
    moved = z[start] / scale[start]
    for i in nodes:
        basis = 1.0
        for j in nodes:
            if j != i:
                basis = basis * (time[start] + half * (1 + points) - time[j]) / (time[i] - time[j])
        moved = moved + float(half * (weights * basis).sum()) * part(slope(i), 1.0 if i == start else plan.second)
    return scale[end] * moved


def naive_loss(
    model: Any, plan: Plan, inputs: Callable[[], dict[str, Any]], kl_coeff: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``(loss, pictures of the first read)``; the KL in the predictions' own space."""
    pipe, network = model.pipe, model.denoiser
    z: list[Tensor] = []
    e: list[Tensor] = []
    misses: list[Tensor] = []
    divergences: list[Tensor] = []

    def trajectory(i: int, scheduler: Any, take: Callable[..., Any], prediction: Tensor, t: Tensor, now: Tensor) -> Any:
        if i == 0:
            z.append(now)
        e.append(prediction)
        if plan.stop is not None and i > plan.stop:
            return now
        prediction = e[i] = part(prediction, plan.gain.get(i, 1.0))
        before = copy.copy(scheduler)
        out = take(prediction, t, now)
        result = out.prev_sample
        if i == plan.stop:
            result = clean(before, i, now, prediction, getattr(out, "pred_original_sample", None))
        if isinstance(plan, Leaps) and i + 1 in (plan.j, len(scheduler.timesteps)):
            leapt = leap(plan, scheduler, z, e, plan.k if i + 1 == plan.j else plan.j, i + 1)
            misses.append((sg(leapt) - sg(result)).abs().flatten(1).mean(1).clamp(min=plan.tau))
            result = sg(result) + (leapt - sg(leapt))
        z.append(result)
        return result

    def frozen(path: list[Tensor], step: int, prediction: Tensor) -> None:
        """Adds the distance at ``step`` to the frozen model's guided prediction on the same latents."""
        seen: list[Tensor] = []

        def forced(i: int, scheduler: Any, take: Any, guided: Tensor, t: Tensor, now: Tensor) -> Tensor:
            seen.append(guided)
            take(guided, t, now)
            return sg(path[i + 1])

        with model.reference(), torch.no_grad():
            picture(pipe, network, inputs(), generators(), forced, Plan(()), ())
        divergences.append((prediction - seen[step]).square().mean())

    noise = generators()
    active = () if plan.renoise else plan.active
    pictures = [picture(pipe, network, inputs(), noise, trajectory, plan, active)]
    if kl_coeff and not plan.renoise:
        for i in active:
            frozen(z, i, e[i])
    if plan.renoise:
        last, finished, pictures = len(e) - 1, sg(z[-1]), []
        for _ in range(plan.renoise):
            n = torch.stack([torch.randn(finished.shape[1:], generator=g) for g in noise]).to(finished)
            path: list[Tensor] = []
            predictions: list[Tensor] = []

            def redo(i: int, scheduler: Any, take: Any, prediction: Tensor, t: Tensor, now: Tensor) -> Tensor:
                result = take(prediction, t, now).prev_sample
                if i == last - 1:
                    alpha, sigma = levels_of(scheduler, last)
                    result = alpha * finished + sigma * n  # noqa: B023 (called within this iteration)
                predictions.append(prediction)  # noqa: B023
                path.append(result)  # noqa: B023
                return result

            pictures.append(picture(pipe, network, inputs(), generators(), redo, Plan((last,)), (last,)))
            if kl_coeff:
                frozen([path[0], *path], last, predictions[last])
    rewards = torch.stack([reward(x) for x in pictures])
    loss = -(rewards / sum(misses) if misses else rewards).mean()
    return loss + (kl_coeff * torch.stack(divergences).mean() if divergences else 0.0), pictures[0]
