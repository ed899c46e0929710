"""The coefficient table against the scheduler it was read from."""

from __future__ import annotations

import inspect

import pytest
import torch
from tiny import SCHEDULER

from nemo_aligner_diffusion.diffusion.sampler import SAMPLERS, Sampler, build_scheduler
from nemo_aligner_diffusion.errors import ConfigurationError

CASES = [(name, 0.0) for name in SAMPLERS] + [("ddim", 0.7)]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
@pytest.mark.parametrize(("name", "eta"), CASES)
def test_table_walks_the_schedulers_own_path(name, eta, steps, spacing, prediction_type):
    config = {**SCHEDULER, "prediction_type": prediction_type, "timestep_spacing": spacing}
    sampler = Sampler(config, name, steps, eta)
    scheduler = build_scheduler(config, name)
    scheduler.set_timesteps(steps)
    torch.manual_seed(0)
    mixing = torch.randn(3, 3)
    latents = [torch.randn(2, 4, 3, 3) * sampler.initial_scale]
    predictions, expected = [], latents[0].clone()
    assert len(sampler) == len(scheduler.timesteps)
    for i, timestep in enumerate(scheduler.timesteps):
        assert sampler.timesteps[i] == timestep
        noise = torch.randn(2, 4, 3, 3)
        options = {}
        if "variance_noise" in inspect.signature(scheduler.step).parameters:
            options["variance_noise"] = noise
        if eta:
            options["eta"] = eta
        output = scheduler.step(
            torch.tanh(scheduler.scale_model_input(expected, timestep) @ mixing), timestep, expected, **options
        )
        predictions.append(torch.tanh(sampler.network_input(i, latents[i]) @ mixing))
        clean = sampler.clean_estimate(i, latents[i], predictions[i])
        if getattr(output, "pred_original_sample", None) is not None:
            torch.testing.assert_close(clean, output.pred_original_sample, rtol=1e-4, atol=1e-4)
        expected = output.prev_sample
        latents.append(sampler.step(i, latents, predictions, noise))
        torch.testing.assert_close(latents[-1], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_clean_estimate_recovers_the_picture_from_a_perfect_prediction(name, prediction_type):
    sampler = Sampler({**SCHEDULER, "prediction_type": prediction_type}, name, 9)
    clean, noise = torch.randn(2, 4, 3, 3, dtype=torch.float64), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    scheduler = build_scheduler({**SCHEDULER, "prediction_type": prediction_type}, name)
    scheduler.set_timesteps(9)
    for i in range(len(sampler)):
        z = scheduler.add_noise(clean, noise, sampler.timesteps[i].reshape(1))
        cumulative = scheduler.alphas_cumprod[int(sampler.timesteps[i])].double()
        prediction = (
            noise if prediction_type == "epsilon" else cumulative.sqrt() * noise - (1 - cumulative).sqrt() * clean
        )
        torch.testing.assert_close(sampler.clean_estimate(i, z, prediction), clean, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_last_step_alone_denoises_a_renoised_latent(name):
    sampler = Sampler(SCHEDULER, name, 10)
    clean, noise = torch.randn(1, 4, 3, 3, dtype=torch.float64), torch.randn(1, 4, 3, 3, dtype=torch.float64)
    noised = sampler.renoise(clean, noise)
    assert not torch.allclose(noised, clean)
    finished = sampler.last_step_alone(noised, noise, torch.zeros_like(noise))
    # the perfect prediction leads back to the clean latent, up to the noise that DDIM's last level keeps (σ ≈ 0.03)
    assert (finished - clean).abs().max() < 0.15 < (noised - finished).abs().max() + 0.15


def test_nonlinear_or_unknown_samplers_are_refused():
    with pytest.raises(ConfigurationError, match="clip_sample"):
        Sampler({**SCHEDULER, "clip_sample": True}, "ddim", 5)
    with pytest.raises(ConfigurationError, match="did you mean 'euler'"):
        Sampler(SCHEDULER, "eulr", 5)
    with pytest.raises(ConfigurationError, match="eta"):
        Sampler(SCHEDULER, "euler", 5, eta=0.5)
    with pytest.raises(ConfigurationError, match="at least 1"):
        Sampler(SCHEDULER, "ddim", 0)
