"""How often an optimizer step of a method needs each phase; averages over the draws of its plan."""

from __future__ import annotations

import random
from dataclasses import dataclass
from statistics import fmean

import diffusers

from nemo_aligner_diffusion.algorithms.base import Method
from nemo_aligner_diffusion.algorithms.policy.ddpo import DDPO
from nemo_aligner_diffusion.algorithms.preference.base import PreferenceMethod
from nemo_aligner_diffusion.data.bad_samples import BadSamples
from nemo_aligner_diffusion.data.paths import PathSpec, expand_paths
from nemo_aligner_diffusion.data.preferences.shards import MOMENTS, only_texts_wanted, samples
from nemo_aligner_diffusion.diffusion.model import default_steps
from nemo_aligner_diffusion.diffusion.plan import Plan
from nemo_aligner_diffusion.diffusion.policy.transitions import Transitions
from nemo_aligner_diffusion.diffusion.schedule import build_scheduler, path_of, timed
from nemo_aligner_diffusion.errors import DataError
from nemo_aligner_diffusion.planner.presets import DEFAULT_SCHEDULER, ModelSpec
from nemo_aligner_diffusion.training.settings import RunSettings

DRAWS = 400  # plans averaged over


@dataclass(frozen=True)
class StepCounts:
    """Per micro-batch, on average.

    Attributes:
        network_calls: guided calls without gradient: every executed step, active ones included (their activations are
            recomputed later).
        references: calls of the frozen model (KL; of both pictures of each pair).
        replays: active steps, recomputed and differentiated; of pairs the one call, differentiated.
        kept: those of them whose activations are kept, at most: they are not computed before.
        reads: latents that are decoded and scored.
        plan: the draw with the most active steps: what memory is planned for.
        kind: of the method (:class:`.TrainingMethod`).
        texts: how often prompts are encoded for sampling.
        encodings: how often both pictures of each pair are encoded by the VAE.
        passes: optimizer steps over the same pictures (DDPO).
        steps: sampling steps of a trajectory.
    """

    network_calls: float
    references: float
    replays: float
    reads: float
    plan: Plan
    kind: str = "reward"
    texts: float = 1.0
    encodings: float = 0.0
    passes: int = 1
    steps: int = 0
    kept: float = 0.0


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
    if isinstance(method, PreferenceMethod):
        sampled, shards = (0, run.model.data.train_path) if run.reads_pairs(method) else (2, None)
        encodings = 0.0 if sampled or (shards is not None and holds_latents(shards)) else 1.0
        return StepCounts(sampled * path.steps, float(method.compares), 1.0, sampled, Plan(active=(0,)), method.kind,
                          texts=sampled, encodings=encodings)  # fmt: skip
    if isinstance(method, DDPO):
        stochastic = Transitions(timed(scheduler, steps), path.steps, method.noise_level).stochastic
        plan, passes = Plan(tuple(method.drawn(stochastic, draw or random.Random(0))), cut=True), method.inner_passes
        # a further pass calls the network at its drawn steps alone, and at the first one
        further = len(plan.active) + 1 - len(plan.active) / path.steps
        calls = (path.steps + (passes - 1) * further) / passes
        return StepCounts(calls, 0.0, len(plan.active), 1 / passes, plan, method.kind, passes=passes, steps=path.steps)
    assert isinstance(method, Method), "no other kind yet"
    rule = method.plan
    plans = [rule(path, each) for each in ([draw] if draw else map(random.Random, range(DRAWS)))]
    active = fmean(map(active_calls, plans))
    return StepCounts(
        network_calls=fmean(calls_of(plan, path.steps) for plan in plans),
        references=active if run.model.kl_coeff else 0.0,
        replays=active,
        reads=fmean(plan.network_reads for plan in plans),
        plan=max(plans, key=active_calls),
        kept=min(active, run.model.steps_kept * max(1, max(plan.renoise for plan in plans))),
    )


def holds_latents(shards: PathSpec) -> bool:
    """By the first pair; no for what cannot be read, of which training says why."""
    try:
        first = next(samples(expand_paths(shards)[0], BadSamples(), only_texts_wanted))
    except (DataError, OSError, StopIteration):
        return False
    return MOMENTS in first[1]


def calls_of(plan: Plan, steps: int) -> int:
    """Network calls of a trajectory of ``steps`` steps under ``plan``."""
    return (steps if plan.stop is None else plan.stop + 1) + plan.renoise


def active_calls(plan: Plan) -> int:
    """Network calls that are replayed and differentiated."""
    return plan.renoise + plan.own_step if plan.renoise else len(plan.active)
