"""Given pictures as latents: those of diffusers' own img2img pipelines."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    FluxImg2ImgPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from tiny.gradients import generators
from tiny_pipelines import named

from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.network.latents import encode, from_moments, moments, vae_fingerprint
from nemo_aligner_diffusion.errors import ConfigurationError

IMG2IMG = {
    "sd": StableDiffusionImg2ImgPipeline,
    "sdxl": StableDiffusionXLImg2ImgPipeline,
    "sd3": StableDiffusion3Img2ImgPipeline,
    "flux": FluxImg2ImgPipeline,
}


def build(name):
    return DiffusionModel(named(name).build())


def pictures(rows=3):
    return torch.rand(rows, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def img2img_latents(model, name, images, sources):
    """What the pipeline's img2img makes of pictures, before it adds noise."""
    other = IMG2IMG[name](**model.pipe.components)
    other.scheduler = type("NoNoise", (), {"add_noise": lambda _, x, *rest: x, "scale_noise": lambda _, x, *rest: x})()
    image = other.image_processor.preprocess(images)
    if name == "flux":
        given = (image, None, len(images), 4, 16, 16, torch.float32, "cpu", sources)
        return other.prepare_latents(*given)[0]
    return other.prepare_latents(image, None, len(images), 1, torch.float32, "cpu", sources)


@pytest.mark.parametrize("name", [*IMG2IMG, "sdxl with mean and deviation"])
def test_latents_are_those_of_the_img2img_pipelines(name):
    model = build(name.split()[0])
    if "mean" in name:
        model.pipe.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 1.2, 0.9, 1.1])
    expected = img2img_latents(model, name.split()[0], pictures(), generators(3))
    got = encode(model, pictures(), generators(3), latent_shape=expected.shape[1:])
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-6)
    kept = moments(model, pictures())
    assert kept.shape == (3, 2, 4, 4, 4)
    torch.testing.assert_close(from_moments(model, kept, generators(3)), expected, rtol=0, atol=5e-6)
    mode = encode(model, pictures())
    assert (mode - got).abs().max() > 0.01
    torch.testing.assert_close(mode[1:2], encode(model, pictures()[1:2]), rtol=0, atol=5e-6)


def test_the_vae_encodes_in_its_own_precision_whatever_autocast_says():
    model = build("sdxl")
    expected = moments(model, pictures())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(moments(model, pictures()), expected)
    model.pipe.vae.to(torch.bfloat16)
    for upcast in (True, False):
        model.pipe.vae.register_to_config(force_upcast=upcast)
        got = moments(model, pictures())
        assert got.dtype == torch.float32
        assert model.pipe.vae.dtype == torch.bfloat16
        assert bool((got == got.bfloat16().float()).all()) is not upcast


@pytest.mark.parametrize("name", ["qwen-image", "sana"])
def test_other_autoencoders(name):
    """Of videos, by channel; and without a posterior."""
    model = build(name)
    size = 32 if isinstance(model.pipe.vae, AutoencoderDC) else 16
    images = torch.nn.functional.interpolate(pictures(2), size=size)
    kept = moments(model, images)
    assert kept.ndim == 5
    latents = from_moments(model, kept, generators(2))
    if name == "sana":
        assert not kept[:, 1].any()
        expected = model.pipe.vae.encode(2 * images - 1).latent * model.pipe.vae.config.scaling_factor
    else:
        latents = from_moments(model, kept)
        mode = model.pipe.vae.encode(2 * images.unsqueeze(2) - 1).latent_dist.mode()
        mean, std = (torch.tensor(model.pipe.vae.config[k]).reshape(1, -1, 1, 1, 1)
                     for k in ("latents_mean", "latents_std"))  # fmt: skip
        expected = model.pipe._pack_latents((mode - mean) / std, 2, 4, *mode.shape[-2:])
    torch.testing.assert_close(latents, expected.detach(), rtol=0, atol=5e-6)


def test_a_fingerprint_is_of_what_encodes():
    model, other = build("sd"), build("sd")
    assert vae_fingerprint(model) == vae_fingerprint(other)
    other.pipe.vae.to(torch.bfloat16)
    other.pipe.vae.decoder.conv_in.weight.data.add_(1)
    assert vae_fingerprint(model) == vae_fingerprint(other)
    other.pipe.vae.encoder.conv_in.weight.data[0, 0, 0, 0] += 0.1
    assert vae_fingerprint(model) != vae_fingerprint(other)


def test_what_has_no_such_latents_is_refused():
    with pytest.raises(ConfigurationError, match="Kandinsky3Pipeline has no VAE"):
        encode(build("kandinsky3"), pictures())
    with pytest.raises(ConfigurationError, match=r"latents \(4, 4, 4\) .* called with \(4, 8, 8\); expected pictures"):
        encode(build("sd"), pictures(), latent_shape=(4, 8, 8))
