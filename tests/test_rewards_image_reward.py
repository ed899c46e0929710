"""ImageReward: equal to the published computation on its own checkpoint layout, in and out of ``.nemo``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny.image_reward import (
    CLS,
    MAX_LENGTH,
    PAD,
    SEP,
    TEXT_HEADS,
    UNK,
    UNUSED,
    VISION_HEADS,
    VOCABULARY,
    WORDS,
    reference_score,
    toy_checkpoint,
)

from nemo_aligner_diffusion.cli import convert_reward as convert_cli
from nemo_aligner_diffusion.errors import AlignerError, ArchiveError, CheckpointError, RewardError
from nemo_aligner_diffusion.formats.nemo import load_nemo, save_nemo
from nemo_aligner_diffusion.rewards import build_reward, restore_reward
from nemo_aligner_diffusion.rewards.image_reward.archive import (
    architecture,
    checkpoint_name,
    convert_image_reward_to_nemo,
)
from nemo_aligner_diffusion.rewards.image_reward.reward import ImageReward, ImageRewardNetwork
from nemo_aligner_diffusion.rewards.image_reward.tokenizer import tokenizer_from_bytes
from nemo_aligner_diffusion.rewards.support.preprocessing import Preprocessing

PROMPTS = ["a red apple", "cats!", "a GREEN cat on a purple mat"]
IDS = [
    [CLS, *(WORDS.index(word) for word in words), SEP]
    for words in (
        ("a", "red", "apple"),
        ("cat", "##s", "!"),
        ("a", "green", "cat", "on", "a", "[UNK]", "mat"),
    )
]
MEAN, STD = 0.16717362830052426, 1.0333394966054072


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as a user has it: the checkpoint and the tokenizer's file."""
    torch.save(toy_checkpoint(), tmp_path / "ImageReward.pt")
    (tmp_path / "vocab.txt").write_bytes(VOCABULARY)
    return tmp_path


def converted(folder: Path, checkpoint: str = "ImageReward.pt", **settings: Any) -> Path:
    settings = {"vision_heads": VISION_HEADS, "text_heads": TEXT_HEADS, "max_length": MAX_LENGTH, **settings}
    return convert_image_reward_to_nemo(folder / checkpoint, folder, folder / "image_reward.nemo", **settings)


@pytest.fixture
def archive_path(folder: Path) -> Path:
    return converted(folder)


def restored(path: Path, **settings: Any) -> ImageReward:
    reward = restore_reward(path, **settings)
    assert isinstance(reward, ImageReward)
    return reward


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Path:
    archive = load_nemo(path)
    config, state = archive.config, archive.state_dict()
    config["tokenizer"] = {"vocab_file": "nemo:vocab.txt", "max_length": MAX_LENGTH}
    change(config, state)
    named = isinstance(config.get("tokenizer"), dict) and "vocab_file" in config["tokenizer"]
    return save_nemo(path, config, state, {"vocab.txt": VOCABULARY} if named else {})


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_equals_the_published_computation(
    archive_path: Path, images: torch.Tensor, dtype: torch.dtype, relative: float
) -> None:
    reward = restored(archive_path, dtype=dtype)
    scores = reward(images.to(dtype), PROMPTS)
    expected = (reference_score(toy_checkpoint(), Preprocessing(32)(images.double()), IDS) - MEAN) / STD
    assert expected.std() > 0.1, "a toy that scores everything alike would prove nothing"
    assert scores.dtype == dtype
    torch.testing.assert_close(scores.double(), expected, rtol=relative, atol=0)
    assert list(reward.components(images, PROMPTS)) == ["image_reward"]


def test_tokens(archive_path: Path) -> None:
    reward = restored(archive_path)
    ids, mask = reward.tokenize(PROMPTS)
    assert ids.shape == mask.shape == (3, MAX_LENGTH)
    for row, kept, expected in zip(ids.tolist(), mask.tolist(), IDS, strict=True):
        padding = MAX_LENGTH - len(expected)
        assert row == expected + [PAD] * padding
        assert kept == [1] * len(expected) + [0] * padding
    tokenizer = reward.tokenizer
    assert tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [len(WORDS), len(WORDS) + 1]
    assert tokenizer.bos_token_id == len(WORDS)
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (PAD, UNK)


def test_the_published_vocabulary_puts_the_added_tokens_where_blip_has_them() -> None:
    fillers = [f"[unused{number}]" for number in range(30522 - len(WORDS))]
    tokenizer = tokenizer_from_bytes("\n".join([*WORDS, *fillers]).encode(), 30524, "t")
    assert tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [30522, 30523]


def test_gradient_in_float64(archive_path: Path) -> None:
    reward = restored(archive_path, dtype=torch.float64)
    images = torch.rand(2, 3, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda pictures: reward(pictures, PROMPTS[:2]), images, fast_mode=True)
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS[:2]).sum(), images)
    assert gradient.abs().amax(dim=(1, 2, 3)).min() > 1e-3
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in reward.parameters())


def test_micro_batches_checkpointing_and_neighbours_change_nothing(archive_path: Path, images: torch.Tensor) -> None:
    gradients, scores = [], []
    for settings in ({}, {"micro_batch_size": 2, "activation_checkpointing": True}, {"micro_batch_size": 1}):
        leaf = images.double().requires_grad_()
        score = restored(archive_path, dtype=torch.float64, **settings)(leaf, PROMPTS)
        score.sum().backward()
        scores.append(score.detach())
        gradients.append(leaf.grad)
    for other in (1, 2):
        torch.testing.assert_close(scores[0], scores[other], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients[0], gradients[other], rtol=1e-9, atol=1e-12)
    reward = restored(archive_path, dtype=torch.float64)
    alone = [reward(images[i : i + 1].double(), PROMPTS[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(torch.cat(alone), scores[0], rtol=1e-12, atol=1e-12)


def test_half_precision(folder: Path, images: torch.Tensor) -> None:
    exact = restored(converted(folder))(images, PROMPTS)
    path = converted(folder, dtype=torch.float16)
    assert {tensor.dtype for tensor in load_nemo(path).state_dict().values()} == {torch.float16}
    full, half = restored(path), restored(path, dtype=torch.bfloat16)
    assert (full.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert torch.allclose(full(images, PROMPTS), exact, atol=3e-2)
    assert half(images, PROMPTS).dtype == torch.float32
    assert torch.allclose(half(images, PROMPTS), exact, atol=0.3)
    assert torch.isfinite(restored(path, dtype=torch.float16)(images, PROMPTS)).all(), "the mask must fit float16"
    outside = full(images, PROMPTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = full(images, PROMPTS)
    assert torch.equal(inside, outside), "a trainer's autocast must not reach the reward"


def test_long_prompts_are_truncated_and_counted(archive_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reward = restored(archive_path)
    ids, mask = reward.tokenize(["cat " * 40, "cat"])
    assert ids[0].tolist() == [CLS, *[WORDS.index("cat")] * (MAX_LENGTH - 2), SEP]
    assert mask[0].all()
    assert reward.truncated_prompts == 1
    assert f"{MAX_LENGTH} tokens" in caplog.text
    reward.tokenize(["cat " * (MAX_LENGTH - 2)])  # exactly fills the limit
    assert reward.truncated_prompts == 1
    reward.text_rows.size = 1
    reward.tokenize(PROMPTS)
    assert len(reward.text_rows) == 1


def test_checkpoints_of_other_origin(folder: Path, images: torch.Tensor) -> None:
    expected = restored(converted(folder))(images, PROMPTS)
    state = toy_checkpoint()
    bare = {name: tensor for name, tensor in state.items() if not name.startswith(UNUSED)}
    torch.save({f"module.{name}": tensor for name, tensor in bare.items()}, folder / "trained.pt")
    assert torch.equal(restored(converted(folder, "trained.pt"))(images, PROMPTS), expected)
    save_file(state, folder / "model.safetensors")
    path = converted(folder, "model.safetensors", mean=0.0, std=1.0, name="mine", extra={"source": "me"})
    reward = restored(path)
    assert torch.allclose((reward(images, PROMPTS) - MEAN) / STD, expected, rtol=1e-5)
    assert reward.name == "mine"
    assert load_nemo(path).config["source"] == "me"


def test_heads_of_64_channels_unless_told(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="24 channels make no 0 attention heads"):
        converted(folder, vision_heads=None)
    with pytest.raises(CheckpointError, match="20 channels make no 3 attention heads"):
        converted(folder, text_heads=3)


@pytest.mark.parametrize("setting", [{"std": 0.0}, {"max_length": 1}, {"max_length": 99}])
def test_impossible_archives_are_not_written(folder: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(RewardError):
        converted(folder, **setting)
    assert not (folder / "image_reward.nemo").exists()


def test_converted_from_the_command_line(folder: Path, images: torch.Tensor) -> None:
    output = folder / "out.nemo"
    arguments = ["--kind", "image_reward", "--source", folder / "ImageReward.pt", "--tokenizer", folder]
    arguments += ["--vision-heads", VISION_HEADS, "--text-heads", TEXT_HEADS, "--output", output]
    assert convert_cli.main(list(map(str, arguments))) == 0
    expected = restored(converted(folder))(images, PROMPTS)
    torch.testing.assert_close(restored(output)(images, PROMPTS), expected)


def test_the_published_sizes_are_read_off_the_shapes() -> None:
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision |= {"image_size": 224, "patch_size": 16}
    text = {"vocab_size": 30524, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    text |= {"num_attention_heads": 12, "max_position_embeddings": 512}
    with torch.device("meta"):
        network = ImageRewardNetwork(vision, text, [1024, 128, 64, 16])
    shapes = {checkpoint_name(key): tensor for key, tensor in network.state_dict().items()}
    assert architecture("ImageReward.pt", shapes) == {"vision": vision, "text": text, "head": [1024, 128, 64, 16]}


def test_built_from_a_configuration(archive_path: Path, images: torch.Tensor, caplog: pytest.LogCaptureFixture) -> None:
    section = {"name": "clip", "model": {"restore_from_path": str(archive_path), "score": "hps"}}
    assert torch.equal(build_reward(section)(images, PROMPTS), restored(archive_path)(images, PROMPTS))
    assert "rm.model.score has no effect" in caplog.text


def _drop(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda state: state.pop(name)


def _put(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda state: state.update({name: torch.zeros(shape, dtype=dtype)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("blip.visual_encoder.pos_embed"), "lacks the tensor blip.visual_encoder.pos_embed"),
        (_drop("mlp.layers.6.weight"), "lacks the tensor mlp.layers.6.weight"),
        (_drop("mlp.layers.7.bias"), r"mlp.layers.7.bias \(1,\) is missing"),
        (
            _drop("blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"),
            r"key.weight \(20, 24\) is missing",
        ),
        (_put("blip.text_encoder.pooler.dense.weight", 20, 20), r"pooler.dense.weight \(20, 20\) has no place"),
        (_put("blip.visual_encoder.pos_embed", 1, 16, 24), "15 patch positions"),
        (_put("blip.visual_encoder.patch_embed.proj.weight", 24, 3), r"has \(24, 3\) for the tensor"),
        (_put("mlp.layers.2.weight", 12, 17), r"mlp.layers.2.weight is \(12, 17\)"),
        (_put("mlp.layers.2.weight", 12, 18, dtype=torch.int8), "holds torch.int8, not floating-point"),
        (_put("blip.text_encoder.embeddings.word_embeddings.weight", 9, 20), "ids up to 15, its text model has 9"),
    ],
)
def test_checkpoints_that_do_not_fit(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    state = toy_checkpoint()
    change(state)
    torch.save(state, folder / "ImageReward.pt")
    with pytest.raises(AlignerError, match=message):
        converted(folder)
    assert not (folder / "image_reward.nemo").exists()


def test_a_checkpoint_with_code_is_refused(folder: Path) -> None:
    torch.save({"mlp": CheckpointError("boom")}, folder / "ImageReward.pt")
    with pytest.raises(CheckpointError, match="weights_only"):
        converted(folder)


def _set(path: str, value: Any) -> Callable[..., None]:
    def change(config: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
        *sections, key = path.split(".")
        for section in sections:
            config = config[section]
        config[key] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("target", "nemo_aligner_diffusion.rewards.image_reward.ImageRewards", "did you mean .*ImageReward"),
        ("vision", [1], "expected a mapping"),
        ("text", None, "expected a mapping"),
        ("vision.hidden_size", 27, "vision.hidden_size is '27', and its weights are of 24"),
        ("vision.hidden_size", "wide", "vision.hidden_size is 'wide'"),
        ("vision.num_hidden_layers", 10**9, "vision.num_hidden_layers is"),
        ("vision.num_attention_heads", 5, r"24 channels make no 5 attention heads \(vision_heads\)"),
        ("vision.num_attention_heads", 0, "make no 0 attention heads"),
        ("vision.patch_size", 10**12, "vision.patch_size is"),
        ("text.max_position_embeddings", 1 << 20, "text.max_position_embeddings is"),
        ("head", [18, 12, 10], "its head is"),
        ("head", "1234", "its head is '1234', and its weights are of .18, 12, 10, 6."),
        ("score", 3, "expected a mapping"),
        ("score.mean", float("nan"), r"score\.mean"),
        ("score.mean", 10**400, r"score\.mean"),
        ("score.std", 0, r"score\.std 0\.0; expected a number, and one above 0"),
        ("tokenizer.max_length", 1, r"tokenizer\.max_length"),
        ("tokenizer.max_length", MAX_LENGTH + 5, r"tokenizer\.max_length"),
        ("tokenizer", 5, "expected a mapping"),
    ],
)
def test_archives_whose_parts_do_not_fit(archive_path: Path, path: str, value: Any, message: str) -> None:
    with pytest.raises(ArchiveError, match=message) as caught:
        restore_reward(rewritten(archive_path, _set(path, value)))
    assert str(archive_path) in str(caught.value)


def test_tokenizer_from_a_folder(archive_path: Path, folder: Path, tmp_path: Path, images: torch.Tensor) -> None:
    expected = restored(archive_path)(images, PROMPTS)
    path = rewritten(archive_path, lambda config, state: config.pop("tokenizer"))
    with pytest.raises(ArchiveError, match=r"rm\.model\.tokenizer"):
        restore_reward(path)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ArchiveError, match=r"vocab\.txt"):
        restore_reward(path, tokenizer=empty)
    torch.testing.assert_close(restored(path, tokenizer=folder)(images, PROMPTS), expected)


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        (b"\xff\xfe", "damaged"),
        (b"", "lacks"),
        (b"[PAD]\n[PAD]\n", "twice"),
        (VOCABULARY.replace(b"[SEP]", b"sep"), r"lacks \[SEP\]"),
        (VOCABULARY + b"zebra\n", "ids up to 16"),
    ],
)
def test_damaged_vocabularies(vocabulary: bytes, message: str) -> None:
    with pytest.raises(ArchiveError, match=message):
        tokenizer_from_bytes(vocabulary, len(WORDS) + 2, "x.nemo")
    windows = tokenizer_from_bytes(VOCABULARY.replace(b"\n", b"\r\n"), len(WORDS) + 2, "x.nemo")
    assert windows("a cat").input_ids == [CLS, WORDS.index("a"), WORDS.index("cat"), SEP]
