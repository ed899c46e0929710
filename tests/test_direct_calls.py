"""Denoisers called at a chosen (z_t, t), against the network called by hand with the pipeline's own prompts."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from process_pool import ProcessPool
from tiny.gradients import with_adapters
from tiny.stable_diffusion import tiny_stable_diffusion
from tiny_pipelines import PROMPTS, named

from nemo_aligner_diffusion.diffusion.generate import Sampling
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.network.call import DirectCalls
from nemo_aligner_diffusion.diffusion.settings import SAMPLERS
from nemo_aligner_diffusion.diffusion.taps import PromptCache
from nemo_aligner_diffusion.errors import ConfigurationError

BY_HAND = ("sd", "sdxl", "sd3", "flux")
T = torch.tensor([7, 640])


def build(name, size=16, **scheduler):
    row = named(name)
    mine = {key: value for key, value in row.arguments.items() if key not in ("height", "width")}
    pipe = row.build()
    if scheduler:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **scheduler)
    model = DiffusionModel(pipe, row.train, row.stateless, mine)
    return model, Sampling(guidance_scale=row.guidance and row.guidance[1], height=size, width=size)


@functools.cache
def adapted(name):
    model, sampling = build(name)
    with_adapters(model, named(name).lora_targets)
    return model, DirectCalls(model, sampling)


def normal(calls, rows=2):
    return torch.randn(rows, *calls.latent_shape, generator=torch.Generator().manual_seed(rows))


def by_hand(pipe, z, t, sigmas):
    """As a user of ``diffusers`` writes it, family by family; ``t``: levels, ``sigmas``: of the flow's levels."""
    prompts = list(PROMPTS[: len(z)])
    kind = type(pipe).__name__
    if kind == "StableDiffusionPipeline":
        text, _ = pipe.encode_prompt(prompts, "cpu", 1, False)
        return pipe.unet(z, t, encoder_hidden_states=text).sample
    if kind == "StableDiffusionXLPipeline":
        text, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]] * len(z))
        added = {"text_embeds": pooled, "time_ids": sizes}
        return pipe.unet(z, t, encoder_hidden_states=text, added_cond_kwargs=added).sample
    told = 1000 * sigmas[t].float()
    if kind == "StableDiffusion3Pipeline":
        text, _, pooled, _ = pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=8
        )
        return pipe.transformer(z, text, pooled, told).sample
    text, pooled, ids = pipe.encode_prompt(prompts, None, max_sequence_length=8)
    places = pipe._prepare_latent_image_ids(len(z), 2, 2, "cpu", torch.float32)
    guidance = torch.full((len(z),), 3.5)
    return pipe.transformer(z, text, pooled, told / 1000, img_ids=places, txt_ids=ids, guidance=guidance).sample


@pytest.mark.parametrize("name", BY_HAND)
def test_predictions_are_those_of_the_network_called_by_hand(name):
    model, calls = adapted(name)
    z = normal(calls)
    conditioning = calls.conditioning(PROMPTS)
    got = calls.predict(conditioning, z, T)
    sigmas = model.pipe.scheduler.__class__.from_config(model.pipe.scheduler.config).sigmas.flip(0) if (
        calls.levels.flow) else None  # fmt: skip
    expected = by_hand(model.pipe, z, T, sigmas)
    assert got.shape == z.shape
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(got[0], calls.predict(conditioning, z, T.flip(0))[0], atol=1e-4)  # t matters
    # gradient is autograd's business, and the conditioning has none
    names, weights = zip(*model.trainable_parameters(), strict=True)
    ours, theirs = (torch.autograd.grad(x.square().sum(), weights, allow_unused=True) for x in (got, expected))
    for parameter, a, b in zip(names, ours, theirs, strict=True):
        assert (a is None) == (b is None), parameter
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert any(a is not None and a.any() for a in ours)
    with torch.no_grad():
        assert not calls.predict(conditioning, z, T).requires_grad


@pytest.mark.parametrize("name", BY_HAND)
def test_reference_is_the_model_without_adapters(name):
    model, calls = adapted(name)
    z = normal(calls)
    plain, sampling = build(name)
    without = DirectCalls(plain, sampling)
    conditioning = calls.conditioning(PROMPTS)
    with model.reference(), torch.no_grad():
        got = calls.predict(conditioning, z, T)
    assert torch.equal(got, without.predict(without.conditioning(PROMPTS), z, T))
    assert not torch.allclose(got, calls.predict(conditioning, z, T), atol=1e-4)


def test_reference_of_a_fully_tuned_model_is_its_frozen_copy():
    model, sampling = build("sd3")
    model.denoiser.requires_grad_(True)
    model.keep_reference()
    calls = DirectCalls(model, sampling)
    conditioning, z = calls.conditioning(PROMPTS), normal(calls)
    before = calls.predict(conditioning, z, T).detach()
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            parameter.mul_(1.1)
    with model.reference(), torch.no_grad():
        assert torch.equal(calls.predict(conditioning, z, T), before)
    assert not torch.allclose(calls.predict(conditioning, z, T), before, atol=1e-3)


def test_more_latents_than_prompts_go_round():
    """A pair's two pictures have one prompt, which is encoded once."""
    for name in BY_HAND:
        _, calls = adapted(name)
        conditioning, z = calls.conditioning(PROMPTS), normal(calls, 4)
        t = torch.tensor([3, 500, 900, 42])
        with torch.no_grad():
            together = calls.predict(conditioning, z, t)
            apart = torch.cat([calls.predict(conditioning, z[r], t[r]) for r in (slice(0, 2), slice(2, 4))])
        torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="3 latents"):
        calls.predict(conditioning, z[:3], t[:3])


def test_prompts_that_are_encoded_once_give_the_same():
    model, sampling = build("sd3")
    model.prompt_cache = PromptCache(4)
    calls = DirectCalls(model, sampling)
    z = normal(calls)
    with torch.no_grad():
        first, again = (calls.predict(calls.conditioning(PROMPTS), z, T) for _ in range(2))
        model.prompt_cache = None
        torch.testing.assert_close(calls.predict(calls.conditioning(PROMPTS), z, T), first, rtol=0, atol=1e-5)
    assert torch.equal(first, again)


def test_v_predictions_are_the_networks_own():
    model, sampling = build("sd", prediction_type="v_prediction")
    calls = DirectCalls(model, sampling)
    z = normal(calls)
    with torch.no_grad():
        got = calls.predict(calls.conditioning(PROMPTS), z, T)
        torch.testing.assert_close(got, by_hand(model.pipe, z, T, None), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "map_", "sign", "off"),
    [
        ("sd-pag", (1.0, 0.0), 1.0, {"pag_scale": 0.0, "guidance_scale": 1.0}),
        ("lcm", (1.0, 0.0), 1.0, {"guidance_scale": 4.0}),  # an input of the network
        ("pixart-sigma", (1.0, 0.0), 1.0, {"guidance_scale": 1.0}),  # half of the channels
        ("lumina2", (-1e-3, 1.0), -1.0, {"guidance_scale": 1.0}),  # counts from noise
        ("hidream", (1.0, 0.0), -1.0, {"guidance_scale": 1.0}),
        ("qwen-image", (1e-3, 0.0), 1.0, {"true_cfg_scale": 1.0}),  # guidance is a second call
    ],
)
def test_what_is_found_of_other_families(name, map_, sign, off):
    """That each row of a call at mixed levels is the loop's own, construction itself has tried."""
    model, sampling = build(name)
    processors = getattr(model.denoiser, "attn_processors", None)
    calls = DirectCalls(model, sampling)
    assert (calls._map, calls._part.sign, calls._guidance) == (map_, sign, off)
    if processors:  # PAG changes them, and its call was stopped in the middle
        assert all(own is processors[key] for key, own in model.denoiser.attn_processors.items())
    z = normal(calls)
    with torch.no_grad():
        got = calls.predict(calls.conditioning(PROMPTS), z, T)
    assert got.shape == z.shape
    assert got.isfinite().all()


def test_the_solver_is_of_no_account():
    model, sampling = build("sd")
    own, found = model.pipe.scheduler, {}
    for name in SAMPLERS:
        model.pipe.scheduler = own
        model.set_scheduler(name)
        calls = DirectCalls(model, sampling)
        with torch.no_grad():
            found[name] = calls.predict(calls.conditioning(PROMPTS), normal(calls), T)
    for got in found.values():
        torch.testing.assert_close(got, found["DDIM"], rtol=0, atol=1e-6)


def test_a_flow_is_told_its_levels_though_its_solver_rounds_them():
    model, sampling = build("sd3")
    solver = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    model.pipe.scheduler = UniPCMultistepScheduler(**solver)
    calls = DirectCalls(model, sampling)
    assert (1000 * calls.levels.sigmas[T] % 1).all()
    conditioning, z = calls.conditioning(PROMPTS), normal(calls)
    assert not conditioning.arguments["timestep"].is_floating_point()
    with torch.no_grad():
        got, expected = calls.predict(conditioning, z, T), by_hand(model.pipe, z, T, calls.levels.sigmas)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_modules_without_gradient_in_evaluation_mode_have_one():
    """HiDream's experts."""
    model, sampling = build("hidream")
    calls = DirectCalls(model, sampling)
    conditioning, z = calls.conditioning(PROMPTS), normal(calls)
    model.denoiser.requires_grad_(True)
    got = calls.predict(conditioning, z, T)
    got.square().sum().backward()
    experts = [p for name, p in model.trainable_parameters() if "experts" in name]
    assert experts
    assert all(p.grad is not None and p.grad.any() for p in experts)
    with torch.no_grad():
        torch.testing.assert_close(calls.predict(conditioning, z, T), got.detach(), rtol=0, atol=1e-5)


def test_latents_that_change_their_precision_in_the_loop():
    """Autocast: the first call gets float32, the others what the network gives."""
    model, sampling = build("flux")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        calls = DirectCalls(model, sampling)
        conditioning = calls.conditioning(PROMPTS)
        got = calls.predict(conditioning, normal(calls), T)
    assert (calls._map, conditioning.arguments["timestep"].dtype, got.dtype) == ((1e-3, 0.0), torch.float32,
                                                                              torch.bfloat16)  # fmt: skip


def test_nothing_of_the_pipeline_stays_changed():
    model, sampling = build("sdxl")
    model.pipe.vae.register_to_config(force_upcast=True)
    model.half()
    model.denoiser.train()
    state = {name: x.clone() for name, x in model.state_dict().items()}
    steps = model.pipe.scheduler.timesteps.clone()
    calls = DirectCalls(model, sampling)  # SDXL's VAE is float32 where it decodes
    calls.conditioning(PROMPTS)
    assert {x.dtype for x in model.state_dict().values()} == {torch.float16}
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert torch.equal(steps, model.pipe.scheduler.timesteps)
    assert model.denoiser.training
    with torch.no_grad():
        assert calls.predict(calls.conditioning(PROMPTS), normal(calls), T).dtype == torch.float16


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        (
            "z-image",
            16,
            "expected one argument that is the latents of the 2 prompts, found none .lists: 'x', 'cap_feats'",
        ),
        ("if", 16, "is no part of the network's output"),
        ("hunyuan-image", 16, "calls it 2 times a step"),
        ("flux-2-klein", 16, "how its VAE's latents .* become its own .* is not known"),
        ("sana-sprint", 32, "SCMScheduler .* not known here"),
    ],
)
def test_what_cannot_be_called_so_is_refused_by_name(name, size, said):
    model, sampling = build(name, size)
    with pytest.raises(ConfigurationError, match=said) as refused:
        DirectCalls(model, sampling)
    kind = type(model.pipe).__name__
    assert kind in str(refused.value) or "Scheduler" in str(refused.value)
    assert "\n" not in str(refused.value)


def spread(layout: str) -> dict[str, Any]:
    """Prediction, reference, gradients and moments of two processes: how far they are from one's."""
    from torch.distributed.device_mesh import init_device_mesh

    from nemo_aligner_diffusion.diffusion.network.latents import moments, vae_fingerprint
    from nemo_aligner_diffusion.parallel.layout import Layout
    from nemo_aligner_diffusion.parallel.parallelism import Parallelism

    def made() -> DiffusionModel:
        return with_adapters(tiny_stable_diffusion(torch.float64, channels=(16, 32)), ("to_q", "to_out.0"))

    def used(model: DiffusionModel) -> list[torch.Tensor]:
        calls = DirectCalls(model, Sampling(guidance_scale=4.0))
        conditioning, z = calls.conditioning(PROMPTS), normal(calls).double()
        got = calls.predict(conditioning, z, T)
        with model.reference(), torch.no_grad():
            reference = calls.predict(conditioning, z, T)
        got.square().sum().backward()
        pictures = torch.linspace(0, 1, 2 * 3 * 16 * 16, dtype=torch.float64).reshape(2, 3, 16, 16)
        return [got.detach(), reference, moments(model, pictures)]

    plain, model = made(), made()
    data, tensor = (2, 1) if layout == "fsdp" else (1, 2)
    mesh = init_device_mesh("cpu", (data, tensor), mesh_dim_names=("data_parallel", "tensor_parallel"))
    parallel = Parallelism(Layout(data=data, tensor=tensor, fsdp=layout == "fsdp",
                                  sharded_frozen=("vae", "text_encoder") if layout == "fsdp" else ()))  # fmt: skip
    parallel.apply(mesh, [model.denoiser], model.frozen_parts())
    pairs = list(zip(used(model), used(plain), strict=True))
    expected = dict(plain.trainable_parameters())
    for name, parameter in model.trainable_parameters():
        pairs.append((parallel.placement(name).full(parameter.grad), expected[name].grad))
    same = vae_fingerprint(model) == vae_fingerprint(plain)
    return {"parts": len(pairs), "same VAE": same, "far": max(float((a - b).abs().max()) for a, b in pairs)}


@pytest.mark.parametrize("layout", ["fsdp", "tensor"])
def test_two_processes_call_as_one(processes: ProcessPool, layout: str) -> None:
    for answer in processes.run(2, spread, layout):
        assert answer["parts"] > 10
        assert answer["same VAE"]
        assert answer["far"] < 1e-9
