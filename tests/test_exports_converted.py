"""export.py: what was learnt as other programs' files, each read back by plain diffusers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file
from test_lora_exports import RANK, adapted, sd15_unet, sdxl_unet
from tiny.published import narrow, save_text, whole_file
from tiny.stable_diffusion import to_ldm_unet
from tiny_pipelines import PROMPTS, named, randomise
from tiny_pipelines.main import stable_diffusion_xl
from tiny_pipelines.parts import clip
from transformers import CLIPTextModel

from nemo_aligner_diffusion.cli.export import main
from nemo_aligner_diffusion.cli.generate import main as generate
from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.diffusion.lora import lora_state_dict, save_lora_weights
from nemo_aligner_diffusion.diffusion.lora_files import KOHYA_NAME, WEIGHT_NAME
from nemo_aligner_diffusion.formats.checkpoints import read_notes
from nemo_aligner_diffusion.formats.ldm import ldm_state_dict, unet_names
from nemo_aligner_diffusion.training.export import fingerprint

NOTES = {"ss_output_name": "mine", "nemo_aligner_diffusion.method": "draft+"}
UMASK = os.umask(0o022)
os.umask(UMASK)
TARGETS = ("to_q", "to_out.0", "proj_in", "conv1", "conv_shortcut", "ff.net.2")


def vae() -> AutoencoderKL:
    """Of the published block structure, narrow."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 8, 12, 12),
        layers_per_block=2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
    )


def sd15(gelu: bool = False) -> StableDiffusionPipeline:
    parts = named("sd").components()
    parts |= {"unet": sd15_unet(sample_size=8, cross_attention_dim=16), "vae": vae()}
    if gelu:  # SD 2.x
        config = parts["text_encoder"].config
        config.hidden_act = "gelu"
        parts["text_encoder"] = CLIPTextModel(config)
    for index, part in enumerate(("unet", "vae", "text_encoder")):
        randomise(parts[part], index)
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(pipe: Any, steps: int = 2, size: int = 8) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    side = size * pipe.vae_scale_factor
    return pipe(
        [PROMPTS[0]], num_inference_steps=steps, generator=noise, output_type="pt", height=side, width=side
    ).images


def equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return set(got) == set(expected) and all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.parametrize("unet", [sd15_unet, sdxl_unet, lambda: named("sd").components()["unet"]])
def test_the_unets_names_are_undone_by_diffusers_own_converter(unet: Any) -> None:
    network = unet()
    state = network.state_dict()
    names = unet_names(state, network.config.layers_per_block)
    ldm = {f"model.diffusion_model.{names[name]}": value for name, value in state.items()}
    assert len(ldm) == len(state)
    assert equal(single_file_utils.convert_ldm_unet_checkpoint(ldm, dict(network.config)), state)
    if network.config.layers_per_block == 1:
        by_hand = to_ldm_unet(network)
        assert equal({f"model.diffusion_model.{name}": value for name, value in by_hand.items()}, ldm)


def test_the_text_encoders_and_the_vae_are_undone_by_diffusers_own_converters() -> None:
    for gelu in (False, True):
        pipe = sd15(gelu)
        state = ldm_state_dict(pipe)
        assert equal(single_file_utils.convert_ldm_vae_checkpoint(state, dict(pipe.vae.config)), pipe.vae.state_dict())
        if gelu:
            assert single_file_utils.is_open_clip_model(state)
            found = single_file_utils.convert_open_clip_checkpoint(pipe.text_encoder, state)
        else:
            assert single_file_utils.is_clip_model(state)
            found = single_file_utils.convert_ldm_clip_checkpoint(state)
        flat = not hasattr(pipe.text_encoder, "text_model")
        found = {name.removeprefix("text_model.") if flat else name: value for name, value in found.items()}
        assert equal(found, pipe.text_encoder.state_dict())
    row = named("sdxl")
    parts = {**stable_diffusion_xl(), "text_encoder_2": clip(projection=True)[0]}
    pipe = row.pipeline(**parts, **row.options)
    state = ldm_state_dict(pipe)
    assert single_file_utils.is_clip_sdxl_model(state)
    assert single_file_utils.is_open_clip_sdxl_model(state)
    second = pipe.text_encoder_2
    found = single_file_utils.convert_open_clip_checkpoint(second, state, prefix="conditioner.embedders.1.model.")
    assert equal(found, second.state_dict())


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, torch.Tensor, torch.Tensor]:
    """(model folder, run directory with an adapter, pictures without it, pictures with it)."""
    folder = tmp_path_factory.mktemp("converted")
    pipe = sd15()
    pipe.save_pretrained(folder / "model")
    base = pictures(pipe)
    adapted(pipe.unet, TARGETS)
    notes = {**NOTES, "modelspec.architecture": "stable-diffusion-v1/lora"}
    save_lora_weights(pipe.unet, folder / "run" / "export", header=notes)
    (folder / "run" / "config.yaml").write_text(f"model: {{from_pretrained: {folder / 'model'}}}\n")
    return folder / "model", folder / "run", base, pictures(pipe)


def test_merged_into_a_folder_and_into_a_single_file(tuned: Any, tmp_path: Path) -> None:
    model, run, base, expected = tuned
    assert (expected - base).abs().max() > 0.02
    assert main([str(run), "--to", "pipeline", "--output", str(tmp_path / "merged")]) == 0
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert (pictures(merged) - expected).abs().max() < 1e-3
    file = tmp_path / "new" / "merged.safetensors"
    assert main([str(run / "export"), "--to", "single-file", "--output", str(file)]) == 0
    single = StableDiffusionPipeline.from_single_file(
        file, config=str(model), local_files_only=True, safety_checker=None
    )
    assert (pictures(single) - expected).abs().max() < 1e-3
    words = [str(run), "--to", "single-file", "--output", str(tmp_path / "half.safetensors"), "--weight", "0"]
    assert main([*words, "--precision", "16"]) == 0
    half = load_file(tmp_path / "half.safetensors")
    assert {value.dtype for value in half.values()} == {torch.float16}
    plain = StableDiffusionPipeline.from_pretrained(model)
    name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    expected_weight = plain.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight
    assert torch.allclose(half[name].float(), expected_weight, atol=1e-3)  # an adapter of weight 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half.safetensors", "merged", "new"]
    weights = tmp_path / "merged" / "unet" / "diffusion_pytorch_model.safetensors"
    for written, weight in ((file, "1.0"), (weights, "1.0"), (tmp_path / "half.safetensors", "0.0")):
        assert written.stat().st_mode & 0o777 == 0o666 & ~UMASK
        assert read_notes(written) == {"format": "pt", **NOTES, "modelspec.architecture": "stable-diffusion-v1",
                                       "nemo_aligner_diffusion.merged_weight": weight}  # fmt: skip


@pytest.mark.parametrize("name", ["sd21", "sdxl"])
def test_single_files_of_published_structure_make_the_same_pictures(name: str, tmp_path: Path) -> None:
    pipe = narrow(name)
    pipe.save_pretrained(tmp_path / "model")
    base = pictures(pipe, 1, 4)
    adapted(pipe.unet, ("attn2.to_v", "conv1", "conv_shortcut", "time_emb_proj"))
    save_lora_weights(pipe.unet, tmp_path / "run", pipeline_class=type(pipe))
    expected = pictures(pipe, 1, 4)
    assert (expected - base).abs().max() > 0.02
    file, words = tmp_path / "x.safetensors", ["--model", str(tmp_path / "model"), "--to", "single-file"]
    assert main([str(tmp_path / "run"), *words, "--output", str(file)]) == 0
    more = {"add_watermarker": False} if name == "sdxl" else {"safety_checker": None}
    single = type(pipe).from_single_file(file, config=str(tmp_path / "model"), local_files_only=True, **more)
    assert (pictures(single, 1, 4) - expected).abs().max() < 1e-3


def test_a_file_without_tokenizers_takes_them_from_the_folder_given_as_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = narrow("sd15")
    words = ["--model", str(whole_file("sd15", pipe, tmp_path / "model.safetensors"))]
    save_text(pipe, tmp_path / "text", weights=False)
    adapted(pipe.unet, ("to_q",))
    save_lora_weights(pipe.unet, tmp_path / "lora")
    made = [str(tmp_path / "lora"), "--to", "pipeline", "--output", str(tmp_path / "out"), *words]
    assert main([*made, "--text", str(tmp_path)]) == 2
    assert "model.cond_stage_config.from_pretrained, or --text = a folder with tokenizer/" in capsys.readouterr().err
    words += ["--text", str(tmp_path / "text")]
    assert main([*made, *words]) == 0
    assert same_text(DiffusionPipeline.from_pretrained(tmp_path / "out"), pipe)
    drawn = ["--prompt", "a", "--steps", "1", "--height", "64", "--width", "64", "--reward", "none"]
    assert generate([*words, *drawn, "--output", str(tmp_path / "pictures")]) == 0


def same_text(a: Any, b: Any) -> bool:
    return a.tokenizer("red").input_ids == b.tokenizer("red").input_ids and equal(
        a.text_encoder.state_dict(), b.text_encoder.state_dict()
    )


def test_the_base_models_fingerprint_is_that_of_its_weights_whatever_holds_them(tmp_path: Path) -> None:
    pipe = narrow("sd15")
    file = whole_file("sd15", pipe, tmp_path / "model.safetensors")
    pipe.save_pretrained(tmp_path / "model", max_shard_size="300KB")
    assert len(list((tmp_path / "model" / "unet").glob("*.safetensors"))) > 2
    text = save_text(pipe, tmp_path / "text")
    found = {
        fingerprint(load_model(source, dtype=dtype, text_path=given).denoiser)
        for source, given in ((file, text), (tmp_path / "model", None))
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert found == {fingerprint(pipe.unet)}
    pipe.unet.mid_block.resnets[0].conv1.bias.data[0] += 0.1
    assert fingerprint(pipe.unet) not in found


def test_from_one_lora_layout_to_the_other(tuned: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, run, _, _ = tuned
    file = str(run / "export" / KOHYA_NAME)
    words = ["--model", str(model), "--to", "diffusers", "--output", str(tmp_path / "a.safetensors")]
    assert main([file, *words]) == 0
    assert equal(load_file(tmp_path / "a.safetensors"), load_file(run / "export" / WEIGHT_NAME))
    assert main([file, *words]) == 2
    assert "a.safetensors exists; give another --output, or --overwrite" in capsys.readouterr().err
    words = ["--model", str(model), "--to", "kohya", "--weight", "0.5", "--output", str(tmp_path / "a.safetensors")]
    assert main([str(tmp_path / "a.safetensors"), *words, "--overwrite"]) == 0
    halved, before = load_file(tmp_path / "a.safetensors"), load_file(file)
    assert set(halved) == set(before)
    for name, value in before.items():
        assert torch.equal(halved[name], value * (0.5 if "lora_up" in name else 1)), name
        assert not name.endswith("alpha") or value == RANK


def test_a_fully_tuned_denoiser(tuned: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _, _, expected = tuned
    pipe = StableDiffusionPipeline.from_pretrained(model)
    adapted(pipe.unet, TARGETS)
    pipe.unet.fuse_lora()
    pipe.unet.unload_lora()
    assert not [name for name in pipe.unet.state_dict() if "lora" in name]
    pipe.unet.save_pretrained(tmp_path / "run" / "export" / "unet")
    words = [str(tmp_path / "run"), "--model", str(model), "--output", str(tmp_path / "out")]
    assert main([*words, "--to", "pipeline"]) == 0
    assert (pictures(DiffusionPipeline.from_pretrained(tmp_path / "out")) - expected).abs().max() < 1e-3
    assert main([*words[:-1], str(tmp_path / "x"), "--to", "kohya"]) == 2
    assert "every weight was trained, which no LoRA can hold" in capsys.readouterr().err
    assert main([str(model.parent / "run" / "config.yaml"), *words[1:-1], str(tmp_path / "x"), "--to", "kohya"]) == 2
    assert "config.yaml" in capsys.readouterr().err


def test_what_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = named("flux")
    pipe = row.build()
    pipe.save_pretrained(tmp_path / "flux")
    adapted(pipe.transformer, ("to_q", "proj_mlp"))
    save_lora_weights(pipe.transformer, tmp_path / "export", pipeline_class=row.pipeline)
    words = [str(tmp_path / "export"), "--model", str(tmp_path / "flux"), "--output"]
    assert main([*words, str(tmp_path / "x.safetensors"), "--to", "single-file"]) == 2
    assert "FluxPipeline: a single file is written for Stable Diffusion" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "k.safetensors"), "--to", "kohya"]) == 0
    state = load_file(tmp_path / "k.safetensors")
    alphas = {name for name in state if name.endswith(".alpha")}
    names = {name.partition(".lora_")[0] for name in lora_state_dict(pipe.transformer)}
    assert alphas == {f"transformer.{name}.alpha" for name in names}
    plain = row.build()
    plain.load_lora_weights(tmp_path / "k.safetensors")
    inputs = {**row.inputs(1), "num_inference_steps": 2, "output_type": "pt"}
    drawn = [each(**inputs, generator=torch.Generator().manual_seed(0)).images for each in (pipe, plain, row.build())]
    assert (drawn[0] - drawn[1]).abs().max() < 1e-3
    assert (drawn[0] - drawn[2]).abs().max() > 0.02
    assert main(["nowhere", "--to", "kohya", "--output", "x"]) == 2
    assert "there is no file or folder nowhere" in capsys.readouterr().err
