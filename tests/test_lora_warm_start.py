"""Adapters of other programs are gone on with: the same pictures before the first step, one adapter, exported.

What a file means is not said by the code under test: by the network that it was written from, or by its definition.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_lora_exports import adapted, pictures
from tiny.published import narrow, unet_names
from tiny_pipelines import named
from torch import nn

from nemo_aligner_diffusion.cli.export import main as export
from nemo_aligner_diffusion.diffusion.lora import continue_lora, save_lora_weights
from nemo_aligner_diffusion.diffusion.lora_files import KOHYA_NAME, WEIGHT_NAME, read_lora
from nemo_aligner_diffusion.diffusion.settings import LoRASettings
from nemo_aligner_diffusion.errors import CheckpointError

TARGETS = ["to_q", "to_out.0", "conv1", "ff.net.2"]


def filled(network: Any) -> Any:
    generator = torch.Generator().manual_seed(2)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return network


def of_diffusers_converter(row: Any, folder: Path) -> Any:
    """As diffusers' training scripts write for A1111."""
    pipe = row.build()
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS))
    state = get_peft_model_state_dict(filled(pipe.unet))
    save_file(convert_state_dict_to_kohya({f"unet.{k}": v for k, v in state.items()}), folder / "kohya.safetensors")
    return pipe


def of_peft(row: Any, folder: Path) -> Any:
    pipe = row.build()
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=TARGETS, rank_pattern={"conv1": 2, "to_q": 8}, alpha_pattern={"to_q": 3}
    )
    filled(get_peft_model(pipe.unet, config)).save_pretrained(folder)  # which changes the UNet in place
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "adapter_config.json",
                                                              "adapter_model.safetensors"]  # fmt: skip
    return pipe


def of_a_training_loop(row: Any, folder: Path) -> Any:
    """Whose author saved the tensors as their modules name them."""
    pipe = row.build()
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS))
    state = {name: value.detach() for name, value in filled(pipe.unet).named_parameters() if ".lora_" in name}
    assert all(".default." in name for name in state)
    save_file(state, folder / "raw.safetensors")
    return pipe


@pytest.mark.parametrize("write", [of_diffusers_converter, of_peft, of_a_training_loop])
def test_files_of_other_programs_go_on_in_place(write: Any, tmp_path: Path) -> None:
    row = named("sd")
    (tmp_path / "theirs").mkdir()
    expected = pictures(row, write(row, tmp_path / "theirs"))
    pipe = row.build()
    before = pictures(row, pipe)
    continue_lora(pipe.unet, tmp_path / "theirs", LoRASettings(adapter_dim=4, alpha=16.0))
    assert (expected - before).abs().max() > 0.02
    assert (pictures(row, pipe) - expected).abs().max() < 1e-3
    check_goes_on(row, pipe, tmp_path / "theirs", tmp_path / "mine")


def check_goes_on(row: Any, pipe: Any, theirs: Path, folder: Path) -> None:
    """One adapter, of the file's ranks, alone in training; its export is it, and replaces it."""
    denoiser = getattr(pipe, row.train)
    assert list(denoiser.peft_config) == ["default"]
    assert not any(hasattr(getattr(module, "base_layer", None), "lora_A") for module in denoiser.modules())
    assert all(".lora_" in name for name, parameter in denoiser.named_parameters() if parameter.requires_grad)
    fresh = getattr(row.build(), row.train)
    ranks = read_lora(theirs, fresh, row.train, row.pipeline).ranks
    with torch.no_grad():  # a step
        for name, parameter in denoiser.named_parameters():
            if "lora_B" in name:
                parameter += 0.02
    save_lora_weights(denoiser, folder, pipeline_class=row.pipeline)
    assert read_lora(folder, fresh, row.train, row.pipeline).ranks == ranks
    for name in (WEIGHT_NAME, KOHYA_NAME) if row.train == "unet" else (WEIGHT_NAME,):
        plain = row.build()
        plain.load_lora_weights(folder, weight_name=name)
        assert (pictures(row, plain) - pictures(row, pipe)).abs().max() < 1e-3, name


def test_sd_scripts_names_of_sdxl(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """LDM's blocks, mixed ranks each with its alpha, text encoders beside."""
    pipe, changed = narrow("sdxl"), narrow("sdxl")
    modules = [name for name, module in pipe.unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    modules = [name for name in modules if ".attentions." in name and not name.endswith("attn1.to_v")]
    assert any(name.startswith("down_blocks.2.attentions.1.transformer_blocks.9.") for name in modules)
    generator = torch.Generator().manual_seed(4)
    state = {}
    for index, (ours, theirs) in enumerate(zip(modules, unet_names(dict.fromkeys(modules)), strict=True)):
        weight, rank, alpha = changed.unet.get_submodule(ours).weight, (2, 4)[index % 2], 1 + index % 3
        down = 0.1 * torch.randn(rank, weight.shape[1], generator=generator)
        up = torch.randn(weight.shape[0], rank, generator=generator)
        weight.data += alpha / rank * up @ down
        state |= kohya(f"lora_unet_{theirs}", down, up, alpha)
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight" in state
    assert "lora_unet_middle_block_1_proj_in.alpha" in state
    texts = {}
    for encoder in ("lora_te1_", "lora_te2_"):
        texts |= kohya(f"{encoder}text_model.encoder.layers.0.mlp.fc1", torch.zeros(2, 16), torch.zeros(37, 2), 1)
    save_file({**state, **texts}, tmp_path / "sdxl.safetensors")
    before = drawn(pipe)
    continue_lora(pipe.unet, tmp_path / "sdxl.safetensors", LoRASettings(adapter_dim=4), type(pipe))
    assert f"6 of its {len(state) + 6} tensors are of text encoders" in caplog.text
    assert (drawn(changed) - before).abs().max() > 0.02
    assert (drawn(pipe) - drawn(changed)).abs().max() < 1e-3


def kohya(module: str, down: torch.Tensor, up: torch.Tensor, alpha: float) -> dict[str, torch.Tensor]:
    stem = module.replace(".", "_")
    return {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(float(alpha))}


def drawn(pipe: Any) -> torch.Tensor:
    noise = torch.Generator().manual_seed(0)
    return pipe("red", num_inference_steps=1, height=32, width=32, generator=noise, output_type="pt").images


def test_onetrainers_names_of_a_transformer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its text encoders and the words that it has taught them are passed over, counted."""
    caplog.set_level(logging.WARNING)
    row = named("sd3")
    pipe = row.build()
    state, changed = {}, row.build()
    generator = torch.Generator().manual_seed(6)
    for block in range(len(pipe.transformer.transformer_blocks)):
        for part in ("attn.to_q", "ff.net.0.proj"):
            name = f"transformer_blocks.{block}.{part}"
            weight = changed.transformer.get_submodule(name).weight
            down = 0.3 * torch.randn(4, weight.shape[1], generator=generator)
            up = torch.randn(len(weight), 4, generator=generator)
            weight.data += 2 / 4 * up @ down
            state |= kohya(f"lora_transformer_{name}", down, up, 2)
    texts = kohya("lora_te2_text_projection", torch.zeros(2, 8), torch.zeros(8, 2), 2)
    texts |= {"bundle_emb.<red>.clip_l": torch.zeros(2, 8), "bundle_emb.<red>.t5": torch.zeros(2, 8)}
    save_file({**state, **texts}, tmp_path / "onetrainer.safetensors")
    base = pictures(row, pipe)
    continue_lora(pipe.transformer, tmp_path / "onetrainer.safetensors", LoRASettings(adapter_dim=4), row.pipeline)
    assert f"5 of its {len(state) + 5} tensors are of text encoders" in caplog.text
    assert (pictures(row, changed) - base).abs().max() > 0.01
    assert (pictures(row, pipe) - pictures(row, changed)).abs().max() < 1e-3
    check_goes_on(row, pipe, tmp_path / "onetrainer.safetensors", tmp_path / "mine")


def test_files_that_fit_in_no_or_some_layers(tmp_path: Path) -> None:
    row = named("sd")
    state = {f"unet.{k}": v for k, v in get_peft_model_state_dict(adapted(row.build().unet, ("to_q",))).items()}
    others = {name.replace("down_blocks", "down_bloks"): value for name, value in state.items()}
    some, file = sum("down_blocks" in name for name in state), tmp_path / "a.safetensors"
    for written, words in (
        (others, rf"{some} of its {len(state)} tensors have no place in UNet2DConditionModel, like unet\.down_bloks"),
        ({f"x.{k}": v for k, v in state.items()}, rf"{len(state)} of its {len(state)} tensors have no place"),
    ):
        save_file(written, file)
        with pytest.raises(CheckpointError, match=words):
            continue_lora(row.build().unet, file, LoRASettings(adapter_dim=4), row.pipeline)


def test_dora_is_merged_or_stays_in_diffusers_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """kohya's readers would pass its magnitudes over."""
    row = named("sd")
    row.build().save_pretrained(tmp_path / "model")
    pipe = row.build()
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q"], use_dora=True)
    model = filled(get_peft_model(pipe.unet, config))
    assert isinstance(model, PeftModel)
    model.save_pretrained(tmp_path / "dora")
    words = [str(tmp_path / "dora"), "--model", str(tmp_path / "model"), "--output", str(tmp_path / "x.safetensors")]
    assert export([*words, "--to", "kohya"]) == 2
    assert "has lora_magnitude_vector beside its matrices, which kohya's layout" in capsys.readouterr().err
    assert export([*words, "--to", "diffusers"]) == 0
    assert any("lora_magnitude_vector" in name for name in load_file(tmp_path / "x.safetensors"))
    plain = row.build()
    plain.load_lora_weights(tmp_path, weight_name="x.safetensors")
    assert (pictures(row, plain) - pictures(row, pipe)).abs().max() < 1e-3
