"""Architectures are recognised from tensors' names and shapes: the published ones at their real sizes, on no memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from tiny.published import narrow, sd3_names, unet_names, vae_names

from nemo_aligner_diffusion.diffusion.files.architectures import ARCHITECTURES, fitted
from nemo_aligner_diffusion.diffusion.recognition import architecture_of, denoiser_shapes, recognise, vae_shapes
from nemo_aligner_diffusion.diffusion.settings import WeightsSettings
from nemo_aligner_diffusion.errors import CheckpointError

Shapes = dict[str, tuple[int, ...]]
SLOW = pytest.mark.slow


def empty(name: str, part: str) -> Any:
    kind, config = ARCHITECTURES[name].components[part]
    with init_empty_weights(include_buffers=True):
        return getattr(diffusers, kind).from_config(config)


def shapes_of(tensors: Mapping[str, Any]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def header_only(shapes: Shapes, file: Path) -> Path:
    """A safetensors file of these shapes whose numbers take no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return file


@pytest.mark.parametrize("name", ["sd15", "sd21", *(pytest.param(n, marks=SLOW) for n in ("sdxl", "sd35", "flux1"))])
def test_published_sizes(name: str, tmp_path: Path) -> None:
    known = ARCHITECTURES[name]
    module, vae = empty(name, known.denoiser), empty(name, "vae")
    ours, vae_ours = module.state_dict(), vae.state_dict()
    namings = [(ours, vae_ours)]
    if known.denoiser == "unet":
        namings.append((unet_names(ours), vae_names(vae_ours)))
    elif name == "sd35":
        namings.append((sd3_names(module), vae_names(vae_ours)))
    for denoiser, autoencoder in namings:
        prefixes = ("", "first_stage_model.") if denoiser is ours else ("model.diffusion_model.", "first_stage_model.")
        whole = {f"{prefixes[0]}{n}": shape for n, shape in shapes_of(denoiser).items()}
        whole |= {f"{prefixes[1]}{n}": shape for n, shape in shapes_of(autoencoder).items()}
        file = header_only(whole, tmp_path / "whole.safetensors")
        for weights in (WeightsSettings(from_pretrained=str(file)), WeightsSettings(denoiser_path=str(file))):
            found = recognise(weights)
            assert (found.architecture, found.pipeline) == (name, known.pipeline)
        for part, network, inner in (
            (known.denoiser, module, denoiser_shapes(whole)), ("vae", vae, vae_shapes(whole))
        ):  # fmt: skip
            kind, published = known.components[part]
            for key, value in fitted(kind, published, inner).items():
                mine = network.config[key]
                assert value == (list(mine) if isinstance(mine, tuple) else mine), key


def test_a_file_is_recognised_without_torch(tmp_path: Path) -> None:
    shapes = shapes_of(narrow("sd15").unet.state_dict())
    file = header_only(shapes, tmp_path / "unet.safetensors")
    code = (
        "import sys; from nemo_aligner_diffusion.diffusion.recognition import recognise\n"
        "from nemo_aligner_diffusion.diffusion.settings import WeightsSettings\n"
        f"print(recognise(WeightsSettings(denoiser_path={str(file)!r})).architecture, 'torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["sd15", "False"]


def first(channels: int) -> Callable[[Shapes], Shapes]:
    return lambda shapes: {**shapes, "conv_in.weight": (32, channels, 3, 3)}


def with_tensor(name: str, shape: tuple[int, ...]) -> Callable[[Shapes], Shapes]:
    return lambda shapes: {**shapes, name: shape}


REFUSED = {
    "inpainting": (first(9), r"an inpainting model of the Stable Diffusion 1 kind \(9 input channels\)"),
    "instruct-pix2pix": (first(8), "InstructPix2Pix"),
    "upscaler": (first(7), "the x4 upscaler"),
    "depth": (first(5), "the depth-to-image model"),
    "refiner": (with_tensor("add_embedding.linear_1.weight", (8, 2560)), "an unCLIP model|the SDXL refiner"),
    "unCLIP": (with_tensor("class_embedding.linear_1.weight", (8, 8)), "an unCLIP model"),
    "LCM": (with_tensor("time_embedding.cond_proj.weight", (8, 256)), "a latent consistency model"),
    "Playground": (with_tensor("edm_mean", (4,)), r"Playground v2\.5"),
    "LoRA": (lambda shapes: {"unet.mid_block.to_q.lora_A.weight": (8, 32)}, r"a LoRA.*model\.peft\.restore_from_path"),
    "scaled fp8": (with_tensor("mid_block.to_q.scale_weight", ()), "scaled 8 bit"),
    "VAE": (lambda shapes: {"decoder.conv_in.weight": (8, 4, 3, 3)}, "holds no denoiser.*a VAE's"),
    "fill": (
        lambda shapes: {"double_blocks.0.img_attn.qkv.weight": (9, 9), "img_in.weight": (9, 384)},
        "FLUX.1 transformer with 384 input channels",
    ),
}


@pytest.fixture(scope="module")
def sd15() -> Shapes:
    return shapes_of(narrow("sd15").unet.state_dict())


@pytest.mark.parametrize("kind", REFUSED)
def test_what_makes_no_pictures_from_prompts_alone_is_named_and_refused(sd15: Shapes, kind: str) -> None:
    change, words = REFUSED[kind]
    with pytest.raises(CheckpointError, match=rf"^some\.file: .*({words})"):
        architecture_of(change(sd15), Path("some.file"))


def test_transformers_that_are_read_from_folders_alone_are_named(tmp_path: Path) -> None:
    for tensor, name in (
        ("double_stream_modulation_img.lin.weight", "flux2_klein"),
        ("cap_embedder.0.weight", "z_image"),
    ):
        assert architecture_of({f"model.diffusion_model.{tensor}": (4, 4)}, tmp_path) == name
    file = header_only({"distilled_guidance_layer.in_proj.bias": (4,)}, tmp_path / "chroma.safetensors")
    with pytest.raises(
        CheckpointError, match=r"chroma\.safetensors: this is Chroma, of which single files are not read"
    ):
        recognise(WeightsSettings(from_pretrained=str(file)))
