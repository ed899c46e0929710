"""Networks made without memory and filled from files: the same as made with memory, whatever the file's format."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file
from tiny.stable_diffusion import tiny_parts, to_ldm_unet
from torch import nn

from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.errors import CheckpointError
from nemo_aligner_diffusion.formats.checkpoints import empty_module, load_component, read_tensors


@pytest.fixture(scope="module")
def unet():
    return tiny_parts(seed=7)["unet"]


def write(unet, layout, path):
    """``unet``'s weights below ``path`` in one of the layouts people have; the file."""
    weights = {name: value.clone() for name, value in unet.state_dict().items()}
    if layout == "folder":
        unet.save_pretrained(path / "folder")
        return path / "folder"
    if layout == "safetensors":
        save_file(weights, path / "unet.safetensors")
        return path / "unet.safetensors"
    if layout == "half":
        weights = {name: value.half() for name, value in weights.items()}
    if layout == "ldm":
        weights = {f"model.diffusion_model.{name}": value for name, value in to_ldm_unet(unet).items()}
    if layout == "nemo":
        weights = {f"model.model.diffusion_model.{name}": value for name, value in to_ldm_unet(unet).items()}
    nested = {"state_dict": weights} if layout in ("ldm", "nemo") else weights
    torch.save(nested, path / "unet.ckpt", _use_new_zipfile_serialization=layout != "before 1.6")
    return path / "unet.ckpt"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["folder", "safetensors", "ckpt", "before 1.6", "half", "ldm", "nemo"])
def test_every_format_gives_what_a_network_with_memory_gets(unet, pipeline, layout, dtype, tmp_path):
    source = write(unet, layout, tmp_path)
    expected = type(unet).from_config(unet.config).to(dtype)
    load_component(expected, "unet", source)  # in place
    loaded = load_model(pipeline, denoiser_path=source, dtype=dtype).denoiser
    ours, theirs = loaded.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    assert all(ours[name].dtype == dtype and torch.equal(ours[name], theirs[name]) for name in ours)
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in expected.named_parameters()]
    assert not any(parameter.requires_grad for parameter in loaded.parameters())  # what is trained is said later
    # nothing of the file is left in the network: it may be overwritten while that lives
    file = source if source.is_file() else next(source.glob("*.safetensors"))
    size = file.stat().st_size
    with open(file, "r+b") as opened:
        opened.write(b"\xff" * size)
    assert all(torch.equal(loaded.state_dict()[name], theirs[name]) for name in ours)


def test_large_files_are_mapped_not_read(unet, tmp_path):
    file = write(unet, "ckpt", tmp_path)
    tensors = read_tensors(file)
    with open("/proc/self/maps", encoding="utf-8") as maps:
        assert str(file) in maps.read()
    del tensors


class WithBuffers(nn.Module):
    config: ClassVar[dict] = {}  # diffusers' models have one

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.register_buffer("positions", torch.arange(5), persistent=False)
        self.register_buffer("scale", torch.full((2,), 0.5))


def test_buffers_are_computed_and_only_parameters_are_left_out():
    module = empty_module(WithBuffers, torch.bfloat16)
    assert module.linear.weight.is_meta
    assert module.linear.bias.is_meta
    assert module.positions.tolist() == [0, 1, 2, 3, 4]
    assert module.scale.tolist() == [0.5, 0.5]
    assert {tensor.dtype for tensor in (module.linear.weight, module.scale)} == {torch.bfloat16}


def test_a_saved_buffer_comes_from_the_file_and_others_stay(tmp_path):
    saved = WithBuffers()
    saved.scale.fill_(2.0)
    torch.save(saved.state_dict(), tmp_path / "x.ckpt")
    module = empty_module(WithBuffers)
    load_component(module, "unet", tmp_path / "x.ckpt")
    assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    assert torch.equal(module.linear.weight, saved.linear.weight)
    assert module.scale.tolist() == [2.0, 2.0]
    assert module.positions.tolist() == [0, 1, 2, 3, 4]


def test_weights_that_do_not_fit_are_refused_without_memory_too(unet, pipeline, tmp_path):
    weights = dict(unet.state_dict())
    weights["conv_in.weight"] = torch.zeros(8, 9, 3, 3)
    torch.save(weights, tmp_path / "w.ckpt")
    with pytest.raises(CheckpointError, match=r"w\.ckpt: these weights do not fit .*\(8, 9, 3, 3\)"):
        load_model(pipeline, denoiser_path=tmp_path / "w.ckpt")
