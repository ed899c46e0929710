"""A reward's gradient through a ``diffusers`` pipeline: one rollout, scored, with what is left to differentiate.

A picture in training is, to the last bit, what ``pipeline(prompt, generator=[…])`` gives; the gradient is exactly that
of the naive graph; and no family has code here or in :mod:`.loop`, which runs the pipeline.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.profiler import record_function

from nemo_aligner_diffusion.diffusion.loop import Loop, Mode
from nemo_aligner_diffusion.diffusion.plan import Plan, PlanRule
from nemo_aligner_diffusion.errors import AlignerError, ConfigurationError, first_line

if TYPE_CHECKING:
    from nemo_aligner_diffusion.diffusion.model import DiffusionModel

# pictures (b, 3, H, W) or frames (b, F, 3, H, W) in [0, 1], rows of the batch, number of the read -> loss of each row
Objective = Callable[[Tensor, slice, int], Tensor]


@dataclass(frozen=True)
class Rollout:
    """What :func:`rollout` leaves to be differentiated; the rewards' and the decoder's graph is gone already.

    Attributes:
        ends: latents that were decoded, with the trajectory's graph, one for each call of ``decode``.
        gradients: of the mean loss with respect to them, same shapes.
        divergence: mean over active steps, batch and elements of the squared distance of the guided predictions to the
            frozen model's at the same latents (DRaFT+, design notes 3.3), with gradient; ``None`` without a reference.
        plan: what was drawn.
        steps: ``T``.
        network_calls: of trained networks, those of the reference not counted.
    """

    ends: list[Tensor]
    gradients: list[Tensor]
    divergence: Tensor | None
    plan: Plan
    steps: int
    network_calls: int

    def surrogate(self, divergence_weight: float = 0.0) -> Tensor:
        """A scalar whose gradient is that of the loss (its value is not); for ``backward()``, which
        ``torch.autograd.grad`` cannot replace where calls are recomputed."""
        pairs = zip(self.ends, self.gradients, strict=True)
        total = torch.stack([(end.to(g.dtype) * g).sum() for end, g in pairs]).sum()
        return total if self.divergence is None else total + divergence_weight * self.divergence


def rollout(
    model: DiffusionModel,
    rule: PlanRule,
    generators: Sequence[torch.Generator],
    inputs: dict[str, Any],
    objective: Objective,
    *,
    rng: random.Random | None = None,
    reference: bool = False,
    kl_space: str | None = None,
    decode_rows: int | None = None,
    gradient_scale: float = 1.0,
    kept_steps: int | None = 0,
) -> Rollout:
    """Run the pipeline with the gradient that a plan asks for, score its pictures, take the reward's gradient.

    Args:
        rule: draws the plan when the number of steps is known.
        generators: one CPU generator a sample; all noise of a sample comes from its own.
        inputs: arguments of the pipeline's call (:meth:`.DiffusionModel.inputs`).
        objective: the loss of each row; their mean over rows and reads is minimised.
        rng: the rule's random source.
        reference: measure the divergence from the frozen model.
        kl_space: where: see :meth:`.SchedulerPath.prediction_scale`.
        decode_rows: pictures decoded and scored at a time; ``None``: all. Fewer need less memory and one more forward
            pass of the decoder.
        gradient_scale: the objective is scaled by this, a power of two, and its gradient back, against underflow in
            float16.
        kept_steps: the last so many active steps keep their activations, ``None``: all of them (the naive graph); the
            others hold latents only, and their network calls are made again in the backward pass.

    Raises:
        ConfigurationError: the pipeline refused its arguments, or cannot be trained so; by name.
    """
    loop = Loop(model, generators, inputs, rule, rng or random.Random(0), reference, kept_steps, decode_rows)
    ends: list[Tensor] = []
    gradients: list[Tensor] = []
    divergences: list[Tensor] = []
    reads = itertools.count()

    def supervise(mode: Mode) -> None:
        images = loop.run(mode)
        if loop.leaves:
            of, weights = loop.plan.network_reads, loop.sample_weights
            gradients.extend(
                reward_gradient(images, loop.leaves, objective, weights, next(reads), of, decode_rows, gradient_scale)
            )
            ends.extend(loop.ends)
        loop.convert_back()
        if loop.guided:
            loop.run("replay")
            for i, prediction in loop.guided.items():
                scale = loop.path.prediction_scale(i, kl_space)
                divergences.append(scale**2 * (prediction - loop.frozen[i]).square().mean())

    supervise("train")
    if loop.plan.renoise:
        for noise in loop.noises_after(loop.plan.renoise):
            loop.redo = noise
            supervise("last step")
    divergence = torch.stack(divergences).mean() if divergences else None
    return Rollout(ends, gradients, divergence, loop.plan, loop.total, loop.calls)


@torch.no_grad()
def sample(
    model: DiffusionModel,
    generators: Sequence[torch.Generator],
    inputs: dict[str, Any],
    tuned_weights: Callable[[int], Sequence[float]] | None = None,
    decode_rows: int | None = None,
    as_in_training: bool = False,
) -> Tensor:
    """Pictures ``(B, 3, H, W)`` (or frames ``(B, F, 3, H, W)``) in [0, 1] without gradient.

    Args:
        tuned_weights: annealed importance guidance (design notes 3.4): ``T`` → ``w_0 … w_{T−1}``; the denoiser's
            outputs are ``w_i·tuned + (1 − w_i)·base``. ``None``: the model as it stands.
        as_in_training: decoded as the reward sees them there (``model.first_stage_config``).
    """
    rng = random.Random(0)
    loop = Loop(model, generators, inputs, None, rng, False, 0, decode_rows, tuned_weights, as_in_training)
    return loop.run("sample")


@torch.no_grad()
def sample_with_latents(
    model: DiffusionModel, generators: Sequence[torch.Generator], inputs: dict[str, Any], decode_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`sample`, and the finished latents ``(B, …)`` as the network is handed them."""
    loop = Loop(model, generators, inputs, None, random.Random(0), False, 0, decode_rows)
    return loop.run("sample"), loop.sample.detach()


def check_repeatable(model: DiffusionModel, inputs: dict[str, Any]) -> None:
    """Make a picture twice from the same seeds, in two steps.

    Raises:
        ConfigurationError: they differ: the gradient of a step that is made again would be another picture's; or the
            pipeline fails with these arguments.
    """
    inputs = {**inputs, "num_inference_steps": 2}
    generators = [torch.Generator().manual_seed(i) for i in range(len(inputs["prompt"]))]
    try:
        first, again = (sample(model, generators, inputs).float() for _ in range(2))
    except (AlignerError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # somewhere in the pipeline: sizes, numbers of prompts or frames that it cannot take
        given = {name: value for name, value in inputs.items() if name not in ("prompt", "num_inference_steps")}
        raise ConfigurationError(
            f"{type(model.pipe).__name__} makes no picture of {len(generators)} prompts with {given}: "
            f"{type(error).__name__}: {first_line(error)}; change model.infer, model.pipeline.arguments or "
            f"model.micro_batch_size"
        ) from error
    if first.ndim not in (4, 5) or first.shape[-3] != 3:
        raise ConfigurationError(
            f"{type(model.pipe).__name__} gives {tuple(first.shape)}; expected pictures (B, 3, H, W), or frames of a "
            f"video (B, F, 3, H, W)"
        )
    least, most = (float(x) for x in first.nan_to_num().aminmax())
    if least < -0.01 or most > 1.01:
        raise ConfigurationError(
            f"{type(model.pipe).__name__} gives pictures in [{least:.2g}, {most:.2g}] as output_type='pt'; "
            f"expected [0, 1]"
        )
    if not torch.allclose(first, again, rtol=0, atol=1e-2, equal_nan=True):
        raise ConfigurationError(
            f"{type(model.pipe).__name__} makes two pictures from the same seeds that differ by "
            f"{float((first - again).abs().max()):.2g}: it keeps something from call to call, or draws noise of its "
            f"own; switch that off by model.pipeline.arguments"
        )


def distance_of_training(model: DiffusionModel, inputs: dict[str, Any]) -> tuple[float, float]:
    """How far the pictures that the reward sees in training are from the pipeline's own, in [0, 1]: mean and most.

    Raises:
        ConfigurationError: they are of another size: the small decoder is not for these latents.
    """
    inputs = {**inputs, "num_inference_steps": 2}
    generators = [torch.Generator().manual_seed(i) for i in range(len(inputs["prompt"]))]
    plain, seen = (sample(model, generators, inputs, as_in_training=decoder).float() for decoder in (False, True))
    if plain.shape != seen.shape:
        raise ConfigurationError(
            f"{model.decoder.given('small_decoder')}: makes pictures {tuple(seen.shape)} of latents of which the "
            f"pipeline's makes {tuple(plain.shape)}; expected a small decoder that was made for this model's latents"
        )
    far = (plain - seen).abs()
    return float(far.mean()), float(far.max())


def reward_gradient(
    images: Tensor,
    leaves: list[Tensor],
    objective: Objective,
    weights: Tensor | None,
    read: int,
    reads: int,
    rows_at_a_time: int | None,
    scale: float,
) -> list[Tensor]:
    """``∂/∂leaf`` of the mean loss for each leaf; at least float32."""
    batch = images.shape[0]
    size = rows_at_a_time or batch
    share_of_mean = scale / (batch * reads)

    def loss_of(part: Tensor, rows: slice) -> Tensor:
        losses = objective(part, rows, read)
        return (losses if weights is None else losses * weights[rows].to(losses)).sum() * share_of_mean

    with torch.enable_grad():
        if size >= batch:
            outputs, upstream = loss_of(images, slice(0, batch)), None
        else:  # the reward's graph of some rows at a time; the decoder's is recomputed by rows
            parts = []
            for start in range(0, batch, size):
                rows = slice(start, min(start + size, batch))
                part = images[rows].detach().requires_grad_()
                parts.append(torch.autograd.grad(loss_of(part, rows), part)[0])
            outputs, upstream = images, torch.cat(parts)
        with record_function("reward gradient"):
            # what else was decoded, such as sound, is no part of the picture
            found = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True, materialize_grads=True)
    return [gradient.to(torch.promote_types(gradient.dtype, torch.float32)) / scale for gradient in found]
