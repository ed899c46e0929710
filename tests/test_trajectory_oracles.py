"""Oracles of the design notes, section 5: every method's gradient against its definition, in float64."""

from __future__ import annotations

import random

import pytest
import torch
from naive_loop import PROMPTS, StableDiffusion3Parts, StableDiffusionParts, naive_run
from tiny.gradients import flat, generators, relative, reward, run, with_adapters
from tiny.stable_diffusion import tiny_stable_diffusion
from tiny_pipelines import named

from nemo_aligner_diffusion.algorithms.registry import methods
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.plan import Plan, check_plan
from nemo_aligner_diffusion.diffusion.trajectory import sample
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
SPACES = ("prediction", "epsilon", "velocity", None)


def build(sampler="ddim", eta=0.0, guidance=2.5, lora=True, **scheduler):
    """``(model, its parts for the naive loop, arguments of the pipeline's call)``."""
    if sampler == "flow":
        row = named("sd3")
        model = with_adapters(
            DiffusionModel(row.build(torch.float64), arguments={"max_sequence_length": 8}), TARGETS[:4]
        )
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


@pytest.mark.parametrize("plan", list(PLANS))
@pytest.mark.parametrize(("sampler", "eta"), SAMPLERS)
def test_oracle_1_gradient_is_that_of_the_definition(sampler, eta, plan):
    model, parts, inputs = build(sampler, eta)
    space = SPACES[list(PLANS).index(plan) % 4]
    for kl_coeff in (0.0, 0.7) if sampler in ("flow", "dpm++2m") else (0.7,):  # with it, the reward's is proved too
        result, _ = run(model, PLANS[plan], inputs, reference=kl_coeff > 0, kl_space=space)
        got = flat(model, result.surrogate(kl_coeff))
        naive = naive_run(model, parts, result.plan, STEPS, eta, kl_coeff, space)
        expected = flat(model, naive.loss)
        assert expected.norm() > 0
        assert relative(got, expected) < 1e-9


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("sampler", ["ddim", "euler", "flow"])
def test_the_divergence_of_the_definition_in_every_space(sampler, space):
    model, parts, inputs = build(sampler)
    plan = Plan((1, 3, 4), cut=True)
    result, _ = run(model, plan, inputs, reference=True, kl_space=space)
    without, with_it = (naive_run(model, parts, plan, STEPS, 0.0, kl, space).loss for kl in (0.0, 1.0))
    assert float(result.divergence.detach()) == pytest.approx(
        float((with_it - without).detach()), rel=1e-6
    )  # float32 tables


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("plan", ["draft", "drtune", "draft_lv"])
def test_oracle_1_v_prediction_guidance_full_fine_tuning_and_decoding_by_rows(plan, guidance, lora):
    model, parts, inputs = build("ddim", 0.0, guidance, lora, prediction_type="v_prediction")
    result, seen = run(model, PLANS[plan], inputs, seed=1, reference=True)
    got = flat(model, result.surrogate(0.3))
    assert relative(got, flat(model, naive_run(model, parts, result.plan, STEPS, 0.0, 0.3).loss)) < 1e-9
    for options in ({"kept_steps": None}, {"kept_steps": 1}, {"decode_rows": 1}, {"gradient_scale": 256.0}):
        other, again = run(model, PLANS[plan], inputs, seed=1, reference=True, **options)
        assert relative(flat(model, other.surrogate(0.3)), got) < 1e-12, options
        assert (again.pictures() - seen.pictures()).abs().max() < 1e-12, options


@pytest.mark.parametrize(("sampler", "eta"), SAMPLERS)
def test_pictures_are_the_plain_pipeline_s_to_the_bit(sampler, eta):
    model, _, inputs = build(sampler, eta)
    plain = model.pipe(**inputs, generator=generators(), output_type="pt").images
    for plan in ("draft", "draft_k", "drtune, no stop", "share", "gain"):
        for kept_steps in (0, 1, None):
            _, seen = run(model, PLANS[plan], inputs, kept_steps=kept_steps)
            assert torch.equal(seen.pictures(), plain), plan
    _, seen = run(model, PLANS["draft_lv, own step"], inputs)
    assert torch.equal(seen.pictures(), plain)
    assert not torch.equal(seen.pictures(1), plain)
    assert torch.equal(sample(model, generators(), inputs), plain)


def test_oracle_2_identities():
    model, _, inputs = build()

    def gradient(rule, **options):
        return flat(model, run(model, rule, inputs, **options)[0].surrogate(0.0))

    whole = gradient(method("draft"))
    assert torch.equal(whole, gradient(method("draft_k", truncation_steps=STEPS)))
    draft_1 = gradient(method("draft_k", truncation_steps=1))
    assert relative(gradient(Plan((STEPS - 1,), cut=True)), draft_1) < 1e-12
    assert relative(draft_1, whole) > 1e-3
    assert torch.equal(gradient(method("draft_k"), reference=True), draft_1)  # kl_coeff 0


def test_oracle_2_fresh_lora_has_no_divergence_and_zero_kl_makes_no_reference_call():
    model, _, inputs = build()
    for name, p in model.denoiser.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(p)
    calls = []
    model.denoiser.register_forward_hook(lambda *_: calls.append(1))
    rule = method("draft_k", truncation_steps=3)
    result, _ = run(model, rule, inputs)
    assert result.divergence is None
    assert len(calls) == STEPS == result.network_calls
    fresh, _ = run(model, rule, inputs, reference=True)
    assert float(fresh.divergence.detach()) == 0.0
    assert len(calls) == STEPS + STEPS + 3
    assert fresh.network_calls == STEPS


@pytest.mark.parametrize("sampler", ["ddim", "dpm++2m", "flow"])
def test_oracle_3_full_draft_agrees_with_finite_differences(sampler):
    model, _, inputs = build(sampler)
    gradient = flat(model, run(model, method("draft"), inputs)[0].surrogate())
    parameters = [p for _, p in model.trainable_parameters()]
    torch.manual_seed(0)
    direction = [torch.randn_like(p) for p in parameters]

    @torch.no_grad()
    def loss_at(scale):
        for p, d in zip(parameters, direction, strict=True):
            p.add_(d, alpha=scale)
        value = -float(reward(model.pipe(**inputs, generator=generators(), output_type="pt").images).mean())
        for p, d in zip(parameters, direction, strict=True):
            p.sub_(d, alpha=scale)
        return value

    # DPM-Solver++ and flow Euler step in float32, in which smaller differences drown
    step = 1e-4 if sampler == "ddim" else 1e-3
    wide, narrow = ((loss_at(h) - loss_at(-h)) / (2 * h) for h in (step, step / 2))
    analytic = float(gradient @ torch.cat([d.flatten() for d in direction]))
    usual = float(gradient.norm())  # of a random direction's derivative; this one's may be near zero
    assert abs(analytic - (4 * narrow - wide) / 3) < (1e-6 if sampler == "ddim" else 1e-3) * usual


@pytest.mark.parametrize("cut", [False, True])
def test_every_active_step_hands_over_its_gradients_before_the_next_is_recomputed(cut):
    """In one backward pass through all of them autograd would hold a gradient of every parameter until its end."""
    model, _, inputs = build()
    came = []
    parameter = next(p for p in model.denoiser.parameters() if p.requires_grad)
    parameter.register_post_accumulate_grad_hook(lambda p: came.append(p.grad.clone()))
    run(model, Plan((1, 2, 3), cut=cut), inputs)[0].surrogate().backward()
    assert len(came) == 3
    assert not torch.equal(came[0], came[1])


@pytest.mark.parametrize("sampler", ["ddim", "flow"])
def test_early_steps_with_cut_inputs_get_their_gradient_through_the_solver_alone(sampler):
    """``∂L/∂θ = Σ_{i∈A} a_i ∂L/∂z_T · ∂e_i/∂θ``, which is FlowBP-Sparse's surrogate, and DRTune's."""
    model, parts, inputs = build(sampler)
    got = flat(model, run(model, Plan((0, 2), cut=True), inputs)[0].surrogate())
    naive = naive_run(model, parts, Plan((0, 2), cut=True), STEPS)
    leaf = naive.latents[-1].detach().requires_grad_()
    adjoint = torch.autograd.grad(-reward(parts.decode(leaf)).mean(), leaf)[0]
    scheduler = model.pipe.scheduler
    scheduler.set_timesteps(STEPS)
    loss = torch.zeros(())
    for i in (0, 2):
        if sampler == "flow":
            factor = scheduler.sigmas[i + 1] - scheduler.sigmas[i]
        else:  # z_{i+1} = √(ᾱ'/ᾱ) z_i + (√(1 − ᾱ') − √(ᾱ'/ᾱ) √(1 − ᾱ)) e_i, and on by the first term alone
            now = scheduler.alphas_cumprod[scheduler.timesteps[i]].double()
            after = scheduler.alphas_cumprod[scheduler.timesteps[i] - 1000 // STEPS].double()
            factor = (1 - after).sqrt() - (after / now).sqrt() * (1 - now).sqrt()
            factor = factor * (scheduler.final_alpha_cumprod.double() / after).sqrt()
        loss = loss + (naive.predictions[i] * adjoint * factor).sum()
    assert relative(got, flat(model, loss)) < 1e-6  # the factor is written in float64; the solvers have float32 tables


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Plan(active=()), "at least one"),
        (Plan(active=(STEPS,)), "0 … 4"),
        (Plan(active=(-1,)), "0 … 4"),
        (Plan(active=(4,), stop=3), "0 … 3"),
        (Plan(active=(0,), stop=STEPS), "stops at step 5"),
        (Plan(active=(4,), stop=4, renoise=2), "cannot also stop early"),
        (Plan(active=(1,), gain={7: 2.0}), "gain must map steps in 0 … 4"),
        (Plan(active=(1,), input_share=[0.5]), "input_share must map steps"),
        (Plan(active=3), "integers in 0 … 4, at least one, in a tuple; got 3"),
        (Plan(active=("1",)), "integers in 0 … 4"),
        (Plan(active=(1,), stop="2"), "stops at step '2'"),
        (Plan(active=(1,), renoise=-1), "renoise must be"),
    ],
)
def test_impossible_plans_are_refused(plan, words):
    with pytest.raises(ValueError, match=words):
        check_plan(plan, STEPS)
    model, _, inputs = build()
    with pytest.raises(ConfigurationError, match=f"5 sampling steps: .*{words}"):
        run(model, plan, inputs)


@pytest.mark.parametrize(
    ("carry", "words"),
    [
        (lambda latents: latents[:, :1], r"carry, step 1 gave \(2, 1, .*expected \(2, 4, "),
        (lambda latents: None, "carry, step 1 gave a NoneType"),
        (lambda latents: {}["j"], "carry, step 1 failed with KeyError: 'j'"),
    ],
)
def test_a_surrogate_that_is_none_is_one_message(carry, words):
    class Own(Plan):
        def carry(self, step, latents, trace):
            return carry(latents)

    model, _, inputs = build()
    with pytest.raises(ConfigurationError, match=words):
        run(model, Own(active=(1,)), inputs)


def test_renoising_needs_two_steps():
    model, _, inputs = build()
    with pytest.raises(ConfigurationError, match="needs 2 sampling steps or more, got 1"):
        run(model, Plan((0,), renoise=1), {**inputs, "num_inference_steps": 1})
