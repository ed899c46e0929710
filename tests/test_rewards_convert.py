"""Published rewards to .nemo: Hugging Face folders, OpenCLIP's layout, the aesthetic head; what the command says."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny.clip import END_OF_TEXT, open_clip_twin, tokenizer_files, toy_clip
from tiny.pictures import photograph
from torch import Tensor
from transformers import CLIPModel

from nemo_aligner_diffusion.cli.convert_reward import main
from nemo_aligner_diffusion.errors import AlignerError
from nemo_aligner_diffusion.formats.hub import is_hub_name
from nemo_aligner_diffusion.formats.nemo import load_nemo
from nemo_aligner_diffusion.rewards import CLIPReward, build_reward, restore_reward
from nemo_aligner_diffusion.rewards.support.preprocessing import Preprocessing

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "mm" / "clip" / "convert_reward_to_nemo.py"
PROMPTS = ["a red apple", "cat", "Grün & 猫!"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "tokenizer")


def write_tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer_files().items():
        (folder / name).write_bytes(content)
    return folder


def convert(kind: str, source: Path | str, output: Path, *options: str | Path) -> Path:
    words = ["--kind", kind, "--source", str(source), "--output", str(output), *map(str, options)]
    assert main(words) == 0
    return output


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """What the command says, on one line, when it refuses; nothing may be left beside the output."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    return captured.err


def hf_logits(model: CLIPModel, reward: CLIPReward, images: Tensor, **how: Any) -> Tensor:
    tokens = reward.tokenizer(PROMPTS, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return model(**tokens, pixel_values=Preprocessing(32, **how)(images)).logits_per_image


def restored(path: Path) -> CLIPReward:
    reward = restore_reward(path)
    assert isinstance(reward, CLIPReward)
    return reward


@pytest.mark.parametrize("layout", ["safetensors", "bin", "shards"])
def test_hugging_face_folder(tmp_path: Path, images: Tensor, layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, folder = toy_clip(seed=2), write_tokenizer(tmp_path / "clip")
    model.save_pretrained(folder, **({"max_shard_size": "20KB"} if layout == "shards" else {}))
    if layout == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert (folder / "model.safetensors.index.json").exists() == (layout == "shards")
    reward = restored(convert("pickscore", folder, tmp_path / "out" / "pick.nemo"))
    source = CLIPModel.from_pretrained(folder) if layout != "bin" else model
    expected = hf_logits(source, reward, images, resize="crop_down")
    assert expected.std() > 0.1
    # PickScore's own code: exp(logit_scale) times the product of the normalised embeddings.
    torch.testing.assert_close(reward.score_matrix(images, PROMPTS), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reward(images, PROMPTS), expected.diag(), rtol=1e-4, atol=1e-5)
    shown = capsys.readouterr().out
    assert f"({(tmp_path / 'out' / 'pick.nemo').stat().st_size:,} bytes)" in shown
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in shown
    assert "pickscore (CLIPReward, score pickscore)" in shown
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "pick.nemo"]


def test_a_photograph_as_transformers_processes_it(tmp_path: Path) -> None:
    """The whole way: Pillow's resize to 8 bits, crop, statistics and model there; one differentiable function here."""
    from transformers import CLIPImageProcessor

    folder = write_tokenizer(tmp_path / "clip")
    model = toy_clip(seed=2)
    model.save_pretrained(folder)
    reward = restored(convert("pickscore", folder, tmp_path / "pick.nemo"))
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tokens = reward.tokenizer(PROMPTS, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    theirs, ours = [], []
    for height, width in ((300, 200), (200, 320), (512, 512), (150, 130)):
        pixels = photograph(height, width)
        image = Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy())
        with torch.no_grad():
            seen = processor(images=image, return_tensors="pt").pixel_values
            theirs.append(model(**tokens, pixel_values=seen).logits_per_image[0])
        ours.append(reward.score_matrix(pixels.unsqueeze(0), PROMPTS)[0])
    assert (torch.stack(ours) - torch.stack(theirs)).abs().max() < 0.02 * torch.stack(theirs).std()


def test_clipscore_its_prefix_and_the_image_processor(tmp_path: Path, images: Tensor) -> None:
    model, folder = toy_clip(), write_tokenizer(tmp_path / "clip")
    model.save_pretrained(folder)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    processor = {"image_mean": mean, "image_std": std, "resample": 2, "size": {"shortest_edge": 32}, "crop_size": 32}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    words = ("--prompt-prefix", "a cat ", "--name", "clip_b32")
    half = convert("clipscore", folder, tmp_path / "half.nemo", "--dtype", "float16", *words)
    assert load_nemo(half).state_dict()["visual_projection.weight"].dtype == torch.float16
    reward = restored(convert("clipscore", folder, tmp_path / "c.nemo", *words))
    how = {"mean": mean, "std": std, "interpolation": "bilinear"}
    with torch.no_grad():
        pixels = Preprocessing(32, **how)(images)
        image = torch.nn.functional.normalize(model.visual_projection(model.vision_model(pixels).pooler_output), dim=-1)
        ids = [reward.tokenizer("a cat " + prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
        text = torch.cat([model.text_projection(model.text_model(i).pooler_output) for i in ids])
        cosine = (image * torch.nn.functional.normalize(text, dim=-1)).sum(-1)
    assert cosine.min() < 0 < cosine.max(), "both sides of the clamp"
    torch.testing.assert_close(reward(images, PROMPTS), 2.5 * cosine.clamp(min=0), rtol=1e-4, atol=1e-6)
    assert list(reward.components(images, PROMPTS)) == ["clip_b32"]


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("wrapping", ["plain", "module", "text"])
def test_open_clip_layout(tmp_path: Path, images: Tensor, tokenizer: Path, activation: str, wrapping: str) -> None:
    """The same weights as a Hugging Face model's; against OpenCLIP's own code: tests/test_reference_open_clip.py."""
    model = toy_clip(seed=4, hidden_act=activation)
    state = open_clip_twin(model)
    if wrapping == "module":  # as a training run's checkpoint holds them
        saved: Any = {"epoch": 3, "name": "hps", "state_dict": {f"module.{key}": value for key, value in state.items()}}
    elif wrapping == "text":
        saved = {key if key.startswith(("visual", "logit")) else f"text.{key}": value for key, value in state.items()}
        saved["text.attn_mask"] = torch.zeros(16, 16)
    else:
        saved = state
    kind = "hps" if wrapping == "plain" else "hps_v2.1"
    checkpoint = tmp_path / "HPS_compressed.pt"
    torch.save(saved, checkpoint)
    options = ("--tokenizer", tokenizer, "--vision-heads", "4", "--text-heads", "3")
    path = convert(kind, checkpoint, tmp_path / "hps.nemo", "--activation", activation, *options)
    reward = restored(path)
    expected = hf_logits(model, reward, images, resize="pad") / model.logit_scale.exp()
    torch.testing.assert_close(reward.score_matrix(images, PROMPTS), expected, rtol=1e-4, atol=1e-6)
    assert reward.score_type == "hps"
    assert reward.name == kind.replace(".", "_")


def test_open_clip_config_beside_the_checkpoint(tmp_path: Path, images: Tensor, tokenizer: Path) -> None:
    folder = write_tokenizer(tmp_path / "clip")
    model = toy_clip(seed=4, hidden_act="quick_gelu")
    save_file(open_clip_twin(model), folder / "open_clip_model.safetensors")
    config: dict[str, Any] = {
        "model_cfg": {"quick_gelu": True, "vision_cfg": {"head_width": 8}, "text_cfg": {"heads": 3}},
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_mode": "squash"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    reward = restored(convert("clip", folder, tmp_path / "a.nemo"))
    expected = hf_logits(model, reward, images, mean=[0.5] * 3, std=[0.5] * 3, resize="squash")
    torch.testing.assert_close(reward.score_matrix(images, PROMPTS), expected, rtol=1e-4, atol=1e-5)


def test_heads_of_the_large_models() -> None:
    """ViT-H's vision tower, HPSv2's, has 80 channels a head, not 64: the wrong number changes scores silently."""
    from nemo_aligner_diffusion.formats.open_clip import OpenClipChoices, hf_layout

    def tower(prefix: str, width: int) -> dict[str, Tensor]:
        return {f"{prefix}transformer.resblocks.0.mlp.c_fc.weight": torch.empty(4 * width, width, device="meta")}

    for vision, text, heads in (
        (1280, 1024, (16, 16)),
        (1024, 768, (16, 12)),
        (768, 512, (12, 8)),
        (1664, 1280, (16, 20)),
    ):
        state = {
            **tower("visual.", vision),
            **tower("", text),
            "visual.conv1.weight": torch.empty(vision, 3, 14, 14, device="meta"),
            "visual.positional_embedding": torch.empty(257, vision, device="meta"),
            "visual.proj": torch.empty(vision, 1024, device="meta"),
            "positional_embedding": torch.empty(77, text, device="meta"),
            "token_embedding.weight": torch.empty(49408, text, device="meta"),
            "text_projection": torch.empty(text, 1024, device="meta"),
        }
        config, _ = hf_layout(state, "x.pt", OpenClipChoices("gelu"))
        sides = (config["vision_config"], config["text_config"])
        assert tuple(side["num_attention_heads"] for side in sides) == heads
        assert config["vision_config"]["image_size"] == 224
        assert config["text_config"]["eos_token_id"] == 49407


def head_state(widths: list[int], places: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for place, (inner, outer) in zip(places, itertools.pairwise(widths), strict=True):
        state[f"layers.{place}.weight"] = torch.randn(outer, inner, generator=generator) / inner**0.5
        state[f"layers.{place}.bias"] = torch.randn(outer, generator=generator)
    return state


def numpy_rating(head: dict[str, Tensor], embeddings: Tensor, relu: bool) -> np.ndarray:
    """The published forward pass in float64: normalise, then the layers in order."""
    values = embeddings.double().numpy()
    values = values / np.linalg.norm(values, axis=-1, keepdims=True)
    places = sorted({int(key.split(".")[1]) for key in head})
    for place in places:
        weight, bias = (head[f"layers.{place}.{kind}"].double().numpy() for kind in ("weight", "bias"))
        values = values @ weight.T + bias
        if relu and place != places[-1]:
            values = np.maximum(values, 0)
    return values[:, 0]


@pytest.mark.parametrize(("places", "relu"), [((0, 2, 4, 6, 7), False), ((0, 3, 6, 9, 11), True)])
def test_aesthetic(tmp_path: Path, images: Tensor, places: tuple[int, ...], relu: bool) -> None:
    model, head = toy_clip(seed=5), head_state([20, 24, 12, 8, 4, 1], places)
    model.save_pretrained(tmp_path / "clip")
    torch.save(head, tmp_path / "head.pth")
    path = convert("aesthetic", tmp_path / "head.pth", tmp_path / "a.nemo", "--clip", tmp_path / "clip")
    with torch.no_grad():
        embeddings = model.visual_projection(model.vision_model(Preprocessing(32)(images)).pooler_output)
    expected = torch.from_numpy(numpy_rating(head, embeddings, relu))
    reward = restore_reward(path, micro_batch_size=2, activation_checkpointing=True)
    leaf = images.clone().requires_grad_()
    score = reward(leaf, PROMPTS)
    torch.testing.assert_close(score.double(), expected, rtol=1e-4, atol=1e-6)
    assert list(reward.components(images, PROMPTS)) == ["aesthetic"]
    section = {"name": "clip", "model": {"restore_from_path": str(path)}}  # as conf/rm/aesthetic.yaml says
    torch.testing.assert_close(build_reward(section)(images, PROMPTS), score.detach())
    score.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().max() > 1e-6
    double = restore_reward(path, dtype=torch.float64)
    small = torch.rand(1, 3, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(double(small, [""]).sum(), small)
    direction = torch.randn(small.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ends = [double(small + sign * 1e-5 * direction, [""]).item() for sign in (1, -1)]
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx((gradient * direction).sum().item(), rel=1e-5)


def real_head() -> Path | None:
    """The published head: beside the repository (../shared/data/rewards) or in $NAD_REWARD_FILES."""
    places = [Path(given) for given in [os.environ.get("NAD_REWARD_FILES")] if given]
    places += [parent / "shared" / "data" / "rewards" for parent in ROOT.parents]
    files = (place / "sac+logos+ava1-l14-linearMSE.pth" for place in places)
    return next((file for file in files if file.is_file()), None)


@pytest.mark.skipif(real_head() is None, reason="no ../shared/data/rewards with the published aesthetic head")
def test_the_published_aesthetic_head(tmp_path: Path, images: Tensor) -> None:
    from transformers import CLIPConfig

    source = real_head()
    assert source is not None
    head = torch.load(source, map_location="cpu", weights_only=True)
    sections = toy_clip().config.to_dict()
    model = CLIPModel(CLIPConfig(**{**sections, "projection_dim": 768})).eval()
    model.save_pretrained(tmp_path / "clip")
    path = convert("aesthetic", source, tmp_path / "a.nemo", "--clip", tmp_path / "clip")
    assert load_nemo(path).config["head"] == {"widths": [768, 1024, 128, 64, 16, 1], "activation": "identity"}
    with torch.no_grad():
        embeddings = model.visual_projection(model.vision_model(Preprocessing(32)(images)).pooler_output)
    expected = torch.from_numpy(numpy_rating(head, embeddings, relu=False))
    torch.testing.assert_close(restore_reward(path)(images, PROMPTS).double(), expected, rtol=1e-4, atol=1e-6)


def test_help_is_quick_and_needs_no_torch() -> None:
    code = (
        "import sys, runpy\n"
        "sys.argv = ['x', '--help']\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'omegaconf'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0, shown.stderr
    for kind in ("pickscore", "hps_v2.1", "clipscore", "aesthetic", "image_reward"):
        assert kind in shown.stdout


def test_what_is_refused_and_how(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = write_tokenizer(tmp_path / "clip"), tmp_path / "out.nemo"
    model = toy_clip()
    model.save_pretrained(folder)
    start = ("--kind", "clip", "--output", output, "--source")
    state = open_clip_twin(model)
    checkpoint = tmp_path / "open.pt"

    assert "--source is needed" in refused(capsys, "--kind", "clip", "--output", output)
    assert "no such file or folder" in refused(capsys, *start, "./nothing/here/at/all")
    assert "hf download some/repository" in refused(capsys, *start, "some/repository")
    assert "leave them out" in refused(capsys, *start, folder, "--activation", "gelu").lower()
    assert "no effect with --kind clip" in refused(capsys, *start, folder, "--clip", folder)
    idle = ("--kind", "image_reward", "--source", folder, "--output", output, "--score", "hps", "--resize", "pad")
    assert "--score, --resize has no effect with --kind image_reward" in refused(capsys, *idle)
    assert "no CLIP here: it holds merges.txt, vocab.json" in refused(capsys, *start, tokenizer)

    torch.save(state, checkpoint)
    message = refused(capsys, *start, checkpoint, "--tokenizer", tokenizer)
    assert "--activation gelu" in message
    assert "quick_gelu" in message
    options = ("--activation", "gelu", "--tokenizer", tokenizer)
    message = refused(capsys, *start, checkpoint, *options, "--vision-heads", "5")
    assert "no network can be built" in message
    assert "--vision-heads" in message
    torch.save({**state, "visual.attn_pool.query": torch.zeros(3)}, checkpoint)
    assert "visual.attn_pool.query (3,) has no place" in refused(capsys, *start, checkpoint, *options)
    torch.save({k: v for k, v in state.items() if k != "visual.ln_pre.weight"}, checkpoint)
    assert "pre_layrnorm.weight (32,) is missing" in refused(capsys, *start, checkpoint, *options)
    torch.save({"visual.conv1.weight": torch.zeros(8, 3, 4, 4)}, checkpoint)
    assert "lacks positional_embedding" in refused(capsys, *start, checkpoint, *options)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "hf.safetensors")
    assert "Give the folder it lies in" in refused(capsys, *start, tmp_path / "hf.safetensors")

    class Hostile:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "pwned"),))

    torch.save({"state_dict": state, "args": Hostile()}, checkpoint)
    assert "weights_only=True" in refused(capsys, *start, checkpoint, *options)
    assert not (tmp_path / "pwned").exists()

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "siglip"}))
    assert "'siglip'; expected clip" in refused(capsys, *start, folder)
    config["text_config"]["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    assert "text_model.encoder.layers.2" in refused(capsys, *start, folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip", "hf.safetensors", "open.pt", "tokenizer"]


def test_descriptions_beside_the_weights_that_cannot_be_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = write_tokenizer(tmp_path / "clip"), tmp_path / "out.nemo"
    toy_clip().save_pretrained(folder)
    words = ("--kind", "clip", "--source", folder, "--output", output)
    processor = folder / "preprocessor_config.json"
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    for content, message in (
        ({**sizes, "resample": 1}, "Pillow's filter 1"),
        ({**sizes, "size": {"shortest_edge": 48}}, "resizes to 48 and crops to (32, 32)"),
        ({**sizes, "image_mean": [0.5]}, "preprocessing.mean"),
        ({}, "resizes to 224"),
        ({**sizes, "rescale_factor": 1}, "expected 32 pixels"),
    ):
        processor.write_text(json.dumps(content))
        assert message in refused(capsys, *words)
    processor.write_text("{")
    assert "preprocessor_config.json is not valid JSON" in refused(capsys, *words)
    processor.unlink()
    (folder / "model.safetensors").rename(folder / "model-1-of-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    assert "names no files of this folder" in refused(capsys, *words)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece", "vocab": {}}}))
    (folder / "vocab.json").unlink()
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-1-of-1.safetensors").rename(folder / "model.safetensors")
    assert "not the tokenizer of a CLIP" in refused(capsys, *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip"]


def test_nothing_is_overwritten_unasked_and_nothing_half_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = write_tokenizer(tmp_path / "clip"), tmp_path / "out.nemo"
    model = toy_clip()
    model.save_pretrained(folder)
    output.write_text("precious")
    words = ("--kind", "clip", "--source", folder, "--output", output)
    assert "--overwrite" in refused(capsys, *words)
    assert "is a folder" in refused(capsys, *words[:-1], folder)
    # NaN weights, and a tokenizer of another model: found by restoring the draft.
    broken = {**model.state_dict(), "visual_projection.weight": torch.full((20, 32), torch.nan)}
    save_file(broken, folder / "model.safetensors")
    assert "scores a grey picture nan" in refused(capsys, *words, "--overwrite")
    model.save_pretrained(folder)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({**vocabulary, "zebra</w>": END_OF_TEXT + 1}))
    message = refused(capsys, *words, "--overwrite")
    assert f"Nothing was written: {output}" in message
    assert "same model" in message
    assert output.read_text() == "precious"
    write_tokenizer(folder)
    assert main([*map(str, words), "--overwrite"]) == 0
    assert load_nemo(output).config["converted"] == {"kind": "clip", "source": "clip"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip", "out.nemo"]


def test_tokenizer_json_alone(tmp_path: Path, images: Tensor) -> None:
    """What transformers 5 saves: tokenizer.json in place of vocab.json and merges.txt."""
    folder = write_tokenizer(tmp_path / "clip")
    toy_clip().save_pretrained(folder)
    reward = restored(convert("clip", folder, tmp_path / "two.nemo"))
    for name in tokenizer_files():
        (folder / name).unlink()
    reward.tokenizer.save_pretrained(folder)
    assert not (folder / "vocab.json").exists()
    again = restored(convert("clip", folder, tmp_path / "one.nemo"))
    assert torch.equal(again(images, PROMPTS), reward(images, PROMPTS))


def test_repositories_in_the_cache_need_no_network(
    tmp_path: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights from one cached repository, the tokenizer from another, as PickScore's; the Hub is not reachable here."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def cached(name: str) -> Path:
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        folder = repository / "snapshots" / ("0" * 40)
        folder.mkdir(parents=True)
        return folder

    output = tmp_path / "pick.nemo"
    words = ["--kind", "pickscore", "--output", str(output)]
    assert "hf download yuvalkirstain/PickScore_v1" in refused(capsys, *words)
    toy_clip().save_pretrained(cached("yuvalkirstain/PickScore_v1"))
    assert "hf download laion/CLIP-ViT-H-14" in refused(capsys, *words)
    write_tokenizer(cached("laion/CLIP-ViT-H-14-laion2B-s32B-b79K"))
    assert main(words) == 0
    assert "score pickscore" in capsys.readouterr().out
    folder = write_tokenizer(tmp_path / "clip")
    toy_clip().save_pretrained(folder)
    expected = restored(convert("clip", folder, tmp_path / "local.nemo"))(images, PROMPTS)
    assert torch.equal(restored(output)(images, PROMPTS), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.2.bias": torch.zeros(3)}, r"head.1.bias is \(3,\) and should be \(12,\)"),
        (
            {"layers.7.weight": torch.zeros(2, 4), "layers.7.bias": torch.zeros(2)},
            r"its weights are of \[20, .*, 2\]",
        ),
        ({"classifier.weight": torch.zeros(2)}, "classifier.weight .* has no place"),
        ({"layers.8.weight": torch.zeros(1, 1), "layers.8.bias": torch.zeros(1)}, "--head-activation"),
    ],
)
def test_heads_that_are_none(tmp_path: Path, change: dict[str, Tensor], message: str) -> None:
    from nemo_aligner_diffusion.rewards.convert import Conversion, convert_reward

    toy_clip().save_pretrained(tmp_path / "clip")
    torch.save(head_state([20, 24, 12, 8, 4, 1], (0, 2, 4, 6, 7)) | change, tmp_path / "head.pth")
    what = Conversion("aesthetic", str(tmp_path / "head.pth"), clip=str(tmp_path / "clip"))
    with pytest.raises(AlignerError, match=message):
        convert_reward(what, tmp_path / "a.nemo")
    assert not (tmp_path / "a.nemo").exists()


def test_only_names_that_the_hub_could_hold_are_looked_up() -> None:
    """A name of thousands of characters, as an archive may give, once reached the file system and failed there."""
    assert is_hub_name("openai/clip-vit-large-patch14")
    assert is_hub_name("a" * 96 + "/" + "b" * 96)
    for name in ("a" * 97 + "/b", "a/" + "b" * 5000, "../b", "a/b/c", "owner", "/a", "a/", "a b/c"):
        assert not is_hub_name(name)
