"""How often an optimizer step of a method needs each phase; averages over the draws of its plan."""

from __future__ import annotations

import random
from dataclasses import dataclass
from statistics import fmean

from omegaconf import DictConfig

from nemo_aligner_diffusion.diffusion.sampler import Sampler
from nemo_aligner_diffusion.diffusion.trajectory import Plan
from nemo_aligner_diffusion.planner.networks import SCHEDULER
from nemo_aligner_diffusion.training.assemble import ALGORITHMS

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


def step_counts(cfg: DictConfig, draw: random.Random | None = None) -> StepCounts:
    """Of ``model.algorithm`` with its settings.

    Args:
        draw: what one plan is drawn from; ``None``: averages over :data:`DRAWS` of them.
    """
    infer = cfg.model.infer
    rule = ALGORITHMS[cfg.model.algorithm][1](cfg)
    steps = len(Sampler(SCHEDULER, infer.sampler_type, infer.inference_steps, infer.eta))
    plans = [rule(steps, each) for each in ([draw] if draw else map(random.Random, range(DRAWS)))]
    active = fmean(map(_active, plans))
    return StepCounts(
        network_calls=fmean(calls_of(plan, steps) for plan in plans),
        references=active if cfg.model.kl_coeff else 0.0,
        replays=active,
        reads=fmean(plan.renoise or 1 for plan in plans),
        plan=max(plans, key=_active),
    )


def calls_of(plan: Plan, steps: int) -> int:
    """Network calls of a trajectory of ``steps`` steps under ``plan``: ``Trajectory.network_calls``."""
    return (steps if plan.stop is None else plan.stop + 1) + plan.renoise


def _active(plan: Plan) -> int:
    return plan.renoise or len(plan.active)
