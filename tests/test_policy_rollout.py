"""Policy gradients: steps as distributions, and the gradient of their log-densities through a pipeline's own loop."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from naive_loop import PROMPTS, StableDiffusion3Parts, StableDiffusionParts
from tiny.gradients import flat, generators, relative, with_adapters
from tiny.stable_diffusion import SCHEDULER, tiny_stable_diffusion
from tiny_pipelines import named

from benchmarks.memory_vs_active_steps import peak_allocated_bytes
from nemo_aligner_diffusion.algorithms.policy.ddpo import DDPO
from nemo_aligner_diffusion.algorithms.policy.module import clipped_losses
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.policy.rollout import policy_rollout
from nemo_aligner_diffusion.diffusion.policy.transitions import Transitions
from nemo_aligner_diffusion.errors import ConfigurationError

STEPS = 5
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "conv1")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("to_one", [False, True])
def test_ddim_is_the_scheduler_s_own_step_and_the_paper_s(prediction, eta, to_one):
    config = {**SCHEDULER, "prediction_type": prediction, "set_alpha_to_one": to_one}
    scheduler = DDIMScheduler(**{k: v for k, v in config.items() if not k.startswith("_")})
    scheduler.set_timesteps(STEPS)
    transitions = Transitions(scheduler, STEPS, eta)
    assert transitions.stochastic == list(range(STEPS - to_one))  # the last step of a schedule that ends without noise
    for i, t in enumerate(scheduler.timesteps):
        z, e = noise(2, 4, 3, seed=1), noise(2, 4, 3, seed=2)
        drawn = [torch.Generator().manual_seed(j) for j in range(2)]
        own = scheduler.step(e, t, z, eta=eta, generator=drawn, return_dict=False)[0]
        again = torch.stack(
            [torch.randn(4, 3, generator=torch.Generator().manual_seed(j), dtype=torch.float64) for j in range(2)]
        )
        torch.testing.assert_close(
            transitions.mean(i, z, e) + transitions.deviations[i] * again, own, rtol=1e-6, atol=1e-6
        )
        before = float(scheduler.alphas_cumprod[t])
        at = int(t) - 1000 // STEPS
        after = float(scheduler.alphas_cumprod[at] if at >= 0 else scheduler.final_alpha_cumprod)
        variance = eta**2 * (1 - after) / (1 - before) * (1 - before / after)  # equation 16
        assert transitions.deviations[i] == pytest.approx(math.sqrt(variance), rel=1e-3)
        x, n = (z - math.sqrt(1 - before) * e) / math.sqrt(before), e
        if prediction == "v_prediction":
            x = math.sqrt(before) * z - math.sqrt(1 - before) * e
            n = math.sqrt(before) * e + math.sqrt(1 - before) * z
        mean = math.sqrt(after) * x + math.sqrt(max(1 - after - variance, 0)) * n  # equation 12
        torch.testing.assert_close(transitions.mean(i, z, e), mean, rtol=1e-5, atol=1e-5)


def test_a_flow_s_steps_are_those_of_flow_grpo():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(STEPS)
    transitions, sigmas = Transitions(scheduler, STEPS), scheduler.sigmas.tolist()
    assert transitions.stochastic == [0, 1, 2, 3]
    z, e = noise(2, 4, 3, seed=1), noise(2, 4, 3, seed=2)
    for i in transitions.stochastic:
        sigma, dt = sigmas[i], sigmas[i + 1] - sigmas[i]
        spread = 0.7 * math.sqrt(sigma / (1 - (sigmas[1] if sigma == 1 else sigma)))
        mean = z * (1 + spread**2 / (2 * sigma) * dt) + e * (1 + spread**2 * (1 - sigma) / (2 * sigma)) * dt
        torch.testing.assert_close(transitions.mean(i, z, e), mean, rtol=1e-12, atol=1e-12)
        assert transitions.deviations[i] == pytest.approx(spread * math.sqrt(-dt), rel=1e-12)
        density = torch.distributions.Normal(mean, transitions.deviations[i]).log_prob(z + 0.1).mean((1, 2))
        torch.testing.assert_close(transitions.log_density(i, z + 0.1, z, e), density, rtol=1e-10, atol=1e-10)
    own = scheduler.step(e, scheduler.timesteps[-1], z, return_dict=False)[0]  # without noise at last
    torch.testing.assert_close(transitions.mean(STEPS - 1, z, e), own, rtol=1e-6, atol=1e-6)
    assert Transitions(scheduler, 3).stochastic == [0, 1]  # a pipeline that visits the last steps only


def build(kind: str, guidance: float = 2.5) -> tuple:
    if kind == "sd":
        model = with_adapters(tiny_stable_diffusion(torch.float64), TARGETS)
        return model, StableDiffusionParts(model.pipe, guidance), model.inputs(PROMPTS, STEPS, guidance, 16, 16)
    model = DiffusionModel(named(kind).build(torch.float64), arguments={"max_sequence_length": 8})
    with_adapters(model, TARGETS[:4])
    parts = StableDiffusion3Parts(model.pipe, guidance) if kind == "sd3" else None
    return model, parts, model.inputs(PROMPTS, STEPS, guidance, 16, 16)


def rolled(model, inputs, steps=None, **options):
    method = DDPO(step_share=1.0 if steps is None else steps)
    return policy_rollout(model, generators(), inputs, method.drawn, random.Random(3), **options)


@pytest.mark.parametrize("kind", ["sd", "sd3"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_gradient_of_the_first_pass_is_the_score_function_estimator_s(kind, share):
    model, parts, inputs = build(kind)
    result = rolled(model, inputs, share, keep=True)
    advantages = torch.tensor([1.3, -0.4], dtype=torch.float64)
    new = torch.stack([result.log_densities[i] for i in result.drawn], 1)
    losses, ratio = clipped_losses(new, new.detach(), advantages[:, None], 1e-4)
    assert torch.equal(ratio, torch.ones_like(ratio))
    got = flat(model, losses.mean())

    # −(1/B) Σ_b A_b · mean over steps of ∇ log p(z_{i+1} | z_i), with the networks called by hand
    scheduler = copy.deepcopy(model.pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    transitions = Transitions(scheduler, STEPS)
    assert len(result.drawn) == max(1, round(share * len(transitions.stochastic)))
    first = torch.stack([torch.randn(4, 4, 4, generator=g, dtype=torch.float64) for g in generators()])
    latents = [first * getattr(scheduler, "init_noise_sigma", 1.0), *result.latents.unbind(1)]
    terms = []
    for i in result.drawn:
        e = parts.predict(latents[i], scheduler.timesteps[i])
        deviation = transitions.deviations[i]
        density = torch.distributions.Normal(transitions.mean(i, latents[i], e), deviation)
        terms.append(density.log_prob(latents[i + 1]).mean((1, 2, 3)))
    torch.testing.assert_close(new, torch.stack(terms, 1), rtol=1e-9, atol=1e-9)
    expected = flat(model, -(advantages * torch.stack(terms, 1).mean(1)).mean())
    assert expected.norm() > 0
    assert relative(got, expected) < 1e-9


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux"])
def test_pictures_replay_and_calls(kind):
    model, _, inputs = build(kind)
    result = rolled(model, inputs, keep=True)
    if kind == "sd":
        plain = model.pipe(**inputs, eta=1.0, generator=generators(), output_type="pt").images
        assert torch.equal(result.pictures, plain)
    assert not result.pictures.requires_grad
    assert result.network_calls == STEPS
    for share, calls in ((1.0, len(result.drawn)), (0.5, None)):
        again = rolled(model, inputs, share, stored=result.latents)
        assert set(again.log_densities) == set(again.drawn)
        for i in again.drawn:
            assert torch.equal(again.log_densities[i].detach(), result.trajectory_densities[:, i])
            assert again.log_densities[i].requires_grad
        assert again.network_calls == (calls or len(again.drawn) + (0 not in again.drawn))
    got, expected = (flat(model, sum(part.log_densities.values()).sum()) for part in (
        rolled(model, inputs, stored=result.latents), rolled(model, inputs)))  # fmt: skip
    assert relative(got, expected) < 1e-12


def test_rows_do_not_depend_on_what_they_are_sampled_with():
    model, _, inputs = build("sd")
    both = rolled(model, inputs)
    alone = policy_rollout(model, generators()[1:], {**inputs, "prompt": PROMPTS[1:]}, DDPO().drawn, random.Random(3))
    torch.testing.assert_close(alone.pictures, both.pictures[1:], rtol=1e-10, atol=1e-10)
    for i in both.drawn:
        torch.testing.assert_close(alone.log_densities[i], both.log_densities[i][1:], rtol=1e-10, atol=1e-10)


def test_a_ratio_that_is_clipped_has_no_gradient_where_it_is_good_enough():
    new = torch.tensor([[0.0, 0.3, -0.3]] * 2, requires_grad=True)
    losses, ratio = clipped_losses(new, torch.zeros(2, 3), torch.tensor([[2.0], [-2.0]]), 0.1)
    (gradient,) = torch.autograd.grad(losses.sum(), new)
    r = ratio[0]
    assert losses.tolist() == [
        pytest.approx([-2.0, -2.2, float(-2 * r[2])]),
        pytest.approx([2.0, float(2 * r[1]), 1.8]),
    ]
    assert gradient.tolist() == [
        pytest.approx([-2.0, 0.0, float(-2 * r[2])]),
        pytest.approx([2.0, float(2 * r[1]), 0.0]),
    ]


@pytest.mark.parametrize("sampler", ["euler", "dpm++2m", "plms"])
def test_solvers_without_a_density_are_named(sampler):
    model = tiny_stable_diffusion()
    model.set_scheduler(sampler)
    inputs = model.inputs(PROMPTS, STEPS, 1.0, 16, 16)
    with pytest.raises(ConfigurationError, match=r"have no density here.*sampler_type=ddim"):
        rolled(model, inputs)


def test_memory_is_flat_in_the_number_of_trained_steps():
    model = tiny_stable_diffusion(channels=(96, 96))  # activations well above the latents that are held
    with_adapters(model, ("to_q", "to_k", "to_v", "to_out.0"))
    inputs = model.inputs(PROMPTS, 5, 4.0, 16, 16)
    for p in model.denoiser.parameters():  # gradients exist before: they are not activations
        p.grad = torch.zeros_like(p) if p.requires_grad else None

    def peak(share: float, **stored) -> int:
        def work() -> None:
            sum(rolled(model, inputs, share, **stored).log_densities.values()).sum().backward()

        return peak_allocated_bytes(work)

    peak(0.1)  # one-time allocations
    assert peak(1.0) < 1.05 * peak(0.1)
    latents = rolled(model, inputs, keep=True).latents
    assert peak(1.0, stored=latents) < 1.05 * peak(0.1, stored=latents)
