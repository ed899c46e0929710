"""What is known of a scheduler beyond its step, against the scheduler."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
)
from tiny.gradients import generators
from tiny.stable_diffusion import SCHEDULER

from nemo_aligner_diffusion.diffusion.schedule import (
    KeyedNoise,
    SchedulerPath,
    build_scheduler,
    clean_estimate,
    untapped,
    without_global_noise,
)
from nemo_aligner_diffusion.diffusion.settings import SAMPLERS
from nemo_aligner_diffusion.errors import ConfigurationError

OWN = {key: value for key, value in SCHEDULER.items() if not key.startswith("_")}
FLOWS = {
    "flow": {},
    "flow, shifted": {"shift": 3.0},
    "flow, dynamic shift": {"use_dynamic_shifting": True},
    "flow, karras": {"use_karras_sigmas": True},
}
ALL = [*SAMPLERS, *FLOWS]
# a flow predicts n − x; PLMS knows no prediction of the sample
WITH_TYPES = [(name, kind) for name in SAMPLERS for kind in ("epsilon", "v_prediction", "sample")
              if (name, kind) != ("PLMS", "sample")] + [(name, "epsilon") for name in FLOWS]  # fmt: skip


def scheduler_of(name, steps=7, **config):
    """With its timesteps set."""
    if name in FLOWS:
        scheduler = FlowMatchEulerDiscreteScheduler(**FLOWS[name])
        scheduler.set_timesteps(steps, **({"mu": 0.8} if "dynamic" in name else {}))
        return scheduler
    scheduler = build_scheduler(DDIMScheduler(**{**OWN, **config}), name)
    scheduler.set_timesteps(steps)
    return scheduler


def draw(seed=0):
    return torch.randn(2, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def walk(scheduler, z, predictions, generator=None):
    """``z_0 … z_T`` by the scheduler's own steps."""
    scheduler, path = copy.deepcopy(scheduler), [z]
    for t, e in zip(scheduler.timesteps, predictions, strict=True):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(path[-1], t)
        options = {"generator": generator} if generator is not None else {}
        path.append(scheduler.step(e, t, path[-1], **options).prev_sample)
    return path


@pytest.mark.parametrize("name", ALL)
def test_levels_are_those_at_which_a_perfect_prediction_stays_on_the_line(name):
    """``z_i = α_i x + σ_i n``, and with the true ``n`` a first-order step goes to ``α_{i+1} x + σ_{i+1} n``."""
    scheduler = scheduler_of(name)
    path = SchedulerPath(scheduler)
    x, n = draw(0), draw(1)
    assert path.steps == len(scheduler.timesteps)
    assert path.flow == (name in FLOWS)
    assert path.levels[-1] == (1.0, 0.0)
    prediction = n - x if path.flow else n
    noised = [a * x + s * n for a, s in path.levels]
    sigmas = [s / a if a else float("inf") for a, s in path.levels]
    assert sigmas == sorted(sigmas, reverse=True)
    if name == "DPM++2M_SDE":  # adds noise of its own
        return
    for z, expected in zip(walk(scheduler, noised[0], [prediction] * path.steps)[:-1], noised, strict=False):
        assert (z - expected).abs().max() < 2e-3 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize(("name", "prediction_type"), [case for case in WITH_TYPES if case[1] != "sample"])
def test_weights_are_the_gradient_through_the_scheduler_s_own_steps(name, steps, prediction_type):
    steps = max(steps, 2) if "karras" in name else steps  # has no schedule of one step
    scheduler = scheduler_of(name, steps, prediction_type=prediction_type)
    path = SchedulerPath(scheduler)
    predictions = [draw(i + 1).requires_grad_() for i in range(path.steps)]
    end = walk(scheduler, draw(), predictions, generator=torch.Generator().manual_seed(0) if "SDE" in name else None)[
        -1
    ]
    found = torch.autograd.grad(end.sum(), predictions, allow_unused=True, materialize_grads=True)
    for weight, gradient in zip(path.weights, found, strict=True):
        assert torch.allclose(
            gradient, torch.full_like(gradient, weight), rtol=1e-4, atol=2e-5 * max(map(abs, path.weights))
        )
    assert len(path.weights) == path.steps


def test_weights_of_a_flow_are_the_differences_of_its_levels():
    path = SchedulerPath(scheduler_of("flow, shifted"))
    sigmas = [sigma for _, sigma in path.levels]
    assert list(path.weights) == pytest.approx([b - a for a, b in itertools.pairwise(sigmas)], abs=1e-6)


@pytest.mark.parametrize(("name", "prediction_type"), WITH_TYPES)
def test_clean_estimates_are_the_scheduler_s_own_and_true_for_a_perfect_prediction(name, prediction_type):
    scheduler = scheduler_of(name, prediction_type=prediction_type)
    path = SchedulerPath(scheduler)
    x, n = draw(0), draw(1)
    for i, t in enumerate(scheduler.timesteps):
        (alpha, sigma), z = path.levels[i], path.levels[i][0] * x + path.levels[i][1] * n
        norm = (alpha**2 + sigma**2) ** 0.5
        perfect = {"epsilon": n, "sample": x, "v_prediction": (alpha * n - sigma * x) / norm}[prediction_type]
        e = n - x if path.flow else perfect
        assert torch.allclose(path.clean(i, z, e), x, atol=1e-9)
        assert torch.allclose(path.noise(i, z, e), n, atol=1e-9)
        z, e = draw(2), draw(3)  # any others
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(z, t)
        before = untapped(scheduler)
        output = scheduler.step(e, t, z)
        own = getattr(output, "pred_original_sample", None)
        if own is not None:
            assert torch.allclose(path.clean(i, z, e), own, rtol=1e-4, atol=1e-4)
        assert torch.allclose(clean_estimate(before, e, t, z, (output[0],)), path.clean(i, z, e), rtol=1e-4, atol=1e-4)


def test_clean_estimate_of_edm_is_its_own_preconditioning():
    scheduler = EDMEulerScheduler()
    scheduler.set_timesteps(5)
    z, e, t = draw(0), draw(1), scheduler.timesteps[2]
    scheduler.scale_model_input(z, t)
    before = untapped(scheduler)
    output = scheduler.step(e, t, z)
    assert torch.allclose(clean_estimate(before, e, t, z, (output[0],)), output.pred_original_sample, atol=1e-5)


@pytest.mark.parametrize(("name", "prediction_type"), WITH_TYPES)
def test_scale_of_a_prediction_in_another_space_by_numbers(name, prediction_type):
    path = SchedulerPath(scheduler_of(name, prediction_type=prediction_type))
    z, e, other = draw(0), draw(1), draw(2)
    for i in range(1, path.steps):  # a flow's first level has no signal
        alpha, sigma = path.levels[i]

        def seen(space, prediction, i=i, alpha=alpha, sigma=sigma):
            x, n = path.clean(i, z, prediction), path.noise(i, z, prediction)
            if space == "epsilon":
                return n
            norm = (alpha**2 + sigma**2) ** 0.5
            return n - x if path.flow else (alpha * n - sigma * x) / norm

        for space in ("epsilon", "velocity"):
            moved = (seen(space, e) - seen(space, other)).norm() / (e - other).norm()
            assert abs(path.prediction_scale(i, space)) == pytest.approx(float(moved), rel=1e-9)
        assert path.prediction_scale(i, "prediction") == 1.0
        own = "velocity" if path.flow else "epsilon"
        assert path.prediction_scale(i, None) == path.prediction_scale(i, own)


def test_a_pipeline_that_visits_the_last_timesteps_only_has_a_shorter_path():
    """As image to image does, by ``begin_index`` or by a slice of the timesteps."""
    scheduler = scheduler_of("euler")
    whole = SchedulerPath(scheduler)
    assert SchedulerPath(scheduler, 3).levels == whole.levels[-4:]
    scheduler.set_begin_index(4)
    assert SchedulerPath(scheduler).levels == whole.levels[-4:]


def test_solvers_of_other_models_and_impossible_options_are_refused():
    own = DDIMScheduler(**OWN)
    with pytest.raises(ConfigurationError, match="did you mean Euler"):
        build_scheduler(own, "eulr")
    with pytest.raises(ConfigurationError, match=r"eta=0\.5 works with sampler_type=ddim only, not 'euler'"):
        build_scheduler(own, "euler", 0.5)
    with pytest.raises(ConfigurationError, match="cannot take the noise schedule of this pipeline's FlowMatchEuler"):
        build_scheduler(FlowMatchEulerDiscreteScheduler(), "ddim")
    for option in ("clip_sample", "thresholding"):
        with pytest.raises(ConfigurationError, match=f"{option}=true"):
            build_scheduler(DDIMScheduler(**{**OWN, option: True}), None)


def test_a_solver_keeps_the_pipeline_s_noise_schedule_and_its_own_options():
    own = DDIMScheduler(**{**OWN, "beta_end": 0.02, "prediction_type": "v_prediction", "timestep_spacing": "trailing"})
    assert build_scheduler(own, None) is own
    for name in SAMPLERS:
        scheduler = build_scheduler(own, name)
        assert type(scheduler).__name__ == SAMPLERS[name][0]
        assert (scheduler.config.beta_end, scheduler.config.prediction_type) == (0.02, "v_prediction")
        assert scheduler.config.timestep_spacing == "trailing"
    sde = build_scheduler(own, "DPM++2M_SDE")
    assert build_scheduler(sde, "unipc").config.get("algorithm_type") is None  # another solver's option
    assert type(build_scheduler(own, "PLMS")).__name__ == "PNDMScheduler"  # NeMo's spelling


def test_noise_of_the_global_generator_becomes_the_samples_own():
    shape = (2, 4, 3, 3)
    torch.manual_seed(0)
    with KeyedNoise(generators()):
        first, like = torch.randn(shape), torch.randn_like(torch.empty(shape, dtype=torch.float64))
        one = torch.randn(shape, generator=torch.Generator().manual_seed(7))  # has a generator already
        other = torch.randn(5, 3)  # no batch of samples
    rows = [[torch.randn(shape[1:], generator=g) for _ in range(2)] for g in generators()]
    assert torch.equal(first, torch.stack([row[0] for row in rows]))
    assert torch.equal(like, torch.stack([row[1] for row in rows]).double())
    assert torch.equal(one, torch.randn(shape, generator=torch.Generator().manual_seed(7)))
    torch.manual_seed(0)
    assert torch.equal(other, torch.randn(5, 3))


@pytest.mark.parametrize("kind", [LCMScheduler, HeunDiscreteScheduler])
def test_a_sample_s_steps_do_not_depend_on_its_batch(kind):
    scheduler = kind(**{key: value for key, value in OWN.items() if "beta" in key})
    scheduler.set_timesteps(4)
    z = draw()

    def end(rows):
        solver, latents, own = copy.deepcopy(scheduler), z[rows], generators()[rows]
        for t in solver.timesteps:
            solver.scale_model_input(latents, t)
            with KeyedNoise(own):
                latents = solver.step(0.1 * latents, t, latents)[0]
        return latents

    assert torch.equal(end(slice(0, 2))[1:], end(slice(1, 2)))


def test_global_generators_are_left_as_they_were():
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    with without_global_noise(11):
        inside = torch.randn(4)
    assert torch.equal(torch.randn(4), expected)
    with without_global_noise(11):
        assert torch.equal(torch.randn(4), inside)
