"""Oracles of the design notes, section 5: every method's gradient against its definition, in float64."""

from __future__ import annotations

import random

import pytest
import torch
from tiny import SCHEDULER, tiny_stable_diffusion

from nemo_aligner_diffusion.algorithms.alignprop import RandomTruncation
from nemo_aligner_diffusion.algorithms.draft import LastSteps
from nemo_aligner_diffusion.algorithms.draft_lv import RenoisedLastStep
from nemo_aligner_diffusion.algorithms.drtune import SpacedSteps
from nemo_aligner_diffusion.algorithms.refl import OneLateStep
from nemo_aligner_diffusion.diffusion.guidance import guided_predictor
from nemo_aligner_diffusion.diffusion.lora import add_lora
from nemo_aligner_diffusion.diffusion.sampler import Sampler
from nemo_aligner_diffusion.diffusion.trajectory import Plan, reward_gradient, run_trajectory

STEPS = 5
PROMPTS = ["red", "blue sky"]
SAMPLERS = [("ddim", 0.0), ("ddim", 0.6), ("euler", 0.0), ("dpm++2m", 0.0), ("unipc", 0.0), ("plms", 0.0)]
PLANS = {
    "draft": LastSteps(),
    "draft_k": LastSteps(2),
    "draft_lv": RenoisedLastStep(2),
    "drtune": SpacedSteps(train_steps=2, early_stop_steps=3),
    "drtune_full": SpacedSteps(train_steps=3, early_stop_steps=0),
    "refl": OneLateStep(2, 4),
    "alignprop": RandomTruncation(2, 4),
}


def build(prediction_type="epsilon", sampler="ddim", eta=0.0, guidance_scale=2.5, lora=True, steps=STEPS):
    model = tiny_stable_diffusion(torch.float64, prediction_type=prediction_type)
    if lora:
        add_lora(model.denoiser, rank=2, target_modules=("to_q", "to_k", "to_v", "to_out.0", "conv1"))
        torch.manual_seed(5)
        for name, p in model.denoiser.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.2)
    solver = Sampler({**SCHEDULER, "prediction_type": prediction_type}, sampler, steps, eta)
    predict = guided_predictor(model, model.encode_prompts(PROMPTS), guidance_scale)
    return model, solver, predict


def noise_source(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(2, 4, 4, 4, generator=generator, dtype=torch.float64)


def reward(images):
    """Smooth, not symmetric in anything: one number per picture."""
    weights = torch.linspace(-1, 1, images[0].numel(), dtype=images.dtype).reshape(images.shape[1:])
    return (images * weights).mean((1, 2, 3)) + 3 * (images**2).mean((1, 2, 3))


def gradients(model, loss):
    parameters = [p for p in model.denoiser.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in parameters])


def frozen_of(model, predict):
    def frozen(latents, timestep):
        with model.reference():
            return predict(latents, timestep)

    return frozen


def ours(model, sampler, predict, plan, kl_coeff=0.0, recompute=True, micro_batch_size=1):
    trajectory = run_trajectory(
        predict,
        sampler,
        plan,
        noise_source(),
        reference=frozen_of(model, predict) if kl_coeff else None,
        recompute=recompute,
    )
    count = len(trajectory.reads) * len(PROMPTS)
    reads = trajectory.reads
    grads = reward_gradient(reads, model.decode, lambda x, rows: -reward(x).sum() / count, micro_batch_size)
    loss = sum((read * g).sum() for read, g in zip(reads, grads, strict=False))
    return loss if not kl_coeff else loss + kl_coeff * trajectory.divergence


def naive(model, sampler, predict, plan, kl_coeff=0.0):
    """The definition, written out as one graph: no checkpointing, no early freeing, no skipped work."""
    noise = noise_source()
    sg = torch.Tensor.detach
    z, e, kl = [noise() * sampler.initial_scale], [], []
    total = len(sampler)
    last = total - 1 if plan.stop is None else plan.stop

    def call(latent, i, carries_gradient):
        prediction = predict(sampler.network_input(i, latent), sampler.timesteps[i])
        if not carries_gradient:
            return sg(prediction)
        if kl_coeff:
            frozen = frozen_of(model, predict)(sampler.network_input(i, sg(latent)), sampler.timesteps[i])
            kl.append(((prediction - sg(frozen)) ** 2).mean())
        return prediction

    for i in range(last + 1):
        carries = i in plan.active and not plan.renoise
        e.append(call(sg(z[i]) if plan.cut else z[i], i, carries))
        if i != plan.stop:
            z.append(sampler.step(i, z, e, noise() if sampler.steps[i].noise else None))
    reads = [z[-1]] if plan.stop is None else [sampler.clean_estimate(last, z[last], e[last])]
    if plan.renoise:
        reads = []
        for _ in range(plan.renoise):
            noised = sampler.renoise(sg(z[-1]), noise())
            injected = noise() if sampler.steps[-1].noise else None
            reads.append(sampler.last_step_alone(noised, call(noised, total - 1, True), injected))
    loss = -torch.cat([reward(model.decode(read)) for read in reads]).mean()
    return loss if not kl_coeff else loss + kl_coeff * torch.stack(kl).mean()


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kl_coeff", [0.0, 0.7])
@pytest.mark.parametrize(("sampler", "eta"), SAMPLERS)
@pytest.mark.parametrize("method", list(PLANS))
def test_oracle_1_gradient_is_that_of_the_definition(method, sampler, eta, kl_coeff):
    model, solver, predict = build(sampler=sampler, eta=eta)
    plan = PLANS[method](len(solver), random.Random(3))
    got = gradients(model, ours(model, solver, predict, plan, kl_coeff))
    expected = gradients(model, naive(model, solver, predict, plan, kl_coeff))
    assert expected.norm() > 0
    assert relative(got, expected) < 1e-9


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("method", ["draft", "drtune", "draft_lv"])
def test_oracle_1_v_prediction_guidance_and_full_fine_tuning(method, guidance_scale, lora):
    model, solver, predict = build("v_prediction", guidance_scale=guidance_scale, lora=lora)
    plan = PLANS[method](len(solver), random.Random(1))
    got = gradients(model, ours(model, solver, predict, plan))
    assert relative(got, gradients(model, naive(model, solver, predict, plan))) < 1e-9
    assert relative(gradients(model, ours(model, solver, predict, plan, recompute=False)), got) < 1e-12


def test_oracle_2_identities():
    model, solver, predict = build()
    whole = gradients(model, ours(model, solver, predict, LastSteps()(STEPS, random.Random())))
    k_is_t = gradients(model, ours(model, solver, predict, LastSteps(STEPS)(STEPS, random.Random())))
    assert torch.equal(whole, k_is_t)
    draft_1 = gradients(model, ours(model, solver, predict, LastSteps(1)(STEPS, random.Random())))
    drtune = gradients(model, ours(model, solver, predict, Plan(active=(STEPS - 1,), cut=True)))
    assert relative(drtune, draft_1) < 1e-12
    assert relative(draft_1, whole) > 1e-3


def test_oracle_2_fresh_lora_has_no_divergence_and_zero_kl_makes_no_reference_call():
    model, solver, predict = build()
    for name, p in model.denoiser.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(p)
    plan = LastSteps(3)(STEPS, random.Random())
    fresh = run_trajectory(predict, solver, plan, noise_source(), reference=frozen_of(model, predict))
    assert float(fresh.divergence) == 0.0
    calls = []
    without = run_trajectory(
        lambda z, t: calls.append(1) or predict(z, t), solver, plan, noise_source(), reference=None
    )
    assert without.divergence is None
    assert len(calls) == STEPS == without.network_calls


@pytest.mark.parametrize("sampler", ["ddim", "dpm++2m"])
def test_oracle_3_full_draft_agrees_with_finite_differences(sampler):
    model, solver, predict = build(sampler=sampler)
    plan = LastSteps()(STEPS, random.Random())
    gradient = gradients(model, ours(model, solver, predict, plan))
    parameters = [p for p in model.denoiser.parameters() if p.requires_grad]
    torch.manual_seed(0)
    direction = [torch.randn_like(p) for p in parameters]

    @torch.no_grad()
    def loss_at(scale):
        for p, d in zip(parameters, direction, strict=False):
            p.add_(d, alpha=scale)
        value = float(naive(model, solver, predict, plan))
        for p, d in zip(parameters, direction, strict=False):
            p.sub_(d, alpha=scale)
        return value

    step = 1e-5
    difference = (loss_at(step) - loss_at(-step)) / (2 * step)
    analytic = float(gradient @ torch.cat([d.flatten() for d in direction]))
    assert analytic == pytest.approx(difference, rel=1e-5)


@pytest.mark.parametrize("cut", [False, True])
def test_every_active_step_hands_over_its_gradients_before_the_next_is_replayed(cut):
    """In one backward pass through all of them autograd would hold a gradient of every parameter until its end."""
    model, solver, predict = build()
    came = []
    parameter = next(p for p in model.denoiser.parameters() if p.requires_grad)
    parameter.register_post_accumulate_grad_hook(lambda p: came.append(p.grad.clone()))
    ours(model, solver, predict, Plan(active=(1, 2, 3), cut=cut)).backward()
    assert len(came) == 3
    assert not torch.equal(came[0], came[1])


def test_early_steps_of_drtune_get_their_gradient_through_the_solver_alone():
    """Only step 0 active and cut: ∂L/∂θ = (∂L/∂z_T · Π of the solver's latents path) · ∂e_0/∂θ."""
    model, solver, predict = build()
    got = gradients(model, ours(model, solver, predict, Plan(active=(0,), cut=True)))
    with torch.no_grad():
        z, e = [noise_source()() * solver.initial_scale], []
        for i in range(STEPS):
            e.append(predict(solver.network_input(i, z[i]), solver.timesteps[i]))
            z.append(solver.step(i, z, e))
    leaf = z[-1].clone().requires_grad_()
    adjoint = torch.autograd.grad(-reward(model.decode(leaf)).mean(), leaf)[0]
    for i in reversed(range(1, STEPS)):
        ((_, path),) = solver.steps[i].latents  # DDIM has one term
        adjoint = adjoint * path
    adjoint = adjoint * solver.steps[0].predictions[0][1]
    expected = gradients(model, (predict(z[0], solver.timesteps[0]) * adjoint).sum())
    assert relative(got, expected) < 1e-9


def test_impossible_plans_are_refused():
    _, solver, predict = build()
    for plan in (Plan(active=()), Plan(active=(STEPS,)), Plan(active=(4,), stop=3), Plan(active=(0,), stop=STEPS)):
        with pytest.raises(ValueError, match=r"step|active"):
            run_trajectory(predict, solver, plan, noise_source())
