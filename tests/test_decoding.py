"""How pictures are decoded for a reward's gradient: equal to the plain decoding, or how far from it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from naive_pipeline import naive_loss
from safetensors.torch import save_file
from tiny.gradients import flat, generators, relative, run, with_adapters
from tiny.stable_diffusion import save_tiny_pipeline
from tiny_pipelines import PROMPTS, named
from torch import Tensor, nn

from benchmarks.decode_memory import KINDS, counted, measured
from nemo_aligner_diffusion.config.load import load_settings
from nemo_aligner_diffusion.diffusion.decoding import (
    decode,
    decode_as_set_up,
    load_small_decoder,
    overflows_in_autocast,
    set_up_decoder,
)
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.plan import Plan
from nemo_aligner_diffusion.diffusion.settings import DecoderSettings
from nemo_aligner_diffusion.diffusion.trajectory import distance_of_training, sample
from nemo_aligner_diffusion.errors import CheckpointError, ConfigurationError
from nemo_aligner_diffusion.rewards import build_reward
from nemo_aligner_diffusion.training.build import build_model, build_module

STEPS, LAST = 2, Plan(active=(1,))
CHECKPOINTED = ("sd", "sdxl", "sd3", "flux", "flux-2-klein", "z-image")


def model_of(name: str, dtype: torch.dtype = torch.float64, **parts: Any) -> DiffusionModel:
    row = named(name)
    pipe = row.build(dtype)
    for part, network in parts.items():
        setattr(pipe, part, network)
    mine = {key: value for key, value in row.arguments.items() if key not in ("height", "width")}
    return with_adapters(DiffusionModel(pipe, row.train, row.stateless, mine), row.lora_targets)


def inputs_of(model: DiffusionModel, name: str, pixels: int = 16) -> dict[str, Any]:
    guidance = named(name).guidance
    return model.inputs(PROMPTS, STEPS, guidance[1] if guidance else None, pixels, pixels)


def gradient(model: DiffusionModel, name: str, pixels: int = 16, **options: Any) -> tuple[Tensor, Tensor]:
    """Of the adapters, and the pictures that were scored."""
    result, seen = run(model, LAST, inputs_of(model, name, pixels), **options)
    return flat(model, result.surrogate()), seen.pictures()


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointing_changes_neither_picture_nor_gradient(name: str) -> None:
    model = model_of(name)
    expected, picture = gradient(model, name)
    set_up_decoder(model, DecoderSettings(activation_checkpointing=True))
    calls = []
    model.pipe.vae.decoder.up_blocks[0].register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    for rows in (None, 1):
        found, again = gradient(model, name, decode_rows=rows)
        assert relative(found, expected) < 1e-12
        assert torch.equal(again, picture) if rows is None else (again - picture).abs().max() < 1e-12
    assert len(calls) == 2 + 2 * 3  # whole: once, and again; by rows: once, the row again, and its blocks again


def tiled_by_diffusers(vae: Any, latents: Tensor) -> Tensor:
    """With gradient, by diffusers' own methods, in tiles of 16 pixels."""
    if isinstance(vae, AutoencoderKL) or hasattr(vae, "tile_latent_min_size"):
        vae.tile_sample_min_size, vae.tile_latent_min_size = 16, 4
        vae.enable_tiling()
    else:
        vae.enable_tiling(16, 16, 12, 12)
    return vae.decode(latents, return_dict=False)[0]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["sd", "flux-2-klein", "qwen-image"])
def test_tiles_are_those_of_diffusers_with_their_gradient(name: str, checkpointing: bool) -> None:
    vae, other = (named(name).build(torch.float64).vae.requires_grad_(False) for _ in range(2))
    if checkpointing and not vae._supports_gradient_checkpointing:
        model = model_of(name)
        with pytest.raises(ConfigurationError, match="has none for AutoencoderKLQwenImage; leave it false, and use"):
            set_up_decoder(model, DecoderSettings(activation_checkpointing=True))
        return
    if checkpointing:
        vae.enable_gradient_checkpointing()
    shape = (2, 4, 8, 8) if name != "qwen-image" else (2, 4, 1, 8, 8)
    torch.manual_seed(0)
    latents = torch.randn(shape, dtype=torch.float64)
    weights = torch.randn(3, 32, 32, dtype=torch.float64)
    found, kept = [], (vae.decoder, dict(vars(vae)))
    for rows in (None, 1):
        leaf = latents.clone().requires_grad_()
        picture = decode(vae, leaf, rows, return_dict=False, tile=16)[0]
        found.append((picture, torch.autograd.grad((picture * weights).sum(), leaf)[0]))
    assert (vae.decoder, {k: v for k, v in vars(vae).items() if not k.startswith(("_feat", "_enc", "_conv"))}) == (
        kept[0], {k: v for k, v in kept[1].items() if not k.startswith(("_feat", "_enc", "_conv"))}
    )  # fmt: skip
    leaf = latents.clone().requires_grad_()
    expected = tiled_by_diffusers(other, leaf)
    direction = torch.autograd.grad((expected * weights).sum(), leaf)[0]
    assert torch.equal(found[0][0], expected)
    for picture, slope in found:
        assert (picture - expected).abs().max() < 1e-12
        assert relative(slope, direction) < 1e-12
    # how far that is from the plain decoding: norms and attention see a tile, not the picture. Of random weights and
    # noise up to 0.7 of the pixels' standard deviation; a run logs it of its own VAE
    plain = decode(vae, latents, None, return_dict=False)[0]
    far = (plain - expected.detach()).abs()
    assert 1e-3 < float(far.mean() / plain.std()) < 1.0
    assert torch.allclose(plain, named(name).build(torch.float64).vae.decode(latents, return_dict=False)[0])


def test_tiles_are_of_the_training_pictures_alone() -> None:
    model = model_of("sd", torch.float32)
    inputs = inputs_of(model, "sd", 128)
    plain = sample(model, generators(), inputs)
    set_up_decoder(model, DecoderSettings(tiling=64))
    assert torch.equal(sample(model, generators(), inputs), plain)
    seen = sample(model, generators(), inputs, as_in_training=True)
    _, scored = gradient(model, "sd", 128)
    assert torch.equal(scored, seen)
    assert not torch.equal(scored, plain)
    far = (model.pipe.vae.use_tiling, distance_of_training(model, inputs))
    assert far[0] is False
    assert far[1] == pytest.approx((float((seen - plain).abs().mean()), float((seen - plain).abs().max())), rel=1e-4)


def tiny_autoencoder(latent_channels: int = 4, blocks: int = 3) -> AutoencoderTiny:
    """Of the scale of the tiny pipelines' VAEs."""
    torch.manual_seed(11)
    channels, counts = (8,) * blocks, (1,) * blocks
    return AutoencoderTiny(encoder_block_out_channels=channels, decoder_block_out_channels=channels,
                           num_encoder_blocks=counts, num_decoder_blocks=counts,
                           latent_channels=latent_channels)  # fmt: skip


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "z-image"])
def test_a_small_decoder_makes_the_pictures_of_the_pipeline_that_has_it(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    tiny_autoencoder(model.pipe.vae.config.latent_channels).save_pretrained(tmp_path)
    before = sample(model, generators(), inputs_of(model, name))
    small = load_small_decoder(tmp_path).to(torch.float64)
    set_up_decoder(model, DecoderSettings(small_decoder=str(tmp_path)), small)
    other = model_of(name, vae=small)
    expected, pictures = naive_loss(other, LAST, lambda: inputs_of(other, name))
    for rows in (None, 1):
        found, seen = gradient(model, name, decode_rows=rows)
        assert (seen - pictures.detach()).abs().max() < 1e-6  # Z-Image's scheduler is given float32
        assert relative(found, flat(other, naive_loss(other, LAST, lambda: inputs_of(other, name))[0])) < 1e-6
    assert float(expected) != 0
    assert torch.equal(sample(model, generators(), inputs_of(model, name)), before)  # validation: the VAE's
    assert (before - seen).abs().max() > 1e-3
    assert model.described()["reward_sees"] == f"pictures of the small decoder {tmp_path}"
    assert "small_decoder" in dict(model.named_children())  # goes where the model goes
    assert not any(p.requires_grad for p in small.parameters())


class Block(nn.Module):
    """Of TAESD's own code (github.com/madebyollin/taesd, taesd.py)."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv(n, n), nn.ReLU(), conv(n, n), nn.ReLU(), conv(n, n))
        self.skip = nn.Identity()
        self.fuse = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(self.conv(x) + self.skip(x))


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def conv(n_in: int, n_out: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, padding=1, **options)


def taesd_decoder(latent_channels: int) -> nn.Sequential:
    def up() -> tuple[nn.Module, ...]:
        return Block(64), Block(64), Block(64), nn.Upsample(scale_factor=2), conv(64, 64, bias=False)

    return nn.Sequential(Clamp(), conv(latent_channels, 64), nn.ReLU(), *up(), *up(), *up(), Block(64), conv(64, 3))


@pytest.mark.parametrize(("channels", "suffix"), [(4, ".safetensors"), (16, ".pth")])
def test_a_file_of_taesd_is_read_by_its_own_names_or_diffusers(tmp_path: Path, channels: int, suffix: str) -> None:
    torch.manual_seed(0)
    own = taesd_decoder(channels)
    file = tmp_path / f"taesd_decoder{suffix}"
    save_file(own.state_dict(), file) if suffix == ".safetensors" else torch.save(own.state_dict(), file)
    latents = torch.randn(1, channels, 3, 3)
    small = load_small_decoder(file)
    assert torch.allclose(small.decode(latents).sample, own(latents) * 2 - 1, atol=1e-5)
    again = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({f"decoder.{name}": value for name, value in small.decoder.state_dict().items()}, again)
    assert torch.equal(load_small_decoder(again).decode(latents).sample, small.decode(latents).sample)


def test_small_decoders_that_do_not_fit_are_one_message(tmp_path: Path) -> None:
    file, folder, code = tmp_path / "a.safetensors", tmp_path / "folder", tmp_path / "code"
    save_file({"2.weight": torch.zeros(1)}, file)
    for path, message in (
        (file, "no decoder of TAESD's shape: expected 1.weight"),
        (tmp_path / "b.pth", "no such file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_small_decoder(path)
    save_file({"1.weight": torch.zeros(8, 4, 3, 3)}, file)
    with pytest.raises(CheckpointError, match="no decoder of TAESD's shape"):
        load_small_decoder(file)
    decoder = taesd_decoder(4).state_dict()
    del decoder["1.bias"]
    save_file(decoder, file)
    with pytest.raises(CheckpointError, match=r"lacks 1 weights of the decoder, such as decoder\.layers\.0\.bias"):
        load_small_decoder(file)
    code.mkdir()
    for name in ("StableDiffusionPipeline", "os.system", "UNet2DConditionModel"):
        (code / "config.json").write_text(f'{{"_class_name": "{name}"}}')
        with pytest.raises(CheckpointError, match=f"it says {name}"):
            load_small_decoder(code)
    tiny_autoencoder(16).save_pretrained(folder)
    model = model_of("sd", torch.float32)
    with pytest.raises(ConfigurationError, match=r"of 16 latent channels cannot decode for .* of 4"):
        set_up_decoder(model, DecoderSettings(small_decoder=str(folder)), load_small_decoder(folder))
    with pytest.raises(ConfigurationError, match=r"an AutoencoderTiny of 4 .* this pipeline's AutoencoderKLFlux2 of 4"):
        set_up_decoder(model_of("flux-2-klein"), DecoderSettings(small_decoder="x"), tiny_autoencoder())
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="not a complete AutoencoderTiny folder"):
        load_small_decoder(folder)
    set_up_decoder(model, DecoderSettings(small_decoder="x"), tiny_autoencoder(blocks=4))
    with pytest.raises(ConfigurationError, match=r"small_decoder = x: makes pictures .*32, 32.* makes .*16, 16"):
        distance_of_training(model, inputs_of(model, "sd"))
    with pytest.raises(ConfigurationError, match="first_stage_config: IFPipeline has no VAE"):
        set_up_decoder(model_of("if", torch.float32), DecoderSettings(tiling=64))


def overflowing(vae: Any) -> Any:
    """As SDXL's: numbers beyond float16's in the middle of the decoder, none at its end."""
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(1e6)
    return vae


def test_an_sdxl_vae_is_kept_out_of_float16_s_autocast() -> None:
    model = model_of("sdxl", torch.float32)
    vae = overflowing(model.pipe.vae)
    vae.register_to_config(force_upcast=True)
    expected, _ = gradient(model, "sdxl")
    with torch.autocast("cpu", torch.float16):
        assert not torch.isfinite(vae.decode(torch.randn(1, 4, 4, 4)).sample).all()
        found, seen = gradient(model, "sdxl", gradient_scale=256.0)
        assert torch.isfinite(sample(model, generators(), inputs_of(model, "sdxl"))).all()
    assert torch.isfinite(seen).all()
    assert seen.dtype == torch.float32
    assert float(torch.cosine_similarity(found, expected, dim=0)) > 0.9  # of a UNet in float16
    # bf16 has float32's range, and other pipelines' VAEs are theirs
    other = model_of("sd", torch.float32)
    other.pipe.vae.register_to_config(force_upcast=True)
    cpu = torch.device("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert not overflows_in_autocast(model.pipe, vae, cpu)
    with torch.autocast("cpu", torch.float16):
        assert overflows_in_autocast(model.pipe, vae, cpu)
        assert not overflows_in_autocast(other.pipe, other.pipe.vae, cpu)


def test_a_vae_in_bf16_beside_a_denoiser_in_float32_and_how_far_its_gradient_is() -> None:
    model = model_of("sdxl", torch.float32)
    expected, picture = gradient(model, "sdxl")
    model.pipe.vae.to(torch.bfloat16)
    for rows in (None, 1):
        found, seen = gradient(model, "sdxl", decode_rows=rows)
        assert seen.dtype == torch.bfloat16
        assert (seen - picture).abs().max() < 0.05
        assert float(torch.cosine_similarity(found, expected, dim=0)) > 0.99
    # autocast has no part in it: norms in float32 would double its memory
    latents = torch.randn(1, 4, 4, 4)
    plain = decode_as_set_up(model, model.pipe.vae, latents, None, False).sample
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(decode_as_set_up(model, model.pipe.vae, latents, None, False).sample, plain)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("decoding"))


def test_the_decoder_is_as_configured_and_the_log_says_what_the_reward_sees(
    pipeline: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def built(*words: str) -> tuple[Any, Any]:
        keys = [f"model.first_stage_config.{word}" for word in words]
        cfg = load_settings("draftp_sd", [f"model.from_pretrained={pipeline}", "rm=symmetry", *keys,
                                          "model.infer.inference_steps=2", "model.truncation_steps=1"])  # fmt: skip
        model = build_model(cfg)
        return model, build_module(cfg, model, build_reward(cfg.rm), 10)

    tiny_autoencoder().save_pretrained(tmp_path)
    caplog.set_level(logging.INFO)
    model, module = built("activation_checkpointing=true", "tiling=64")
    assert model.pipe.vae.is_gradient_checkpointing
    assert model.described()["reward_sees"] == "pictures decoded by tiles of 64 pixels"
    module.check_pipeline()
    assert "in training the reward scores pictures decoded by tiles of 64 pixels; the first is 0 from" in caplog.text
    model, module = built(f"small_decoder={tmp_path}")
    assert model.small_decoder.config.latent_channels == 4
    assert len(model.frozen_parts()["vae"]) == 2
    caplog.clear()
    module.check_pipeline()
    assert f"the reward scores pictures of the small decoder {tmp_path}; the first is 0." in caplog.text
    plain, module = built()
    caplog.clear()
    module.check_pipeline()
    assert "reward scores" not in caplog.text
    assert "reward_sees" not in plain.described()
    with pytest.raises(ConfigurationError, match="tiling = 100: expected a multiple of 64 pixels, such as 64"):
        built("tiling=100")
    both = DecoderSettings(tiling=64, small_decoder="x")
    assert both.unread_keys() == {"model.first_stage_config.tiling": "a small decoder decodes whole"}


def test_what_overflows_in_float16_is_named_once(pipeline: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not of SDXL's kind: its pipeline leaves the VAE in float16."""
    cfg = load_settings("draftp_sd", [f"model.from_pretrained={pipeline}", "rm=symmetry", "model.micro_batch_size=2",
                                      "model.infer.inference_steps=2", "model.truncation_steps=1"])  # fmt: skip
    model = build_model(cfg)
    module = build_module(cfg, model, build_reward(cfg.rm), 10)
    overflowing(model.pipe.vae)
    with torch.autocast("cpu", torch.float16):
        losses = [module.training_step({"prompts": ["a", "b"], "index": torch.arange(2)}, 0) for _ in range(2)]
    assert all(torch.isnan(loss) for loss in losses)
    said = [record.message for record in caplog.records if "not finite, in float16" in record.message]
    assert said == ["a reward is not finite, in float16: the decoder or the reward overflows, the latents are finite; "
                    "expected trainer.precision=bf16 or 32"]  # fmt: skip


def test_each_way_to_decode_needs_less_and_is_counted_as_it_is() -> None:
    """Float32 on the CPU, a narrow decoder of SD's shape: by the planner's ledger, and by the allocator's events."""
    size = (64, 2, torch.float32, 32)
    found = {kind: counted(kind, *size, gpu=False) for kind in KINDS}
    for kind in ("plain", "a picture at a time, checkpointing", "a picture at a time, tiles of half its side"):
        assert found[kind] == pytest.approx(measured(kind, *size), rel=0.1), kind
    shares = {kind: peak / found["plain"] for kind, peak in found.items()}
    assert shares["a picture at a time"] < 0.6
    assert shares["checkpointing"] < 0.75
    assert shares["a picture at a time, checkpointing"] < 0.45
    assert shares["a picture at a time, tiles of half its side"] < 0.25
    assert shares["a picture at a time, small decoder"] < 0.2
