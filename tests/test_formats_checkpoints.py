"""Weights in the layouts people have, and files that are damaged, hostile or of another architecture."""

from __future__ import annotations

import json
import pickle
import random
import sys

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny.stable_diffusion import save_tiny_pipeline, tiny_parts, to_ldm_unet

from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.diffusion.lora import add_lora, load_lora_weights, save_lora_weights
from nemo_aligner_diffusion.errors import CheckpointError
from nemo_aligner_diffusion.formats.checkpoints import component_config, load_component, read_tensors


@pytest.fixture(scope="module")
def parts():
    return tiny_parts(seed=1)


def target(parts, name):
    fresh = type(parts[name]).from_config(parts[name].config)
    assert not same(fresh, parts[name])
    return fresh


def same(a, b):
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize("name", ["unet", "vae"])
@pytest.mark.parametrize("layout", ["folder", "pipeline", "safetensors", "bin", "state_dict", "prefix"])
def test_diffusers_layouts(parts, name, layout, tmp_path):
    weights = parts[name].state_dict()
    path = tmp_path / "weights.ckpt"
    if layout == "folder":
        path = tmp_path / "folder"
        parts[name].save_pretrained(path)
    elif layout == "pipeline":
        path = tmp_path / "pipeline"
        parts[name].save_pretrained(path / name, safe_serialization=False)
    elif layout == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(weights, path)
    elif layout == "bin":
        path = tmp_path / "weights.bin"
        torch.save(weights, path)
    elif layout == "state_dict":
        torch.save({"state_dict": weights, "epoch": 3}, path)
    else:
        torch.save({f"{name}.{key}": value for key, value in weights.items()}, path)
    loaded = target(parts, name)
    load_component(loaded, name, path)
    assert same(loaded, parts[name])


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "model.model.diffusion_model."])
def test_ldm_and_nemo_naming_of_the_unet(parts, prefix, tmp_path):
    named = {prefix + key: value for key, value in to_ldm_unet(parts["unet"]).items()}
    torch.save(
        {"state_dict": {**named, "cond_stage_model.x": torch.zeros(1)} if prefix else named}, tmp_path / "m.ckpt"
    )
    loaded = target(parts, "unet")
    load_component(loaded, "unet", tmp_path / "m.ckpt")
    assert same(loaded, parts["unet"])


class Hostile:
    def __reduce__(self):
        return (open, ("/tmp/never-written-by-a-test", "w"))


def test_pickles_with_code_are_refused_and_nothing_runs(parts, tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    monkeypatch.setattr(Hostile, "__reduce__", lambda self: (open, (str(marker), "w")))
    torch.save({"conv_in.weight": Hostile()}, tmp_path / "a.ckpt")
    (tmp_path / "b.bin").write_bytes(pickle.dumps(Hostile()))
    for name in ("a.ckpt", "b.bin"):
        with pytest.raises(CheckpointError, match=f"{name}.*weights_only"):
            load_component(parts["unet"], "unet", tmp_path / name)
    assert not marker.exists()


def test_damaged_and_missing_files_are_named(parts, tmp_path):
    (tmp_path / "short.safetensors").write_bytes(b"\x00" * 20)
    (tmp_path / "empty.ckpt").write_bytes(b"")
    torch.save({"note": "no tensors"}, tmp_path / "none.pt")
    (tmp_path / "folder").mkdir()
    for name, reason in (
        ("short.safetensors", "safetensors"),
        ("empty.ckpt", "the file is empty"),
        ("none.pt", "no tensors"),
        ("folder", "without unet weights"),
        ("absent.ckpt", "no such file"),
    ):
        with pytest.raises(CheckpointError, match=f"{name}.*{reason}"):
            load_component(parts["unet"], "unet", tmp_path / name)
    with pytest.raises(CheckpointError, match="no such file"):
        read_tensors(tmp_path / "absent.safetensors")


def test_tensors_of_another_architecture_are_named_with_both_shapes(parts, tmp_path):
    weights = dict(parts["unet"].state_dict())
    weights["conv_in.weight"] = torch.zeros(8, 9, 3, 3)
    weights["extra.weight"] = torch.zeros(1)
    del weights["conv_out.bias"]
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_component(parts["unet"], "unet", tmp_path / "w.safetensors")
    message = str(caught.value)
    for part in ("1 missing, e.g. conv_out.bias", "1 unexpected, e.g. extra.weight", "(8, 9, 3, 3)", "(8, 4, 3, 3)"):
        assert part in message


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        load_model(tmp_path)
    folder = save_tiny_pipeline(tmp_path / "p")
    (folder / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="text_encoder: a folder without text_encoder weights"):
        load_model(folder)


def test_a_unet_folder_of_another_width_brings_its_own_architecture(parts, tmp_path):
    folder = save_tiny_pipeline(tmp_path / "p")
    wide = UNet2DConditionModel.from_config({**parts["unet"].config, "block_out_channels": (16, 16)})
    wide.save_pretrained(tmp_path / "wide")
    model = load_model(folder, denoiser_path=tmp_path / "wide")
    assert same(model.denoiser, wide)


def test_a_lora_of_another_architecture_is_refused(parts, tmp_path):
    save_file({"unet.nothing.lora_A.weight": torch.zeros(2, 3)}, tmp_path / "x.safetensors")
    for path in (tmp_path / "x.safetensors", tmp_path / "absent.safetensors"):
        with pytest.raises(CheckpointError, match="LoRA"):
            load_lora_weights(parts["unet"], path, "a")


def test_a_loras_metadata_sets_no_more_than_its_tensors_bear_out(parts, tmp_path):
    denoiser = target(parts, "unet")
    add_lora(denoiser, 3, alpha=6)
    file = save_lora_weights(denoiser, tmp_path)
    with safe_open(file, "pt") as source:
        metadata = json.loads(source.metadata()["lora_adapter_metadata"])
    state = load_file(file)
    changes = [("r", 10**9), ("r", True), ("rank_pattern", {"to_q": 999}), ("lora_alpha", "x"), ("lora_alpha", 1e999),
               ("alpha_pattern", {"(a+)+": 1.0}), ("alpha_pattern", [1])]  # fmt: skip
    for field, value in changes:
        text = json.dumps({**metadata, f"unet.{field}": value})
        save_file(state, tmp_path / "x.safetensors", {"lora_adapter_metadata": text})
        with pytest.raises(CheckpointError, match=rf"x\.safetensors: its metadata gives {field[:1]}"):
            load_lora_weights(target(parts, "unet"), tmp_path / "x.safetensors", "a")
    # What PEFT would import, decompose or multiply by is not passed on.
    harmful = {
        "unet.megatron_config": {"a": 1},
        "unet.megatron_core": "antigravity",
        "unet.layer_replication": [[0, 9]],
    }
    text = json.dumps({**metadata, **harmful, "unet.init_lora_weights": "pissa"})
    save_file(state, tmp_path / "x.safetensors", {"lora_adapter_metadata": text})
    loaded = target(parts, "unet")
    load_lora_weights(loaded, tmp_path / "x.safetensors", "a")
    config = loaded.peft_config["a"]
    assert (config.r, config.lora_alpha, config.megatron_config, config.layer_replication) == (3, 3, None, None)
    assert "antigravity" not in sys.modules


def test_files_damaged_at_random_are_read_or_refused_by_name(parts, tmp_path):
    """Bytes changed at random in the header of a safetensors file, in a pickled one, in a configuration."""
    weights = dict(list(parts["unet"].state_dict().items())[:6])
    save_file(weights, tmp_path / "w.safetensors")
    torch.save({"state_dict": weights}, tmp_path / "w.ckpt")
    torch.save(weights, tmp_path / "w.bin", _use_new_zipfile_serialization=False)
    parts["unet"].save_config(tmp_path)
    drawn = random.Random(0)
    refused = []
    for name in ("w.safetensors", "w.ckpt", "w.bin", "config.json"):
        whole = (tmp_path / name).read_bytes()
        for _ in range(60):
            content = bytearray(whole[: drawn.choice((len(whole), len(whole), drawn.randrange(len(whole))))])
            for _ in range(drawn.choice((1, 2, 20))):
                if content:
                    content[drawn.randrange(min(len(content), 1000))] = drawn.randrange(256)
            (tmp_path / name).write_bytes(content)
            try:
                component_config(tmp_path, "unet") if name == "config.json" else read_tensors(tmp_path / name)
            except CheckpointError as error:
                refused.append(str(error))
    assert len(refused) > 60
    assert all(str(tmp_path) in message for message in refused)


def test_tensors_that_are_not_dense_are_refused(parts, tmp_path):
    for value in (torch.zeros(1).expand(10**12), torch.zeros(3, 3).to_sparse(), torch.zeros(2, device="meta")):
        torch.save({"conv_in.weight": value}, tmp_path / "x.ckpt")
        with pytest.raises(CheckpointError, match=r"x\.ckpt: its tensor 'conv_in.weight' is not dense"):
            read_tensors(tmp_path / "x.ckpt")
