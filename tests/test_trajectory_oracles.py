"""Oracles of the design notes, section 5: every method's gradient against its definition, in float64."""

from __future__ import annotations

import random

import pytest
import torch
from gradient_toy import flat, generators, relative, reward, run, with_adapters
from naive_loop import PROMPTS, StableDiffusion3Parts, StableDiffusionParts, naive_run
from tiny import tiny_stable_diffusion
from tiny_pipelines import named

from nemo_aligner_diffusion.algorithms.registry import methods
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.plan import Plan, check_plan
from nemo_aligner_diffusion.errors import ConfigurationError

STEPS = 5
SAMPLERS = [("ddim", 0.0), ("ddim", 0.7), ("plms", 0.0), ("euler", 0.0), ("dpm++2m", 0.0), ("dpm++2m_sde", 0.0),
            ("unipc", 0.0), ("flow", 0.0)]  # fmt: skip
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "conv1")


def method(name, seed=0, **settings):
    return lambda path, rng: methods()[name](**settings).plan(path, random.Random(seed))


PLANS = {
    "draft": method("draft"),
    "draft_k": method("draft_k", truncation_steps=2),
    "draft_k, x0": method("draft_k", truncation_steps=2, read="x0"),
    "drtune": method("drtune", 0, train_steps=2, early_stop_steps=3),
    "drtune, draw 1": method("drtune", 1, train_steps=2, early_stop_steps=3),
    "drtune, draw 4": method("drtune", 4, train_steps=2, early_stop_steps=3),
    "drtune, no stop": method("drtune", train_steps=3, early_stop_steps=0),
    "draft_lv": method("draft_lv", samples=2),
    "draft_lv, own step": method("draft_lv", samples=2, include_own_step=True),
    "refl": method("refl", window=(2, 4)),
    "alignprop": method("alignprop", min_truncation_steps=2, max_truncation_steps=4, distribution="uniform"),
    "share": lambda path, rng: Plan((0, 2, 3), cut=True, input_share={2: 0.3}),
    "gain": lambda path, rng: Plan((1, 3), gain={1: 2.5, 3: 0.5}),
}
KINDS = {0: "prediction", 1: "epsilon", 2: "velocity", 3: None}


def build(sampler="ddim", eta=0.0, guidance=2.5, lora=True, **scheduler):
    """``(model, its parts for the naive loop, arguments of the pipeline's call)``."""
    if sampler == "flow":
        row = named("sd3")
        model = with_adapters(DiffusionModel(row.build(torch.float64), arguments={"max_sequence_length": 8}), TARGETS[:4])
        parts = StableDiffusion3Parts(model.pipe, guidance)
    else:
        model = tiny_stable_diffusion(torch.float64, **scheduler)
        model.set_scheduler(sampler, eta)
        if lora:
            with_adapters(model, TARGETS)
        else:
            model.keep_reference()
            torch.manual_seed(5)
            for parameter in model.denoiser.requires_grad_(True).parameters():
                torch.nn.init.normal_(parameter, std=0.05) if parameter.ndim > 1 else None
        parts = StableDiffusionParts(model.pipe, guidance)
    return model, parts, model.inputs(PROMPTS, STEPS, guidance, 16, 16, eta)


def drawn(model, rule, inputs):
    """The plan of a rule, and the pictures of the plain pipeline."""
    result, _ = run(model, rule, inputs)
    return result.plan


@pytest.mark.parametrize("plan", list(PLANS))
@pytest.mark.parametrize(("sampler", "eta"), SAMPLERS)
def test_oracle_1_gradient_is_that_of_the_definition(sampler, eta, plan):
    model, parts, inputs = build(sampler, eta)
    space = KINDS[list(PLANS).index(plan) % 4]
    for kl_coeff in (0.0, 0.7):
        result, seen = run(model, PLANS[plan], inputs, reference=kl_coeff > 0, kl_space=space)
        got = flat(model, result.surrogate(kl_coeff))
        naive = naive_run(model, parts, result.plan, STEPS, eta, kl_coeff, space)
        expected = flat(model, naive.loss)
        print(sampler, eta, plan, kl_coeff, space, relative(got, expected), float(expected.norm()))
        assert expected.norm() > 0
        assert relative(got, expected) < 1e-9
