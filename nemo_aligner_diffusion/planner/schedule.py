"""How often an optimizer step of a method needs each phase; averages over the draws of its plan."""

from __future__ import annotations

import random
from dataclasses import dataclass
from statistics import fmean

import diffusers

from nemo_aligner_diffusion.algorithms.base import Method
from nemo_aligner_diffusion.diffusion.model import default_steps
from nemo_aligner_diffusion.diffusion.plan import Plan
from nemo_aligner_diffusion.diffusion.schedule import build_scheduler, path_of
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.planner.presets import DEFAULT_SCHEDULER, ModelSpec
from nemo_aligner_diffusion.training.settings import RunSettings

DRAWS = 400  # plans averaged over


@dataclass(frozen=True)
class StepCounts:
    """Per micro-batch, on average.

    Attributes:
        network_calls: guided calls without gradient: every executed step, active ones included (their activations are
            recomputed later).
        references: calls of the frozen model (KL).
        replays: active steps, recomputed and differentiated.
        reads: latents that are decoded and scored.
        plan: the draw with the most active steps: what memory is planned for.
    """

    network_calls: float
    references: float
    replays: float
    reads: float
    plan: Plan


def step_counts(run: RunSettings, spec: ModelSpec | None = None, draw: random.Random | None = None) -> StepCounts:
    """Of ``model.algorithm`` with its settings.

    Args:
        spec: whose scheduler makes the steps, where ``model.infer.sampler_type`` names none; ``None``: DDIM.
        draw: what one plan is drawn from; ``None``: averages over :data:`DRAWS` of them.
    """
    kind, config = DEFAULT_SCHEDULER if spec is None else spec.scheduler
    scheduler = build_scheduler(getattr(diffusers, kind).from_config(config), run.model.infer.sampler_type)
    steps = run.model.infer.inference_steps
    if steps is None:
        steps = default_steps(getattr(diffusers, "StableDiffusionPipeline" if spec is None else spec.pipeline))
    method, path = run.method(), path_of(scheduler, steps)
    if not isinstance(method, Method):
        raise ConfigurationError(
            f"{run.model.given('algorithm')}: nad-plan counts the calls of direct-gradient methods alone; expected one "
            "of them, such as draft+"
        )
    rule = method.plan
    plans = [rule(path, each) for each in ([draw] if draw else map(random.Random, range(DRAWS)))]
    active = fmean(map(active_calls, plans))
    return StepCounts(
        network_calls=fmean(calls_of(plan, path.steps) for plan in plans),
        references=active if run.model.kl_coeff else 0.0,
        replays=active,
        reads=fmean(plan.network_reads for plan in plans),
        plan=max(plans, key=active_calls),
    )


def calls_of(plan: Plan, steps: int) -> int:
    """Network calls of a trajectory of ``steps`` steps under ``plan``."""
    return (steps if plan.stop is None else plan.stop + 1) + plan.renoise


def active_calls(plan: Plan) -> int:
    """Network calls that are replayed and differentiated."""
    return plan.renoise + plan.own_step if plan.renoise else len(plan.active)
