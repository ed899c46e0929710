"""Approximations of the steps without gradient: what they change, and that nothing else is changed."""

from __future__ import annotations

import contextlib
import random

import pytest
import torch
from test_pipelines_further import NO_PROMPT, available, generators, reward
from tiny.gradients import flat, relative, with_adapters
from tiny.stable_diffusion import save_tiny_pipeline
from tiny_pipelines import MAIN, ROWS, named

from nemo_aligner_diffusion.algorithms.settings import RewardTuningSettings
from nemo_aligner_diffusion.config.load import load_settings
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.network.guidance_interval import guidance_interval
from nemo_aligner_diffusion.diffusion.network.rollout_network import RolloutNetwork, cache_config, rollout_network_of
from nemo_aligner_diffusion.diffusion.plan import Plan
from nemo_aligner_diffusion.diffusion.trajectory import rollout, sample
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.planner.settings import settings_from
from nemo_aligner_diffusion.rewards import build_reward
from nemo_aligner_diffusion.training.build import build_model, build_module

STEPS = 5
# pipelines that guide by one call of two halves, and the half that the prompts are in
CONDITIONAL = {
    **dict.fromkeys(("sd", "sdxl", "sd3", "sd-lcm-scheduler", "sd-euler-ancestral", "sd-img2img", "sd-inpaint"), 1),
    **dict.fromkeys(("sd-controlnet", "sdxl-img2img", "sdxl-inpaint", "sdxl-controlnet", "if", "pixart-alpha"), 1),
    **dict.fromkeys(("pixart-sigma", "auraflow", "cogview3", "sana", "hunyuan-dit", "sd3-img2img", "bria", "ltx"), 1),
    **dict.fromkeys(("cogvideox", "mochi", "latte", "animatediff", "ernie", "kandinsky3", "hidream"), 1),
    **dict.fromkeys(("z-image", "z-image-img2img", "lumina", "cascade-prior"), 0),
}
EVERY_ROW = [
    pytest.param(row, marks=() if row in MAIN else pytest.mark.nightly, id=row.name)
    for row in ROWS
    if row.name not in NO_PROMPT
]


def model_of(row, adapters=True):
    model = DiffusionModel(row.build(row.dtype), row.train, row.stateless)
    if adapters and hasattr(model.denoiser, "add_adapter"):
        return with_adapters(model, row.lora_targets)
    model.denoiser.requires_grad_(True)
    return model


def inputs_of(row, model, guidance=None):
    given = {**model.arguments, **row.inputs(), "num_inference_steps": STEPS}
    return given if guidance is None else {**given, row.guidance[0]: guidance}


def interval_of(row, model, low, high, guidance=None):
    def inputs(prompts):
        return {**inputs_of(row, model, guidance), **row.conditioning(len(prompts)), "prompt": prompts}

    return guidance_interval(model, (low, high), inputs)


def trajectory(row, model, guidance=None, active=1):
    """Of one rollout, the gradient, and the latents of each call of the denoiser or its copy, as one tensor."""
    calls = []

    def note(_, args, kwargs):
        first = args[0] if args else next(iter(kwargs.values()))
        calls.append(torch.stack(list(first)).detach().clone())

    networks = [model.denoiser] + ([model.rollout_network.network] if model.rollout_network else [])
    hooks = [network.register_forward_pre_hook(note, with_kwargs=True) for network in networks]
    with contextlib.ExitStack() as stack:
        for hook in hooks:
            stack.callback(hook.remove)
        result = rollout(
            model, lambda path, rng: Plan(tuple(range(path.steps - active, path.steps))), generators(row),
            inputs_of(row, model, guidance), lambda pictures, rows, read: reward(pictures), rng=random.Random(0),
        )  # fmt: skip
    return flat(model, result.surrogate()), calls


def equal(some, others):
    return len(some) == len(others) and all(map(torch.equal, some, others))


# guidance in an interval


@pytest.mark.parametrize("row", EVERY_ROW)
def test_guidance_everywhere_is_exact_and_nowhere_is_the_conditional_prediction(row):
    available(row)
    model = model_of(row)
    if row.name not in CONDITIONAL:
        with pytest.raises(ConfigurationError, match=rf"{row.pipeline.__name__}|num_inference_steps"):
            interval_of(row, model, 0, 1)
        return
    exact, calls = trajectory(row, model)
    model.guidance_interval = interval_of(row, model, 0, 1)
    assert model.guidance_interval.conditional == CONDITIONAL[row.name]
    got, same_calls = trajectory(row, model)
    assert torch.equal(got, exact)
    assert equal(calls, same_calls)
    model.guidance_interval = interval_of(row, model, 0, 0)
    _, halves = trajectory(row, model)
    rows = len(calls[0]) // 2
    assert [len(x) for x in halves] == [rows] * (len(calls) - 1) + [2 * rows]  # last the step with gradient
    model.guidance_interval = None
    off = 0.0 if row.name.startswith("z-image") else 1.0  # Z-Image writes c + s (c − u)
    _, unguided = trajectory(row, model, guidance=off)
    for ours, theirs in zip(halves, unguided, strict=True):
        assert relative(ours[:rows], theirs) < 1e-6
    assert relative(halves[-1][:rows], calls[-1][:rows]) > 1e-6  # which guidance would have changed


def test_in_an_interval_only_its_steps_are_guided_also_by_the_copy():
    row = named("sdxl")
    model = model_of(row)
    model.guidance_interval = interval_of(row, model, 0.2, 0.6)
    got, calls = trajectory(row, model)
    batch = row.batch
    assert [len(x) for x in calls] == [batch, 2 * batch, 2 * batch, batch, 2 * batch]  # the last has the gradient
    model.rollout_network = RolloutNetwork(model.denoiser)
    model.rollout_network.refresh()
    folded, same_calls = trajectory(row, model)
    assert [len(x) for x in calls] == [len(x) for x in same_calls]
    assert relative(folded, got) < 1e-9
    # what is no rollout in training is as ever
    inputs = inputs_of(row, model)
    pictures = sample(model, generators(row), inputs)
    model.guidance_interval = None
    assert torch.equal(sample(model, generators(row), inputs), pictures)


def test_where_the_pipeline_itself_does_not_guide_its_call_is_left_as_it_is():
    row = named("z-image")
    model = model_of(row)
    model.arguments["cfg_truncation"] = 0.5
    _, calls = trajectory(row, model)
    assert {len(x) for x in calls} == {row.batch, 2 * row.batch}
    model.guidance_interval = interval_of(row, model, 0, 0)
    _, halves = trajectory(row, model)
    assert {len(x) for x in halves[:-1]} == {row.batch}


def test_without_guidance_there_is_no_interval():
    row = named("sd")
    model = model_of(row)
    with pytest.raises(
        ConfigurationError,
        match=r"rollout_guidance_interval: StableDiffusionPipeline does not call its unet once .* expected null",
    ):
        interval_of(row, model, 0.2, 0.8, guidance=1.0)


# caches

EXACT = {"first_block": ("first_block", 0.0, 1), "taylorseer": ("taylorseer", 0.0, 1)}
ROUGH = {"first_block": ("first_block", 10.0, 1), "taylorseer": ("taylorseer", 0.0, 4)}
FIRST_BLOCK = {"flux", "qwen-image", "cogview4", "flux-img2img", "flux-inpaint", "flux-kontext", "flux-controlnet",
               "qwen-image-img2img", "wan", "mochi", "hunyuan-video", "hunyuan-image"}  # fmt: skip
TAYLORSEER = {*FIRST_BLOCK, "flux-2-klein", "flux-2", "chroma", "ovis", "bria", "ltx", "cogvideox", "latte", "longcat",
              "glm-image", "nucleus-moe"}  # fmt: skip
CACHES = {"first_block": FIRST_BLOCK, "taylorseer": TAYLORSEER}


def refused(row, model, kind):
    """Some classes when the hooks are made, some when they are first called."""
    cached(model, kind, EXACT)
    trajectory(row, model)


def cached(model, kind, sizes, precision="same"):
    model.rollout_network = RolloutNetwork(model.denoiser, precision, cache=cache_config(*sizes[kind]))
    model.rollout_network.refresh()


@pytest.mark.parametrize("kind", list(CACHES))
@pytest.mark.parametrize("row", EVERY_ROW)
def test_a_cache_that_reuses_nothing_is_exact_and_one_that_does_leaves_nothing_to_the_next_rollout(row, kind):
    available(row)
    model = model_of(row)
    if row.name not in CACHES[kind]:
        with pytest.raises(ConfigurationError, match=rf"model.rollout_cache.* {type(model.denoiser).__name__} "):
            refused(row, model, kind)
        return
    model.rollout_network = RolloutNetwork(model.denoiser)
    model.rollout_network.refresh()
    exact, calls = trajectory(row, model)
    cached(model, kind, EXACT)
    got, same_calls = trajectory(row, model)
    assert torch.equal(got, exact)
    assert equal(calls, same_calls)
    cached(model, kind, ROUGH)
    rough, others = trajectory(row, model)
    again, others_again = trajectory(row, model)
    few = kind == "taylorseer" and row.name.endswith(("img2img", "inpaint"))  # three steps, with which it begins
    assert equal(calls, others) == few
    assert torch.equal(rough, again)
    assert equal(others, others_again)


@pytest.mark.parametrize("kind", list(CACHES))
@pytest.mark.parametrize("name", ["flux", "qwen-image"])  # one call a step, two of which each has a context
def test_a_cached_trajectory_is_that_of_diffusers_cache_in_the_pipeline_itself(name, kind):
    row = named(name)
    model = model_of(row)
    cached(model, kind, ROUGH)
    _, calls = trajectory(row, model)
    plain = model_of(row)
    plain.denoiser.enable_cache(cache_config(*ROUGH[kind]))
    found = []
    plain.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: found.append(kwargs["hidden_states"].detach().clone()), with_kwargs=True
    )
    plain.pipe(**inputs_of(row, plain), generator=generators(row), output_type="latent")
    assert len(found) == len(calls)
    assert all(relative(ours, theirs) < 1e-9 for ours, theirs in zip(calls, found, strict=True))


def test_a_cache_goes_with_an_interval_and_with_bfloat16():
    """Calls of other rows, and steps before and after, have states of their own."""
    row = named("bria")
    model = model_of(row)
    interval = interval_of(row, model, 0.2, 0.6)
    model.guidance_interval = interval
    model.rollout_network = RolloutNetwork(model.denoiser)
    model.rollout_network.refresh()
    exact, _ = trajectory(row, model)
    cached(model, "taylorseer", EXACT)
    assert torch.equal(trajectory(row, model)[0], exact)
    model.to(torch.float32)
    cached(model, "taylorseer", ROUGH, "bf16")
    got, calls = trajectory(row, model)
    assert [len(x) for x in calls] == [2, 4, 4, 2, 4]
    assert torch.isfinite(got).all()
    assert torch.equal(trajectory(row, model)[0], got)


def test_a_cache_makes_a_copy_of_its_own_even_of_every_weight():
    model = model_of(named("flux"), adapters=False)
    assert rollout_network_of(model.denoiser, "same", fast=False, share=True) is None
    copied = rollout_network_of(model.denoiser, "same", False, True, cache=cache_config("first_block", 0.1, 1))
    assert copied.network is not model.denoiser
    assert {p.data_ptr() for p in copied.network.parameters()} == {p.data_ptr() for p in model.denoiser.parameters()}


# settings


def test_settings_that_do_not_fit_are_refused():
    assert cache_config(None, 0.05, 2) is None
    with pytest.raises(
        ConfigurationError, match=r"rollout_cache = first_block is of the copy .*rollout_precision=same"
    ):
        RewardTuningSettings(rollout_cache="first_block")
    with pytest.raises(ConfigurationError, match=r"rollout_guidance_interval = \[0.8, 0.2\]: .*\[0.2, 0.8\]"):
        RewardTuningSettings(rollout_guidance_interval=[0.8, 0.2])
    with pytest.raises(ConfigurationError, match=r"rollout_guidance_interval = .*a list of 2 numbers >= 0 and <= 1"):
        load_settings("draftp_sd", ["model.rollout_guidance_interval=[0.2,1.5]"])
    settings = RewardTuningSettings(rollout_precision="same", rollout_cache="taylorseer")
    assert settings.unread_keys() == {"model.rollout_cache_threshold": "model.rollout_cache is not first_block"}


def test_they_arrive_where_they_act_and_the_planner_says_that_it_does_not_count_them(tmp_path):
    words = [f"model.from_pretrained={save_tiny_pipeline(tmp_path)}", "family=embedded", "rm=symmetry",
             "model.infer.inference_steps=2", "model.truncation_steps=1", "model.rollout_guidance_interval=[0,0.5]",
             "model.rollout_cache=first_block", "model.rollout_cache_threshold=0.3"]  # fmt: skip
    cfg = load_settings("draftp_sd", words)
    model = build_model(cfg)
    module = build_module(cfg, model, build_reward(cfg.rm), 10)
    module.check_pipeline()
    assert [model.guidance_interval.part_of(i, 2) for i in range(2)] == ["guided", "after"]
    assert module.rollout_options["cache"].threshold == 0.3
    with pytest.raises(ConfigurationError, match=r"model.rollout_cache: .* UNet2DConditionModel "):
        rollout_network_of(model.denoiser, "auto", False, True, **module.rollout_options)
    assert settings_from(cfg, None, "recipe").not_counted == [
        "model.rollout_cache = first_block", "model.rollout_guidance_interval = (0, 0.5)"
    ]  # fmt: skip
    assert settings_from(load_settings("draftp_sd", []), None, "recipe").not_counted == []
