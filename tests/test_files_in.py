"""The right weights, however they are wrapped, split, named and packed, load equal; and whole models out of files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from tiny.published import narrow, save_text, unet_names, vae_names, whole_file
from tiny.stable_diffusion import save_tiny_pipeline, tiny_parts, to_ldm_unet

from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.diffusion.recognition import of_file
from nemo_aligner_diffusion.errors import CheckpointError
from nemo_aligner_diffusion.formats.checkpoints import load_component


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return tiny_parts(seed=3)


def weights_of(module: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a: Any, b: Any) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def prefixed(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in state.items()}


WRAPPINGS = {
    "torch.compile": lambda w, v: prefixed("_orig_mod.", w),
    "compiled in DDP": lambda w, v: prefixed("module._orig_mod.", w),
    "compiled blocks": lambda w, v: {n.replace("resnets.", "_orig_mod.resnets."): t for n, t in w.items()},
    "under model": lambda w, v: {"model": w, "epoch": 3},
    "under module of state_dict": lambda w, v: {"state_dict": {"module": prefixed("model.", w)}, "lr": 0.1},
    "Lightning, two networks": lambda w, v: {"state_dict": {**prefixed("unet.", w), **prefixed("vae.", v)}},
    "with optimizer": lambda w, v: {"model": w, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
    "with counters": lambda w, v: {**w, "global_step": torch.tensor(3), "v_pred": torch.zeros(0)},
    "with average": lambda w, v: {**prefixed("ema.", {n: 2 * t for n, t in w.items()}), **prefixed("unet.", w)},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappings(parts: dict[str, Any], wrapping: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(WRAPPINGS[wrapping](weights_of(parts["unet"]), weights_of(parts["vae"])), tmp_path / "w.pt")
    loaded = tiny_parts()["unet"]
    caplog.set_level("INFO", "nemo_aligner_diffusion")
    load_component(loaded, "unet", tmp_path / "w.pt")
    assert same(loaded, parts["unet"])
    if wrapping == "with counters":
        assert "w.pt: passes over what is no part of the unet: 2 tensor(s), global_step, v_pred" in caplog.text
    if wrapping == "with average":
        assert "w.pt: holds the unet 2 times; takes 'unet.'" in caplog.text


def files(parts: dict[str, Any], kind: str, place: Path) -> Path:
    weights = weights_of(parts["unet"])
    match kind:
        case "shards":
            parts["unet"].save_pretrained(place / "unet", max_shard_size="60KB")
            assert len(list((place / "unet").glob("*.safetensors"))) > 2
        case "shards, bin":
            parts["unet"].save_pretrained(place / "unet", max_shard_size="60KB", safe_serialization=False)
        case "index":
            parts["unet"].save_pretrained(place / "unet", max_shard_size="60KB")
            return place / "unet" / "diffusion_pytorch_model.safetensors.index.json"
        case "non_ema" | "fp16" | "bf16":
            parts["unet"].save_pretrained(place / "unet", variant=kind)
        case "fp16 shards":
            parts["unet"].save_pretrained(place / "unet", variant="fp16", max_shard_size="60KB")
        case "safetensors named .ckpt":
            save_file(weights, place / "w.ckpt")
            return place / "w.ckpt"
        case ".SAFETENSORS":
            save_file(weights, place / "w.SAFETENSORS")
            return place / "w.SAFETENSORS"
        case "pickle named .safetensors":
            torch.save(weights, place / "w.safetensors")
            return place / "w.safetensors"
    return place / "unet"


@pytest.mark.parametrize(
    "kind",
    ["shards", "shards, bin", "index", "non_ema", "fp16", "bf16", "fp16 shards", "safetensors named .ckpt",
     ".SAFETENSORS", "pickle named .safetensors"],
)  # fmt: skip
def test_files(parts: dict[str, Any], kind: str, tmp_path: Path) -> None:
    loaded = tiny_parts()["unet"]
    load_component(loaded, "unet", files(parts, kind, tmp_path))
    assert same(loaded, parts["unet"])


def test_plain_weights_come_before_variants(parts: dict[str, Any], tmp_path: Path) -> None:
    other = tiny_parts(seed=9)["unet"]
    for variant in ("fp16", "non_ema", None):
        (parts["unet"] if variant is None else other).save_pretrained(tmp_path, variant=variant)
    loaded = tiny_parts()["unet"]
    load_component(loaded, "unet", tmp_path)
    assert same(loaded, parts["unet"])


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_attention_names_of_old_and_of_ldm(parts: dict[str, Any], prefix: str, tmp_path: Path) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = weights_of(parts["vae"])
    if prefix == "first_stage_model.":
        weights = vae_names(weights)
    else:
        for new, name in old.items():
            weights = {key.replace(f".{new}.", f".{name}."): value for key, value in weights.items()}
    save_file({f"{prefix}{key}": value.contiguous() for key, value in weights.items()}, tmp_path / "vae.safetensors")
    loaded = tiny_parts()["vae"]
    load_component(loaded, "vae", tmp_path / "vae.safetensors")
    assert same(loaded, parts["vae"])


def test_the_general_mapping_agrees_with_the_one_written_out_by_hand(parts: dict[str, Any]) -> None:
    names = unet_names(parts["unet"].state_dict(), layers=1)
    assert names.keys() == to_ldm_unet(parts["unet"]).keys()


# whole pipelines, from folders


@pytest.mark.parametrize("kind", ["fp16", "bin", "shards", "fp16 of one part", "nothing but what training needs"])
def test_pipeline_folders(kind: str, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    folder = save_tiny_pipeline(tmp_path / "whole")
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    place = tmp_path / "pipe"
    if kind == "fp16":
        pipe.save_pretrained(place, variant="fp16")
    elif kind == "bin":
        pipe.save_pretrained(place, safe_serialization=False)
        for part in ("text_encoder",):  # transformers writes safetensors alone
            file = place / part / "model.safetensors"
            if file.exists():
                torch.save(load_file(file), place / part / "pytorch_model.bin")
                file.unlink()
    elif kind == "shards":
        pipe.save_pretrained(place, max_shard_size="60KB")
    else:
        pipe.save_pretrained(place)
    if kind == "fp16 of one part":
        unet = place / "unet" / "diffusion_pytorch_model.safetensors"
        unet.rename(unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
    if kind.startswith("nothing"):
        index = json.loads((place / "model_index.json").read_text())
        index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
                  "feature_extractor": ["transformers", "CLIPImageProcessor"]}  # fmt: skip
        (place / "model_index.json").write_text(json.dumps(index))
    model = load_model(place)
    for part in ("unet", "vae", "text_encoder"):
        assert same(getattr(model.pipe, part), getattr(pipe, part))


def in_cache(monkeypatch: pytest.MonkeyPatch, cache: Path, name: str, folder: Path, branch: str = "main") -> None:
    """``folder`` as ``huggingface_hub`` keeps it, with links into its blobs."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    root = cache / f"models--{name.replace('/', '--')}"
    commit = ("a" if branch == "main" else "b") * 40
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "blobs").mkdir(exist_ok=True)
    (root / "refs" / branch).write_text(commit)
    for number, file in enumerate(sorted(file for file in folder.rglob("*") if file.is_file())):
        blob = root / "blobs" / f"{commit[:8]}{number}"
        shutil.copy(file, blob)
        link = root / "snapshots" / commit / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)


def test_hub_ids_are_found_in_the_cache_by_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {branch: save_tiny_pipeline(tmp_path / branch, seed=seed) for seed, branch in enumerate(("main", "next"))}
    for branch, folder in folders.items():
        in_cache(monkeypatch, tmp_path / "cache", "someone/tiny", folder, branch)
    assert same(load_model("someone/tiny").denoiser, load_model(folders["main"]).denoiser)
    assert same(load_model("someone/tiny", revision="next").denoiser, load_model(folders["next"]).denoiser)
    with pytest.raises(CheckpointError, match="someone/other: no such path here, and a diffusers pipeline folder or"):
        load_model("someone/other")
    (weights,) = (tmp_path / "cache").rglob(f"{'a' * 40}/unet/*.safetensors")
    weights.unlink()
    with pytest.raises(CheckpointError, match="the weights of its text_encoder, unet, vae could not be had"):
        load_model("someone/tiny")


# whole pipelines, from files


def pictures(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("a red cube", num_inference_steps=2, height=64, width=64, generator=generator, output_type="pt").images


@pytest.fixture(scope="module")
def sd15() -> Any:
    return narrow("sd15")


@pytest.mark.parametrize("names", ["ldm", "diffusers"])
def test_the_published_commands_two_files(sd15: Any, names: str, tmp_path: Path) -> None:
    unet, vae = weights_of(sd15.unet), weights_of(sd15.vae)
    if names == "ldm":
        unet, vae = prefixed("model.diffusion_model.", unet_names(unet)), vae_names(vae)
    torch.save({"state_dict": unet}, tmp_path / "unet.ckpt")
    torch.save(vae, tmp_path / "vae.bin")
    text = save_text(sd15, tmp_path / "text")
    pipe = load_model(None, tmp_path / "unet.ckpt", tmp_path / "vae.bin", text_path=text).pipe
    assert type(pipe.scheduler) is type(sd15.scheduler)
    assert dict(pipe.scheduler.config) == dict(sd15.scheduler.config)
    assert torch.equal(pictures(pipe), pictures(sd15))


@pytest.mark.parametrize(("changes", "said"), [
    ({"scaling_factor": 0.13025}, "scaling factor is 0.13025, this model's is 0.18215"),
    ({"latent_channels": 16}, "latent channels is 16, this model's is 4"),
])  # fmt: skip
def test_another_models_vae_is_refused(sd15: Any, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    sd15.save_pretrained(tmp_path / "model")
    config = {key: value for key, value in sd15.vae.config.items() if not key.startswith("_")}
    AutoencoderKL(**{**config, **changes}).save_pretrained(tmp_path / "vae")
    with pytest.raises(CheckpointError, match=said):
        load_model(tmp_path / "model", vae_path=tmp_path / "vae")
    with pytest.raises(CheckpointError, match=said):
        load_model(None, tmp_path / "model" / "unet", tmp_path / "vae", text_path=tmp_path / "model")


def test_text_encoders_of_their_own_folder_and_from_the_cache(
    sd15: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sd15.unet.save_pretrained(tmp_path / "unet")
    sd15.vae.save_pretrained(tmp_path / "vae")
    sd15.text_encoder.save_pretrained(tmp_path / "clip")
    sd15.tokenizer.save_pretrained(tmp_path / "clip")
    model = load_model(None, tmp_path / "unet", tmp_path / "vae", text_path=tmp_path / "clip")
    assert same(model.pipe.text_encoder, sd15.text_encoder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(CheckpointError, match=r"come without text_encoder, tokenizer: give model\.cond_stage_config"):
        load_model(None, tmp_path / "unet", tmp_path / "vae")
    in_cache(monkeypatch, tmp_path / "cache", "openai/clip-vit-large-patch14", tmp_path / "clip")
    assert same(load_model(None, tmp_path / "unet", tmp_path / "vae").pipe.text_encoder, sd15.text_encoder)
    with pytest.raises(CheckpointError, match=r"unet: holds no VAE; give that of Stable Diffusion 1.5 as model\.first"):
        load_model(None, tmp_path / "unet")


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl", "sd35"])
def test_one_file_of_the_whole_model(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As its makers publish it; configurations and tokenizers from a folder without weights, no network."""
    pipe = narrow(name, seed=5)
    file = whole_file(name, pipe, tmp_path / "model.safetensors")
    assert of_file(file).architecture == name
    folder = save_text(pipe, tmp_path / "text", weights=False)
    with caplog.at_level("INFO", "nemo_aligner_diffusion"):
        model = load_model(file, text_path=folder)
    assert "text_encoder" in caplog.text.partition(" from the file; tokenizer")[0]
    assert f" from {folder}\n" in caplog.text
    assert type(model.pipe) is type(pipe)
    assert dict(model.pipe.scheduler.config) == dict(pipe.scheduler.config)
    for part, network in pipe.components.items():
        if isinstance(network, torch.nn.Module):
            assert same(getattr(model.pipe, part), network), part
    assert torch.equal(pictures(model.pipe), pictures(pipe))
    last = sorted(path.name for path in folder.glob("tokenizer*"))[-1]
    shutil.rmtree(folder / last)
    with pytest.raises(CheckpointError, match=rf", or --text = .*lacks weights or tokenizer files of {last}$"):
        load_model(file, text_path=folder)


def test_marks_of_how_a_file_was_trained(sd15: Any, tmp_path: Path) -> None:
    unet = prefixed("model.diffusion_model.", unet_names(weights_of(sd15.unet)))
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    text = save_text(sd15, tmp_path / "text")
    torch.save(weights_of(sd15.vae), tmp_path / "vae.pt")
    for given in (("v_pred",), ("v_pred", "ztsnr")):
        torch.save({**unet, **{name: marks[name] for name in given}}, tmp_path / "unet.pt")
        scheduler = load_model(None, tmp_path / "unet.pt", tmp_path / "vae.pt", text_path=text).pipe.scheduler
        assert scheduler.config.prediction_type == "v_prediction"
        zero = "ztsnr" in given
        assert type(scheduler).__name__ == ("DDIMScheduler" if zero else "PNDMScheduler")
        assert scheduler.config.get("rescale_betas_zero_snr", False) == zero
        assert scheduler.config.timestep_spacing == ("trailing" if zero else "leading")
        assert (float(scheduler.alphas_cumprod[-1]) == 0) == zero


def test_weights_of_the_embedded_shape_mean_the_embedded_model(tmp_path: Path) -> None:
    embedded = load_model()
    changed = {name: 2 * tensor for name, tensor in weights_of(embedded.denoiser).items()}
    save_file(prefixed("model.diffusion_model.", unet_names(changed, layers=1)), tmp_path / "unet.safetensors")
    model = load_model(None, tmp_path / "unet.safetensors")
    assert torch.equal(model.denoiser.conv_in.weight, changed["conv_in.weight"])
    assert same(model.pipe.vae, embedded.pipe.vae)
