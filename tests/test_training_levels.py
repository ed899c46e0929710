"""Training noise levels and the error at them, against the schedulers' own noise and a solved ε."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMWuerstchenScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from nemo_aligner_diffusion.diffusion.network.levels import TrainingLevels
from nemo_aligner_diffusion.diffusion.schedule import solve
from nemo_aligner_diffusion.errors import ConfigurationError

LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
T = torch.tensor([0, 1, 250, 998, 999])


def normal(seed: int) -> torch.Tensor:
    return torch.randn(len(T), 4, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
def test_levels_of_a_diffusion_are_what_its_network_is_handed(kind):
    """Euler's own variable is scaled back to the network's, which is DDIM's."""
    scheduler = kind(**LATENT)
    scheduler.set_timesteps(1000)
    levels = TrainingLevels(scheduler)
    assert (levels.size, levels.flow) == (1000, False)
    x, noise = normal(0), normal(1)
    for row, t in enumerate(T.tolist()):
        told = next(own for own in scheduler.timesteps if int(own) == t)
        z = scheduler.add_noise(x[row : row + 1], noise[row : row + 1], told.reshape(1))
        handed = kind.from_config(scheduler.config)
        handed.set_timesteps(1000)
        z = handed.scale_model_input(z, told)
        ours = levels.noised(x[row : row + 1], noise[row : row + 1], T[row : row + 1])
        torch.testing.assert_close(ours, z.double(), rtol=0, atol=3e-6)  # schedulers count in float32
        assert levels.timesteps[t] == t
    assert (levels.sigmas.diff() > 0).all()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("solver", [DDIMScheduler, EulerDiscreteScheduler])
def test_error_is_that_of_the_noise_which_the_prediction_implies(solver, kind):
    levels = TrainingLevels(solver(**LATENT, prediction_type=kind))
    x, noise, prediction = normal(0), normal(1), normal(2)
    plain = DDIMScheduler(**LATENT, prediction_type=kind)
    z = levels.noised(x, noise, T)
    error = levels.error(x, noise, prediction, T)
    for row, t in enumerate(T.tolist()):
        level = float(levels.alphas[t]), float(levels.sigmas[t])
        implied = solve(plain, level, z[row], prediction[row])[1]
        assert float(error[row]) == pytest.approx(float((noise[row] - implied).square().mean()), rel=1e-9)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_level_without_signal_has_an_error(kind):
    levels = TrainingLevels(DDIMScheduler(**LATENT, prediction_type=kind, rescale_betas_zero_snr=True))
    assert levels.alphas[-1] == 0
    x, noise, prediction = normal(0), normal(1), normal(2)
    error = levels.error(x, noise, prediction, T)
    # there ε is in the input itself: a v, which is x, says nothing of it
    assert error[-1] == (0 if kind == "v_prediction" else (noise - prediction)[-1].square().mean())


@pytest.mark.parametrize("options", [{"shift": 3.0}, {"shift": 3.0, "use_dynamic_shifting": True}])
def test_levels_of_a_flow_are_its_training_sigmas(options):
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    before = scheduler.sigmas.clone()
    scheduler.set_timesteps(4, mu=1.2)  # sampling's own levels
    levels = TrainingLevels(scheduler)
    assert (levels.size, levels.flow) == (1000, True)
    torch.testing.assert_close(levels.sigmas, before.flip(0).double(), rtol=0, atol=0)
    torch.testing.assert_close(levels.timesteps, 1000 * levels.sigmas)
    shift = 1.0 if "use_dynamic_shifting" in options else 3.0
    assert float(levels.sigmas[499]) == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5), rel=1e-6)
    x, noise, velocity = normal(0), normal(1), normal(2)
    fresh = FlowMatchEulerDiscreteScheduler(**options)
    noised = fresh.scale_noise(x.float(), fresh.timesteps.flip(0)[T], noise.float())
    torch.testing.assert_close(levels.noised(x, noise, T), noised.double(), rtol=0, atol=1e-6)
    expected = (noise - x - velocity).square().flatten(1).mean(1)
    torch.testing.assert_close(levels.error(x, noise, velocity, T), expected, rtol=1e-12, atol=0)


def test_levels_of_a_flow_with_another_solver_and_of_one_that_counts_backwards():
    euler = TrainingLevels(FlowMatchEulerDiscreteScheduler(shift=3.0))
    unipc = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    other = TrainingLevels(unipc)
    torch.testing.assert_close(other.sigmas, euler.sigmas, rtol=1e-6, atol=0)
    unipc.set_timesteps(10)
    for t, sigma in zip(unipc.timesteps.tolist(), unipc.sigmas.tolist(), strict=False):  # timesteps are whole numbers
        nearest = int((other.timesteps - t).abs().argmin())
        assert float(other.sigmas[nearest]) == pytest.approx(sigma, abs=2e-3)
    inverted = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    levels = TrainingLevels(inverted)
    torch.testing.assert_close(levels.timesteps, 1000 * levels.alphas)
    x, noise = normal(0), normal(1)
    assert levels.error(x, noise, x - noise, T).max() < 1e-24  # it predicts the negative velocity


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        (EDMEulerScheduler(), "EDMEulerScheduler"),
        (DDPMWuerstchenScheduler(), "DDPMWuerstchenScheduler"),
        (EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"), "continuous timesteps"),
    ],
)
def test_schedulers_whose_training_levels_are_not_known_are_refused_by_name(scheduler, said):
    with pytest.raises(ConfigurationError, match=said) as refused:
        TrainingLevels(scheduler)
    assert "alphas_cumprod" in str(refused.value)
