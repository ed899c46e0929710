"""LoRA files as other trainers write them: each name and scale read, each tensor accounted for, nothing waited for."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionPipeline
from safetensors.torch import save_file
from tiny.stable_diffusion import tiny_parts, to_ldm_unet
from tiny_pipelines import named
from torch import Tensor

from nemo_aligner_diffusion.diffusion.lora import attach_lora, continue_lora, load_lora_weights, mix, save_lora_weights
from nemo_aligner_diffusion.diffusion.lora_files import KOHYA_NAME, read_lora
from nemo_aligner_diffusion.diffusion.settings import LoRASettings
from nemo_aligner_diffusion.errors import CheckpointError, ConfigurationError

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
LAYERS = (f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_out.0", f"{BLOCK}.ff.net.0.proj", "down_blocks.1.resnets.0.conv1",
          "down_blocks.1.resnets.0.conv_shortcut", "conv_in", "up_blocks.0.upsamplers.0.conv")  # fmt: skip
Pair = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def unet() -> Any:
    return tiny_parts(seed=1)["unet"]


def pairs(denoiser: Any, layers: tuple[str, ...] = LAYERS, ranks: tuple[int, ...] = (4,)) -> dict[str, Pair]:
    """(A, B) of each layer, random; ``ranks`` in turn."""
    generator = torch.Generator().manual_seed(3)
    made = {}
    for index, name in enumerate(layers):
        shape, rank = denoiser.get_submodule(name).weight.shape, ranks[index % len(ranks)]
        down = torch.randn(rank, *shape[1:], generator=generator)
        made[name] = (down, torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator))
    return made


def ldm(denoiser: Any) -> Callable[[str], str]:
    """LDM's name of a module, by a table of the tests."""
    mine, theirs = list(denoiser.state_dict()), list(to_ldm_unet(denoiser))
    names = {a.rpartition(".")[0]: b.rpartition(".")[0] for a, b in zip(mine, theirs, strict=True)}
    return lambda name: names[name]


def old_attention(name: str, side: str) -> str:
    """diffusers before PEFT: attention layers stood in processors."""
    word = {"A": "down", "B": "up"}[side]
    if ".attn" in name:
        front, back = name.rsplit(".to_", 1)
        return f"unet.{front}.processor.to_{back.removesuffix('.0')}_lora.{word}.weight"
    return f"unet.{name}.lora.{word}.weight"


KOHYA = {"A": "lora_down.weight", "B": "lora_up.weight"}
SPELLINGS: dict[str, Callable[[Any, str, str], str]] = {
    "diffusers": lambda u, n, s: f"unet.{n}.lora_{s}.weight",
    "bare": lambda u, n, s: f"{n}.lora_{s}.weight",
    "old diffusers": lambda u, n, s: old_attention(n, s),
    "kohya": lambda u, n, s: f"lora_unet_{n.replace('.', '_')}.{KOHYA[s]}",
    "kohya, LDM's blocks": lambda u, n, s: f"lora_unet_{ldm(u)(n).replace('.', '_')}.{KOHYA[s]}",
    "ComfyUI": lambda u, n, s: f"diffusion_model.{ldm(u)(n)}.lora_{s}.weight",
    "PEFT": lambda u, n, s: f"base_model.model.{n}.lora_{s}.weight",
    "PEFT of a pipeline": lambda u, n, s: f"base_model.model.unet.{n}.lora_{s}.weight",
    "PEFT, raw": lambda u, n, s: f"base_model.model.{n}.lora_{s}.default.weight",
    "diffusers, raw": lambda u, n, s: f"unet.{n}.lora_{s}.default_0.weight",
}


def write(file: Path, tensors: dict[str, Tensor], **header: str) -> Path:
    save_file({name: value.contiguous() for name, value in tensors.items()}, file, header or None)
    return file


def spelt(denoiser: Any, made: dict[str, Pair], spelling: str) -> dict[str, Tensor]:
    name = SPELLINGS[spelling]
    return {name(denoiser, layer, side): pair[side == "B"] for layer, pair in made.items() for side in "AB"}


def same(got: Any, made: dict[str, Pair], scale: float | dict[str, float] = 1.0) -> bool:
    scales = scale if isinstance(scale, dict) else dict.fromkeys(made, scale)
    return set(got.layers) == set(made) and all(
        torch.allclose(got.layers[name]["lora_A.weight"], down)
        and torch.allclose(got.layers[name]["lora_B.weight"], scales[name] * up)
        for name, (down, up) in made.items()
    )


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_of_other_trainers(spelling: str, unet: Any, tmp_path: Path) -> None:
    made = pairs(unet)
    tensors = spelt(unet, made, spelling)
    assert same(read_lora(write(tmp_path / "a.safetensors", tensors), unet), made)
    ends = (".lora_A.weight", ".lora_down.weight", ".lora_A.default.weight", ".lora_A.default_0.weight")
    stems = {name.removesuffix(end) for name in tensors for end in ends if name.endswith(end)}
    if spelling != "old diffusers":
        alphas = {f"{stem}.alpha": torch.tensor(6.0) for stem in stems}
        assert len(alphas) == len(made)
        assert same(read_lora(write(tmp_path / "b.safetensors", {**tensors, **alphas}), unet), made, 6 / 4)


def test_mixed_ranks_each_with_its_alpha(unet: Any, tmp_path: Path) -> None:
    made = pairs(unet, ranks=(2, 4, 8))
    tensors = spelt(unet, made, "kohya")
    assert same(
        read_lora(write(tmp_path / "none.safetensors", tensors), unet), made
    )  # no alpha: scale 1, whatever rank
    alphas = {f"lora_unet_{name.replace('.', '_')}.alpha": torch.tensor(3.0 + i) for i, name in enumerate(made)}
    lora = read_lora(write(tmp_path / "some.safetensors", {**tensors, **alphas}), unet)
    assert same(lora, made, {name: (3.0 + i) / len(pair[0]) for i, (name, pair) in enumerate(made.items())})
    fresh = tiny_parts(seed=1)["unet"]
    before = {name: fresh.get_submodule(name).weight.clone() for name in made}
    load_lora_weights(fresh, tmp_path / "some.safetensors", "a")
    mix(fresh, {"a": 0.5})
    fresh.fuse_lora()
    for i, (name, (down, up)) in enumerate(made.items()):
        change = (up.flatten(1) @ down.flatten(1)).reshape(before[name].shape)
        expected = before[name] + 0.5 * (3.0 + i) / len(down) * change
        assert torch.allclose(fresh.get_submodule(name).base_layer.weight, expected, atol=1e-5), name


def test_what_peft_says_of_the_scale(unet: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = pairs(unet, ranks=(4, 9))
    text = {"unet.r": 4, "unet.lora_alpha": 8, "unet.rank_pattern": {n: len(p[0]) for n, p in made.items()},
            "unet.alpha_pattern": {"attn1.to_q": 2, "^conv_in": 3, "to_q": 77}}  # fmt: skip
    scales = {name: 8 / len(pair[0]) for name, pair in made.items()}
    scales |= {LAYERS[0]: 2 / 4, "conv_in": 3 / 9}
    tensors = spelt(unet, made, "diffusers")
    file = write(tmp_path / "a.safetensors", tensors, lora_adapter_metadata=json.dumps(text))
    assert same(read_lora(file, unet), made, scales)
    rooted = json.dumps({"unet.lora_alpha": 8, "unet.use_rslora": True})
    file = write(tmp_path / "a.safetensors", tensors, lora_adapter_metadata=rooted)
    assert same(read_lora(file, unet), made, {name: 8 / len(pair[0]) ** 0.5 for name, pair in made.items()})
    file = write(tmp_path / "adapter_model.safetensors", spelt(unet, made, "PEFT"))
    assert same(read_lora(tmp_path / "adapter_model.safetensors", unet), made)
    assert "no adapter_config.json beside it says its alpha" in caplog.text
    file.rename(tmp_path / "a.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": None, "lora_alpha": 6, "alpha_pattern": {}}))
    assert same(read_lora(tmp_path, unet), made, {name: 6 / len(pair[0]) for name, pair in made.items()})


def test_text_encoders_layers_are_named_and_the_rest_is_used(
    unet: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = pairs(unet)
    for name in ("lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_te2_text_projection", "text_encoder.x.q_proj"):
        down, up = ("lora_A", "lora_B") if "." in name else ("lora_down", "lora_up")
        texts = {f"{name}.{down}.weight": torch.zeros(2, 4), f"{name}.{up}.weight": torch.zeros(4, 2)}
        caplog.clear()
        file = write(tmp_path / "a.safetensors", {**spelt(unet, made, "kohya"), **texts})
        assert same(read_lora(file, unet, pipeline_class=StableDiffusionPipeline), made)
        assert f"2 of its 16 tensors are of text encoders, such as {name}" in caplog.text
    with pytest.raises(CheckpointError, match="it has tensors of text encoders alone"):
        read_lora(write(tmp_path / "a.safetensors", texts), unet)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unet.down_blocks.7.x.lora_A.weight": torch.zeros(4, 8)}, "1 of its 15 tensors have no place in UNet2D"),
        ({f"unet.{BLOCK}.attn1.to_q.dora_scale": torch.zeros(16)}, "kohya's DoRA"),
        ({f"lora_unet_{BLOCK.replace('.', '_')}_attn1_to_k.hada_w1_a": torch.zeros(4, 4)}, "LoHa"),
        ({f"unet.{BLOCK}.attn1.to_k.lora_A.weight": torch.zeros(4, 16)}, "not whole: .*to_k has lora_A.weight alone"),
        ({f"unet.{BLOCK}.attn1.to_q.lora_A.weight": torch.zeros(4, 17)}, r"to_q is \(16, 16\) .*\(4, 17\) for it"),
        ({f"unet.{BLOCK}.attn1.to_q.alpha": torch.tensor(float("nan"))}, "its alpha is no finite number"),
        ({f"unet.{BLOCK}.attn1.to_q.alpha": torch.zeros(2)}, "its alpha is no finite number"),
        ({f"lora_unet_{BLOCK.replace('.', '_')}_attn1_to_q.lora_down.weight": torch.zeros(4, 16)}, "1 of its 15"),
    ],
)
def test_no_tensor_is_passed_over_in_silence(
    change: dict[str, Tensor], message: str, unet: Any, tmp_path: Path
) -> None:
    file = write(tmp_path / "a.safetensors", {**spelt(unet, pairs(unet), "diffusers"), **change})
    with pytest.raises(CheckpointError, match=rf"a\.safetensors: this LoRA .*{message}"):
        read_lora(file, unet, pipeline_class=StableDiffusionPipeline)


def test_long_and_odd_metadata_takes_no_time(unet: Any, tmp_path: Path) -> None:
    made = pairs(unet)
    names = [f"down_blocks.{i}.attentions.0.to_q" for i in range(20_000)]
    tensors = spelt(unet, made, "diffusers")
    text = json.dumps({"unet.r": 4, "unet.lora_alpha": 4, "unet.target_modules": names,
                       "unet.alpha_pattern": dict.fromkeys(names, 2)})  # fmt: skip
    file = write(tmp_path / "a.safetensors", tensors, lora_adapter_metadata=text)
    fresh = tiny_parts(seed=1)["unet"]
    started = time.perf_counter()
    load_lora_weights(fresh, file, "a")
    assert time.perf_counter() - started < 20  # on a machine that others use
    for odd, message in (("[" * 100_000, "is not valid JSON"), ("3", "is no JSON object"), ("{", "is not valid JSON")):
        file = write(tmp_path / "a.safetensors", tensors, lora_adapter_metadata=odd)
        with pytest.raises(CheckpointError, match=rf"a\.safetensors: its metadata lora_adapter_metadata {message}"):
            read_lora(file, unet)
    many = {f"unet.{'x' * 300}{i}.lora_A.weight": torch.zeros(1) for i in range(3000)}
    with pytest.raises(CheckpointError, match="3000 of its 3000"):
        read_lora(write(tmp_path / "a.safetensors", many), unet)


def test_names_of_flux_that_only_its_own_converter_knows(tmp_path: Path) -> None:
    """kohya's FLUX files have q, k and v of a block in one layer."""
    denoiser = named("flux").build().transformer
    torch.manual_seed(0)
    down, up = torch.randn(4, 16), torch.randn(48, 4)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
    lora = read_lora(write(tmp_path / "a.safetensors", tensors), denoiser, "transformer", FluxPipeline)
    assert sorted(lora.layers) == [f"transformer_blocks.0.attn.to_{x}" for x in "kqv"]
    for part, x in zip(up.chunk(3), "qkv", strict=True):
        layer = lora.layers[f"transformer_blocks.0.attn.to_{x}"]
        assert torch.allclose(layer["lora_B.weight"] @ layer["lora_A.weight"], 0.5 * part @ down, atol=1e-5)
    one = {"lora_transformer_single_transformer_blocks_0_attn_to_k.lora_down.weight": torch.randn(2, 16),
           "lora_transformer_single_transformer_blocks_0_attn_to_k.lora_up.weight": torch.randn(16, 2)}  # fmt: skip
    lora = read_lora(write(tmp_path / "b.safetensors", one), denoiser, "transformer", FluxPipeline)  # OneTrainer's
    assert list(lora.layers) == ["single_transformer_blocks.0.attn.to_k"]


def test_an_adapter_is_gone_on_with_in_place(unet: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same function under the run's own alpha, one adapter, exported as it came."""
    made = pairs(unet, LAYERS[:3], ranks=(4, 8))
    file = write(tmp_path / "a.safetensors", spelt(unet, made, "PEFT, raw"))
    for alpha in (32.0, None):
        fresh = tiny_parts(seed=1)["unet"]
        continue_lora(fresh, file, LoRASettings(adapter_dim=8, alpha=alpha))
        assert list(fresh.peft_config) == ["default"]
        trained = [name for name, parameter in fresh.named_parameters() if parameter.requires_grad]
        assert sorted(trained) == sorted(f"{n}.lora_{s}.default.weight" for n in made for s in "AB")
        layer = fresh.get_submodule(LAYERS[1])
        assert layer.scaling["default"] == pytest.approx(1 if alpha is None else alpha / 8)
        save_lora_weights(fresh, tmp_path / "export")
        for name in ("", KOHYA_NAME):
            assert same(read_lora(tmp_path / "export" / name, unet), made)
    fresh = tiny_parts(seed=1)["unet"]
    with pytest.raises(ConfigurationError, match=r"rank 4, 8, and .*adapter_dim.*2; set .*adapter_dim=8"):
        continue_lora(fresh, file, LoRASettings(adapter_dim=2))
    with caplog.at_level("INFO"):
        continue_lora(tiny_parts(seed=1)["unet"], file, LoRASettings(adapter_dim=None))
    assert f"going on with the adapter of {file}: rank 4, 8" in caplog.text
    with pytest.raises(ConfigurationError, match=r"has an adapter on .*attn2.to_out.0 and 1 more"):
        continue_lora(fresh, file, LoRASettings(target_modules=("to_q",)))
    with pytest.raises(CheckpointError, match="no such LoRA file"):
        continue_lora(fresh, tmp_path / "nowhere", LoRASettings())
    fresh.save_pretrained(tmp_path / "unet")
    with pytest.raises(CheckpointError, match="unet: this folder holds no LoRA file"):
        continue_lora(fresh, tmp_path / "unet", LoRASettings())
    attach_lora(fresh, read_lora(file, unet))
    assert fresh.get_submodule(LAYERS[0]).scaling["default"] == 1
