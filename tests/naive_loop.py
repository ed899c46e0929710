"""The naive definition of a reward's gradient: a sampling loop written out, one autograd graph, no tricks.

Networks are called as they are, steps are ``diffusers``' own ``scheduler.step``; of this project's code it reads a
plan's fields only.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from tiny.gradients import generators, reward
from torch import Tensor

from nemo_aligner_diffusion.diffusion.plan import Plan

PROMPTS = ["red", "sky"]
sg = torch.Tensor.detach


def part(tensor: Tensor, factor: float) -> Tensor:
    """``α x + (1 − α) sg[x]``, summed so that rounding leaves the value: solvers that step in float32 magnify it."""
    return sg(tensor) + factor * (tensor - sg(tensor))


class StableDiffusionParts:
    """The text encoder, the guided UNet and the decoder of a Stable Diffusion pipeline."""

    def __init__(self, pipe: Any, guidance: float) -> None:
        self.pipe, self.guidance = pipe, guidance
        self.network = pipe.unet
        self.text, self.empty = self.encode(PROMPTS), self.encode([""] * len(PROMPTS))

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        tokens = self.pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return self.pipe.text_encoder(tokens)[0]

    def predict(self, z: Tensor, t: Tensor) -> Tensor:
        if self.guidance <= 1:
            return self.network(z, t, encoder_hidden_states=self.text).sample
        out = self.network(torch.cat([z, z]), t, encoder_hidden_states=torch.cat([self.empty, self.text])).sample
        empty, text = out.chunk(2)
        return empty + self.guidance * (text - empty)

    def decode(self, z: Tensor) -> Tensor:
        return (self.pipe.vae.decode(z / self.pipe.vae.config.scaling_factor).sample * 0.5 + 0.5).clamp(0, 1)


class StableDiffusion3Parts(StableDiffusionParts):
    """The same of Stable Diffusion 3, a flow."""

    def __init__(self, pipe: Any, guidance: float) -> None:
        self.pipe, self.guidance = pipe, guidance
        self.network = pipe.transformer
        with torch.no_grad():
            text, empty, pooled, pooled_empty = pipe.encode_prompt(
                PROMPTS, None, None, do_classifier_free_guidance=True, max_sequence_length=8
            )
        self.text, self.pooled = torch.cat([empty, text]), torch.cat([pooled_empty, pooled])

    def predict(self, z: Tensor, t: Tensor) -> Tensor:
        both, times = torch.cat([z, z]), t.expand(2 * len(z))
        out = self.network(both, timestep=times, encoder_hidden_states=self.text, pooled_projections=self.pooled).sample
        empty, text = out.chunk(2)
        return empty + self.guidance * (text - empty)

    def decode(self, z: Tensor) -> Tensor:
        config = self.pipe.vae.config
        return (self.pipe.vae.decode(z / config.scaling_factor + config.shift_factor).sample * 0.5 + 0.5).clamp(0, 1)


@dataclass
class NaiveRun:
    """What the loop leaves: ``z_0 … z_T`` and ``e_i`` with their graph, pictures, the loss."""

    latents: list[Tensor]
    predictions: list[Tensor] = field(default_factory=list)
    pictures: list[Tensor] = field(default_factory=list)
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))


def levels_of(scheduler: Any, i: int) -> tuple[float, float]:
    """``(α, σ)`` of step ``i`` from the scheduler's own tables, in its own variable."""
    kind, t = type(scheduler).__name__, scheduler.timesteps[i]
    if kind.startswith("FlowMatch"):
        sigma = float(scheduler.sigmas[i])
        return 1 - sigma, sigma
    if kind == "EulerDiscreteScheduler":
        return 1.0, float(scheduler.sigmas[i])
    if kind in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        sigma = float(scheduler.sigmas[i])
        return 1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5
    cumulative = float(scheduler.alphas_cumprod[int(t)])
    return cumulative**0.5, (1 - cumulative) ** 0.5


def clean(scheduler: Any, i: int, z: Tensor, e: Tensor, own: Tensor | None) -> Tensor:
    """``Ẑ_i``: the scheduler's own where it gives one, else the textbook's formula."""
    alpha, sigma = levels_of(scheduler, i)
    if own is not None:
        return own
    if type(scheduler).__name__.startswith("FlowMatch"):
        return z - sigma * e
    if scheduler.config.prediction_type == "v_prediction":
        return alpha * z - sigma * e
    return (z - sigma * e) / alpha


def kl_factor(scheduler: Any, i: int, space: str | None) -> float:
    """Of a difference of predictions, when it is measured in ``space``."""
    alpha, sigma = levels_of(scheduler, i)
    if type(scheduler).__name__.startswith("FlowMatch"):
        return {"epsilon": 1 - sigma}.get(space or "velocity", 1.0)
    if type(scheduler).__name__ == "EulerDiscreteScheduler":
        alpha = 1 / (1 + sigma**2) ** 0.5
    if scheduler.config.prediction_type == "v_prediction":  # n = α v + σ z
        return alpha if (space or "epsilon") == "epsilon" else 1.0
    return 1 / alpha if space == "velocity" else 1.0  # v = (n − σ z) / α


def naive_run(
    model: Any, parts: Any, plan: Plan, steps: int, eta: float = 0.0, kl_coeff: float = 0.0, kl_space: str | None = None
) -> NaiveRun:
    noise = generators()
    scheduler = copy.deepcopy(parts.pipe.scheduler)
    scheduler.set_timesteps(steps)
    accepted = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {"generator": noise} if "generator" in accepted else {}
    options |= {"eta": eta} if eta else {}
    dtype = next(parts.network.parameters()).dtype
    first = torch.cat([torch.randn(1, 4, 4, 4, generator=g, dtype=dtype) for g in noise])
    run = NaiveRun([first * getattr(scheduler, "init_noise_sigma", 1.0)])
    divergences = []

    def predict(solver: Any, z: Tensor, t: Tensor) -> Tensor:
        return parts.predict(solver.scale_model_input(z, t) if hasattr(solver, "scale_model_input") else z, t)

    def supervised(solver: Any, i: int, z: Tensor, kept: float, gain: float) -> Tensor:
        t = solver.timesteps[i]
        e = predict(solver, part(z, kept), t)
        if kl_coeff:
            with model.reference(), torch.no_grad():
                trained, parts.network = parts.network, model.reference_denoiser or parts.network
                frozen = predict(solver, sg(z), t)
                parts.network = trained
            divergences.append(kl_factor(solver, i, kl_space) ** 2 * (e - frozen).square().mean())
        return part(e, gain)

    last = len(scheduler.timesteps) - 1
    active = plan.active if not plan.renoise else (last,) if plan.own_step else ()
    end: Tensor | None = None
    for i, t in enumerate(scheduler.timesteps):
        z = run.latents[i]
        if i in active:
            kept = plan.input_share.get(i, 0.0 if plan.cut else 1.0)
            e = supervised(scheduler, i, z, kept, plan.gain.get(i, 1.0))
        else:
            e = sg(predict(scheduler, z, t))
        run.predictions.append(e)
        out = scheduler.step(e, t, z, **options)
        if i == plan.stop:
            end = clean(scheduler, i, z, e, getattr(out, "pred_original_sample", None))
            break
        run.latents.append(out.prev_sample)
    ends = [run.latents[-1] if end is None else end]
    if plan.renoise:
        finished = sg(run.latents[-1])
        drawn = [  # in float32, after the trajectory's own noise
            torch.stack([torch.randn(4, 4, 4, generator=g) for g in noise]).to(dtype) for _ in range(plan.renoise)
        ]
        ends = ends if plan.own_step else []
        for n in drawn:
            alone = copy.deepcopy(parts.pipe.scheduler)  # no history: a multistep solver's step is of first order then
            alone.set_timesteps(steps)
            if hasattr(alone, "set_begin_index"):
                alone.set_begin_index(last)
            t = alone.timesteps[last]
            alpha, sigma = levels_of(alone, last)
            z = alpha * finished + sigma * n
            ends.append(alone.step(supervised(alone, last, z, 1.0, 1.0), t, z, **options).prev_sample)
    run.pictures = [parts.decode(end) for end in ends]
    run.loss = -torch.cat([reward(picture) for picture in run.pictures]).mean()
    if divergences:
        run.loss = run.loss + kl_coeff * torch.stack(divergences).mean()
    return run
