"""What a pipeline must not do is refused by name, before it gives a wrong gradient."""

from __future__ import annotations

import pytest
import torch
from diffusers import ConfigMixin, DDIMPipeline, DDIMScheduler, DiffusionPipeline, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from tiny.gradients import flat, generators, relative, reward, run
from tiny.stable_diffusion import tiny_pipeline

from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.plan import Plan
from nemo_aligner_diffusion.errors import ConfigurationError

STEPS = 3
LAST = Plan((STEPS - 2, STEPS - 1))


class Memory:
    """What a network may be handed: an object that is no tensor."""


class Pixels(ModelMixin, ConfigMixin):
    """Predicts noise in pixels."""

    @register_to_config
    def __init__(self, remembers: bool = False) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(3, 3)
        self.remembers, self.calls = remembers, 0

    def forward(self, pixels, timestep, memory=None):
        self.calls += 1
        mixed = self.mix(pixels.movedim(1, -1)).movedim(-1, 1)
        return mixed * (self.calls if self.remembers else 1)


class PixelPipeline(DiffusionPipeline):
    """The least that makes pictures from prompts: no decoder, no text encoder."""

    memory = None

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @property
    def solver(self):
        return self.scheduler

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=STEPS, generator=None, output_type="pt", return_dict=True):
        self.solver.set_timesteps(num_inference_steps)
        pixels = randn_tensor((len(prompt), 3, 4, 4), generator=generator, dtype=self.unet.dtype)
        for t in self.solver.timesteps:
            noise = self.unet(pixels, t, memory=self.memory)
            pixels = self.solver.step(noise, t, pixels, return_dict=False)[0]
        return (pixels.sigmoid(),)


class WithMemory(PixelPipeline):
    memory = Memory()


class WithItsOwnScheduler(PixelPipeline):
    own = DDIMScheduler(clip_sample=False)

    @property
    def solver(self):
        return self.own


def model_of(kind, remembers=False, **options):
    torch.manual_seed(0)
    pipe = kind(Pixels(remembers), DDIMScheduler(clip_sample=False)).to(dtype=torch.float64)
    model = DiffusionModel(pipe, **options)
    model.denoiser.requires_grad_(True)
    return model


def test_a_pipeline_without_a_decoder_has_the_naive_graph_s_gradient():
    model = model_of(PixelPipeline)
    inputs = model.inputs(["red", "blue"], STEPS)
    result, seen = run(model, LAST, inputs)
    got = flat(model, result.surrogate())
    assert torch.equal(seen.pictures(), model.pipe(**inputs, generator=generators())[0])
    pipe = model.pipe
    pipe.scheduler.set_timesteps(STEPS)
    z = torch.cat([torch.randn(1, 3, 4, 4, generator=g, dtype=torch.float64) for g in generators()])
    for i, t in enumerate(pipe.scheduler.timesteps):
        noise = pipe.unet(z, t)
        z = pipe.scheduler.step(noise if i in LAST.active else noise.detach(), t, z).prev_sample
    assert relative(got, flat(model, -reward(z.sigmoid()).mean())) < 1e-12


def test_an_object_that_may_remember_is_refused_unless_declared():
    model = model_of(WithMemory)
    with pytest.raises(ConfigurationError, match=r"WithMemory hands its unet a Memory: .*stateless=\[Memory\]"):
        run(model, LAST, model.inputs(["red", "blue"], STEPS))
    declared = model_of(WithMemory, stateless=["Memory"])
    result, _ = run(declared, LAST, declared.inputs(["red", "blue"], STEPS))
    plain = model_of(PixelPipeline)
    expected = flat(plain, run(plain, LAST, plain.inputs(["red", "blue"], STEPS))[0].surrogate())
    assert torch.equal(flat(declared, result.surrogate()), expected)


def test_another_scheduler_than_the_pipeline_s_is_refused():
    model = model_of(WithItsOwnScheduler)
    model.pipe.scheduler.set_timesteps(STEPS)
    with pytest.raises(ConfigurationError, match=r"announced 3 steps and its scheduler made 0: it steps another"):
        run(model, LAST, model.inputs(["red", "blue"], STEPS))


def test_a_network_that_gives_another_output_when_recomputed_is_an_error():
    model = model_of(PixelPipeline, remembers=True)
    result, _ = run(model, LAST, model.inputs(["red", "blue"], STEPS))
    with pytest.raises(RuntimeError, match="Pixels, recomputed in the backward pass, gives another output"):
        result.surrogate().backward()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"guidance_scal": 3.0},
            "arguments.guidance_scal is no argument of StableDiffusionPipeline; did you mean guidance_",
        ),
        ({"num_inference_steps": 3}, "arguments.num_inference_steps is set by model.infer.inference_steps"),
        ({"generator": None}, "arguments.generator is set by model.seed"),
        ({"height": 64}, "arguments.height is set by model.infer.height"),
        ({"width": 64}, "arguments.width is set by model.infer.width"),
        ({"guidance_scale": 3.0}, "arguments.guidance_scale is set by model.infer.unconditional_guidance_scale"),
    ],
)
def test_arguments_that_a_pipeline_does_not_take_are_refused(arguments, words):
    with pytest.raises(ConfigurationError, match=words):
        DiffusionModel(tiny_pipeline(), arguments=arguments)


def test_a_component_that_is_no_denoiser_is_not_trained():
    with pytest.raises(ConfigurationError, match=r"has no denoiser 'vae' \(it has unet\)"):
        DiffusionModel(tiny_pipeline(), trained="vae")


def test_a_pipeline_that_makes_no_pictures_from_prompts_is_refused():
    unet = UNet2DModel(4, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
                       norm_num_groups=4)  # fmt: skip
    with pytest.raises(ConfigurationError, match="DDIMPipeline makes no pictures from prompts alone: it takes no `pro"):
        DiffusionModel(DDIMPipeline(unet, DDIMScheduler()))
