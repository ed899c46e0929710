"""Exported adapters: the same pictures in plain diffusers from each layout, and ComfyUI's key map and scale."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pipelines import MAIN, PROMPTS, named
from tiny_pipelines.main import flux_transformer, stable_diffusion_3, xl_unet

from nemo_aligner_diffusion.diffusion.families import FAMILIES, UNET_LORA
from nemo_aligner_diffusion.diffusion.lora import add_lora, lora_state_dict, save_lora_weights
from nemo_aligner_diffusion.diffusion.lora_files import KOHYA_NAME, WEIGHT_NAME, read_lora, write_lora

RANK, ALPHA = 4, 6.0


def adapted(denoiser: Any, targets: tuple[str, ...]) -> Any:
    add_lora(denoiser, RANK, ALPHA, target_modules=targets)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in denoiser.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return denoiser


def changes(denoiser: Any) -> dict[str, torch.Tensor]:
    """What is added to each layer's weight, flattened, by the definition: alpha / rank · B·A."""
    return {
        name: ALPHA / RANK * layer.lora_B["default"].weight.flatten(1) @ layer.lora_A["default"].weight.flatten(1)
        for name, layer in denoiser.named_modules()
        if "default" in getattr(layer, "lora_A", {})
    }


def pictures(row: Any, pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    inputs = {**row.inputs(1), "prompt": [PROMPTS[0]]}
    return pipe(**inputs, num_inference_steps=2, generator=generator, output_type="pt").images


@functools.cache
def tuned(name: str, folder: Path) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """(row, pictures of the base model, pictures with the adapter, which is exported into ``folder``)."""
    row = named(name)
    pipe = row.build()
    base = pictures(row, pipe)
    denoiser = adapted(getattr(pipe, row.train), row.lora_targets)
    save_lora_weights(denoiser, folder, pipeline_class=row.pipeline)
    return row, base, pictures(row, pipe)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.mark.parametrize("name", [row.name for row in MAIN])
@pytest.mark.parametrize("way", ["by name", "as a dict", "folder", "kohya"])
def test_plain_diffusers_makes_the_same_pictures(name: str, way: str, exports: Path) -> None:
    folder = exports / name
    row, base, expected = tuned(name, folder)
    if way == "kohya" and row.train != "unet":
        assert not (folder / KOHYA_NAME).exists()  # ComfyUI and Forge read the other one
        return
    pipe = row.build()
    if way == "by name":
        pipe.load_lora_weights(folder, weight_name=WEIGHT_NAME)
    elif way == "folder":
        pipe.load_lora_weights(folder)
    else:
        pipe.load_lora_weights(load_file(folder / (KOHYA_NAME if way == "kohya" else WEIGHT_NAME)))
    assert (expected - base).abs().max() > 0.02
    assert (pictures(row, pipe) - expected).abs().max() < 1e-3


# The names under which ComfyUI looks for an adapter of each layer (comfy/lora.py: model_lora_keys_unet; comfy/utils.py:
# unet_to_diffusers, mmdit_to_diffusers, flux_to_diffusers), written out from the published architectures.
TRANSFORMER = [f"attn{n}_to_{x}" for n in (1, 2) for x in ("q", "k", "v", "out_0")] + ["ff_net_0_proj", "ff_net_2"]


def comfy_unet(down: list[int], middle: int, up: list[int], shortcuts: list[str]) -> set[str]:
    """Of transformer blocks in each attention of a level (0: no attention); two layers down, three up."""
    places = [
        *((f"down_blocks_{i}", j, depth) for i, depth in enumerate(down) for j in range(2)),
        ("mid_block", 0, middle),
        *((f"up_blocks_{i}", j, depth) for i, depth in enumerate(up) for j in range(3)),
    ]
    names = {
        f"{block}_attentions_{j}_{part}"
        for block, j, depth in places
        if depth
        for part in ["proj_in", "proj_out", *(f"transformer_blocks_{k}_{x}" for k in range(depth) for x in TRANSFORMER)]
    }
    resnets = [f"{block}_resnets_{j}" for block, j, _ in places] + ["mid_block_resnets_1"]
    names |= {f"{resnet}_conv{n}" for resnet in resnets for n in (1, 2)}
    return {f"lora_unet_{name}" for name in [*names, *(f"{resnet}_conv_shortcut" for resnet in shortcuts)]}


def comfy_sd15() -> set[str]:
    ups = [f"up_blocks_{i}_resnets_{j}" for i in range(4) for j in range(3)]
    names = comfy_unet([1, 1, 1, 0], 1, [0, 1, 1, 1], ["down_blocks_1_resnets_0", "down_blocks_2_resnets_0", *ups])
    assert len([name for name in names if "_attentions_" in name]) == 192  # as kohya's trainer counts
    return names


def comfy_sdxl() -> set[str]:
    ups = [f"up_blocks_{i}_resnets_{j}" for i in range(3) for j in range(3)]
    names = comfy_unet([0, 2, 10], 10, [10, 2, 0], ["down_blocks_1_resnets_0", "down_blocks_2_resnets_0", *ups])
    assert len([name for name in names if "_attentions_" in name]) == 722
    return names


def comfy_sd3() -> set[str]:
    parts = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
             "attn.add_v_proj", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "ff.net.0.proj",
             "ff.net.2"]  # fmt: skip
    names = {f"transformer.transformer_blocks.{block}.{part}" for block in range(2) for part in parts}
    names |= {f"transformer.transformer_blocks.0.{part}"
              for part in ("attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2")}  # fmt: skip
    return {name for name in names if "blocks.1.attn2" not in name}  # the first block alone has a second attention


def comfy_flux() -> set[str]:
    double = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
              "attn.add_v_proj", "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj",
              "ff_context.net.2"]  # fmt: skip
    names = {f"transformer.transformer_blocks.{block}.{part}" for block in range(2) for part in double}
    single = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    return names | {f"transformer.single_transformer_blocks.{block}.{part}" for block in range(3) for part in single}


def sd15_unet(**changes: Any) -> UNet2DConditionModel:
    """The published configuration, narrow."""
    config = {"block_out_channels": (4, 8, 12, 12), "norm_num_groups": 4, "cross_attention_dim": 8,
              "attention_head_dim": 2, "layers_per_block": 2, **changes}  # fmt: skip
    return UNet2DConditionModel(**config)


def sdxl_unet() -> UNet2DConditionModel:
    return xl_unet(
        block_out_channels=(4, 8, 12),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(1, 2, 2),
    )


def published(family: str) -> tuple[Any, set[str]]:
    if family == "StableDiffusion":
        return adapted(sd15_unet(), UNET_LORA), comfy_sd15()
    if family == "StableDiffusionXL":
        return adapted(sdxl_unet(), UNET_LORA), comfy_sdxl()
    targets = (*(FAMILIES[family].lora_targets or ()), "ff_context.net.0.proj", "ff_context.net.2")
    if family == "StableDiffusion3":
        return adapted(stable_diffusion_3()["transformer"], targets), comfy_sd3()
    return adapted(flux_transformer(num_layers=2, num_single_layers=3), targets), comfy_flux()


@pytest.mark.parametrize("family", ["StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux"])
def test_comfyui_finds_every_layer_at_its_scale(family: str, tmp_path: Path) -> None:
    import diffusers

    denoiser, expected = published(family)
    pipeline_class = getattr(diffusers, f"{family}Pipeline")
    save_lora_weights(denoiser, tmp_path, pipeline_class=pipeline_class)
    if isinstance(denoiser, UNet2DConditionModel):
        check_as_comfyui(load_file(tmp_path / KOHYA_NAME), expected, denoiser, ("lora_down", "lora_up"))
        return
    check_as_comfyui(load_file(tmp_path / WEIGHT_NAME), expected, denoiser, ("lora_A", "lora_B"), has_alpha=False)
    again = read_lora(tmp_path, denoiser, "transformer", pipeline_class)  # what export.py --to kohya writes
    write_lora(again, tmp_path / KOHYA_NAME, "transformer", kohya=True)
    check_as_comfyui(load_file(tmp_path / KOHYA_NAME), expected, denoiser, ("lora_A", "lora_B"))


def check_as_comfyui(
    state: dict[str, torch.Tensor], names: set[str], denoiser: Any, sides: tuple[str, str], has_alpha: bool = True
) -> None:
    """Every tensor has its place, and every layer's change is that of ``denoiser``, at ComfyUI's scale."""
    down, up = sides
    kinds = [f"{down}.weight", f"{up}.weight", *(["alpha"] if has_alpha else [])]
    assert set(state) == {f"{name}.{kind}" for name in names for kind in kinds}
    for module, change in changes(denoiser).items():
        name = f"lora_unet_{module.replace('.', '_')}" if down == "lora_down" else f"transformer.{module}"
        factors = state[f"{name}.{down}.weight"], state[f"{name}.{up}.weight"]
        # comfy/weight_adapter/lora.py: alpha = v[2] / v[1].shape[0] if v[2] is not None else 1.0
        alpha = state.get(f"{name}.alpha")
        assert alpha is None or alpha.shape == ()
        scale = 1.0 if alpha is None else alpha.item() / factors[0].shape[0]
        assert torch.allclose(scale * factors[1].flatten(1) @ factors[0].flatten(1), change, atol=1e-5)
        assert factors[0].shape[1:] == denoiser.get_submodule(module).base_layer.weight.shape[1:]  # 4-D where it is


def test_a_wrong_scale_or_name_does_not_pass(tmp_path: Path) -> None:
    denoiser, names = published("StableDiffusion")
    save_lora_weights(denoiser, tmp_path)
    state = load_file(tmp_path / KOHYA_NAME)
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    without = {key: value for key, value in state.items() if key != f"{layer}.alpha"}
    for spoilt in (
        {**state, f"{layer}.alpha": torch.tensor(ALPHA)},  # beside a scale that is in the matrices
        {**state, f"{layer}.lora_up.weight": state[f"{layer}.lora_up.weight"] * RANK / ALPHA},  # none is
        without,
        {**without, f"{layer.replace('to_k', 'to.k')}.alpha": state[f"{layer}.alpha"]},
    ):
        with pytest.raises(AssertionError):
            check_as_comfyui(spoilt, names, denoiser, ("lora_down", "lora_up"))
    check_as_comfyui(state, names, denoiser, ("lora_down", "lora_up"))


def test_a_wrong_scale_is_seen_in_the_pictures(exports: Path) -> None:
    row, _, expected = tuned("sd", exports / "sd")
    state = load_file(exports / "sd" / KOHYA_NAME)
    pipe = row.build()
    pipe.load_lora_weights({key: value * (2 if key.endswith(".alpha") else 1) for key, value in state.items()})
    assert (pictures(row, pipe) - expected).abs().max() > 0.01


def test_kohyas_names_are_those_of_diffusers_converter(tmp_path: Path) -> None:
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

    save_lora_weights(adapted(sd15_unet(), UNET_LORA), tmp_path)
    converted = convert_state_dict_to_kohya(load_file(tmp_path / WEIGHT_NAME))
    written = load_file(tmp_path / KOHYA_NAME)
    assert set(converted) == set(written)
    assert all(torch.equal(converted[name].float(), value) for name, value in written.items())


def test_the_headers_agree_with_the_tensors_and_the_files_have_the_usual_mode(tmp_path: Path) -> None:
    denoiser = adapted(named("sd").build().unet, ("to_q",))
    before = os.umask(0o022)
    try:
        save_lora_weights(denoiser, tmp_path, header={"ss_output_name": "mine"})
    finally:
        os.umask(before)
    for name in (WEIGHT_NAME, KOHYA_NAME):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o644
        with safe_open(tmp_path / name, "pt") as file:
            header = file.metadata()
        assert header["ss_output_name"] == "mine"
        assert header["ss_network_dim"] == header["ss_network_alpha"] == str(RANK)  # the scale is in the tensors
        if name == WEIGHT_NAME:
            described = json.loads(header["lora_adapter_metadata"])
            assert described["unet.r"] == described["unet.lora_alpha"] == RANK
    assert sorted(path.name for path in tmp_path.iterdir()) == [KOHYA_NAME, WEIGHT_NAME]


def test_where_one_layout_finds_no_room_both_stay_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = adapted(named("sd").build().unet, ("to_q",))
    save_lora_weights(unet, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {KOHYA_NAME, WEIGHT_NAME}
    for parameter in unet.parameters():
        parameter.data += 1

    def fill(tensors: Any, file: Path, header: Any) -> None:
        if KOHYA_NAME in file.name:
            raise OSError(28, "No space left on device")
        save_file(tensors, file, header)

    monkeypatch.setattr("safetensors.torch.save_file", fill)
    with pytest.raises(OSError, match="No space left"):
        save_lora_weights(unet, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_exports_with_the_scale_in_the_header_are_read_as_ever(tmp_path: Path) -> None:
    """As this project wrote them before, by diffusers' own writer."""
    unet = adapted(named("sd").build().unet, UNET_LORA)
    described = unet.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=lora_state_dict(unet), unet_lora_adapter_metadata=described
    )
    layers = read_lora(tmp_path, named("sd").build().unet).layers
    expected = changes(unet)
    assert set(layers) == set(expected)
    for name, layer in layers.items():
        got = layer["lora_B.weight"].flatten(1) @ layer["lora_A.weight"].flatten(1)
        assert torch.allclose(got, expected[name], atol=1e-5), name
