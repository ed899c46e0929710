"""The CLIP reward: equal to Hugging Face's CLIPModel, restored from our archives and from NeMo's Megatron layout."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tiny.clip import (
    END_OF_TEXT,
    VOCABULARY_SIZE,
    megatron_twin,
    tensor_parallel_shards,
    tokenizer_files,
    toy_clip,
)

from nemo_aligner_diffusion.errors import AlignerError, ArchiveError, RewardError
from nemo_aligner_diffusion.formats.nemo import Limits, load_nemo, save_nemo
from nemo_aligner_diffusion.rewards import CLIPReward, convert_hf_clip_to_nemo, restore_reward
from nemo_aligner_diffusion.rewards.clip.tokenizer import tokenizer_from_bytes
from nemo_aligner_diffusion.rewards.support.preprocessing import Preprocessing

PROMPTS = ["a red apple", "cat", "Grün & 猫!"]


@pytest.fixture
def archive_path(tmp_path: Path) -> Path:
    return convert_hf_clip_to_nemo(toy_clip(), tokenizer_files(), tmp_path / "clip.nemo")


def restored(path: Path, **settings: Any) -> CLIPReward:
    reward = restore_reward(path, **settings)
    assert isinstance(reward, CLIPReward)
    return reward


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor], dict[str, bytes]], None]) -> Path:
    """The archive at ``path`` with its config, weights or artifacts changed."""
    archive = load_nemo(path)
    config, state = archive.config, archive.state_dict()
    artifacts = tokenizer_files()
    config["tokenizer"] = {"vocab_file": "nemo:vocab.json", "merges_file": "nemo:merges.txt", "max_length": 16}
    change(config, state, artifacts)
    return save_nemo(path, config, state, artifacts)


def test_equals_hugging_face(archive_path: Path, images: torch.Tensor) -> None:
    reward, model = restored(archive_path), toy_clip()
    tokens = reward.tokenizer(PROMPTS, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**tokens, pixel_values=Preprocessing(32)(images)).logits_per_image
    assert logits.std() > 0.1, "a toy that scores everything alike would prove nothing"
    assert torch.allclose(reward.score_matrix(images, PROMPTS), logits, atol=1e-5)
    assert torch.allclose(reward(images, PROMPTS), logits.diag(), atol=1e-5)
    assert list(reward.components(images, PROMPTS)) == ["clip"]


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_megatron_layout_gives_the_same_scores(tmp_path: Path, images: torch.Tensor, legacy: bool, prefix: str) -> None:
    model = toy_clip(seed=1)
    config, state = megatron_twin(model, legacy=legacy)
    state = {prefix + name: tensor for name, tensor in state.items()}
    assert len(state[f"{prefix}model.text_encoder.language_model.embedding.word_embeddings.weight"]) > VOCABULARY_SIZE
    nemo = restored(save_nemo(tmp_path / "nemo.nemo", config, state, tokenizer_files()))
    ours = restored(convert_hf_clip_to_nemo(model, tokenizer_files(), tmp_path / "ours.nemo"))
    assert torch.allclose(nemo.score_matrix(images, PROMPTS), ours.score_matrix(images, PROMPTS), atol=1e-5)


def write_shards(path: Path, config: dict[str, Any], shards: list[dict[str, torch.Tensor]]) -> Path:
    """As NeMo lays out an archive of several tensor-parallel ranks."""
    members = {"model_config.yaml": OmegaConf.to_yaml(OmegaConf.create(config)).encode(), **tokenizer_files()}
    for rank, shard in enumerate(shards):
        stream = io.BytesIO()
        torch.save(shard, stream)
        members[f"mp_rank_{rank:02d}/model_weights.ckpt"] = stream.getvalue()
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("ranks", [2, 4])
def test_tensor_parallel_shards_give_the_same_scores(
    tmp_path: Path, images: torch.Tensor, legacy: bool, ranks: int
) -> None:
    model = toy_clip(seed=1, text_heads=4)
    config, state = megatron_twin(model, legacy=legacy)
    shards = tensor_parallel_shards(state, ranks, legacy=legacy)
    attention = "model.vision_encoder.backbone.transformer.layers.0.self_attention."
    assert shards[0][f"{attention}query_key_value.weight"].shape == (96 // ranks, 32)
    assert shards[0][f"{attention}dense.weight"].shape == (32, 32 // ranks)
    config["tensor_model_parallel_size"] = ranks
    merged = restored(write_shards(tmp_path / "tp.nemo", config, shards))
    ours = restored(convert_hf_clip_to_nemo(model, tokenizer_files(), tmp_path / "ours.nemo"))
    assert torch.allclose(merged.score_matrix(images, PROMPTS), ours.score_matrix(images, PROMPTS), atol=1e-5)


def test_tensor_parallel_shards_that_do_not_belong_together(tmp_path: Path) -> None:
    config, state = megatron_twin(toy_clip(text_heads=4), legacy=True)
    path = tmp_path / "tp.nemo"

    def refused(message: str, change: Callable[[list[dict[str, torch.Tensor]]], Any], **keys: Any) -> None:
        shards = tensor_parallel_shards(state, 2, legacy=True)
        change(shards)
        with pytest.raises(ArchiveError, match=message):
            restore_reward(write_shards(path, {**config, **keys}, shards))

    bias = "model.text_encoder.language_model.encoder.layers.1.mlp.dense_4h_to_h.bias"
    refused(f"{bias} differs between .* 0 and 1", lambda shards: shards[1][bias].add_(1e-3))
    refused("hold different tensors", lambda shards: shards[1].pop(bias))
    refused("has shapes", lambda shards: shards[1].update({bias: torch.zeros(3)}))
    refused("tensor_model_parallel_size: 4", lambda shards: None, tensor_model_parallel_size=4)
    refused("1 of the tensor-parallel ranks", lambda shards: shards.pop(), tensor_model_parallel_size=2)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("vision", "global_average_pool", True),
        ("text", "normalization", "layernorm1p"),
        ("text", "transformer_block_type", "post_ln"),
        ("text", "position_embedding_type", "rope"),
    ],
)
def test_megatron_architectures_that_would_score_otherwise(tmp_path: Path, section: str, key: str, value: Any) -> None:
    config, state = megatron_twin(toy_clip(), legacy=True)
    config[section][key] = value
    with pytest.raises(ArchiveError, match=rf"{section}\.{key} = '{value}'"):
        restore_reward(save_nemo(tmp_path / "x.nemo", config, state, tokenizer_files()))


def test_tokenizer_named_by_its_repository_is_found_in_the_cache(
    tmp_path: Path, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NeMo's published configurations name openai/clip-vit-large-patch14 and carry no file of it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    config, state = megatron_twin(toy_clip(), legacy=True)
    config["tokenizer"] = {"library": "huggingface", "type": "openai/clip-vit-large-patch14", "vocab_file": None}
    path = save_nemo(tmp_path / "nemo.nemo", config, state)
    with pytest.raises(ArchiveError, match=r"openai/clip-vit-large-patch14.*rm\.model\.tokenizer"):
        restore_reward(path)
    repository = tmp_path / "hub" / "models--openai--clip-vit-large-patch14"
    snapshot = repository / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1" * 40)
    for name, content in tokenizer_files().items():
        (snapshot / name).write_bytes(content)
    ours = restored(convert_hf_clip_to_nemo(toy_clip(), tokenizer_files(), tmp_path / "ours.nemo"))
    assert torch.allclose(restored(path)(images, PROMPTS), ours(images, PROMPTS), atol=1e-5)


def test_megatron_layout_that_does_not_fit(tmp_path: Path) -> None:
    config, state = megatron_twin(toy_clip(), legacy=True)
    path = tmp_path / "x.nemo"
    save_nemo(path, config, {**state, "model.text_encoder.adapter.weight": torch.zeros(1)}, tokenizer_files())
    with pytest.raises(ArchiveError, match=r"text_encoder\.adapter\.weight .* has no place"):
        restore_reward(path)
    save_nemo(path, {**config, "vision": {**config["vision"], "num_layers": "two"}}, state, tokenizer_files())
    with pytest.raises(ArchiveError, match=r"vision\.num_layers"):
        restore_reward(path)
    embedding = "model.text_encoder.language_model.embedding.word_embeddings.weight"
    save_nemo(path, config, {**state, embedding: state[embedding][:100]}, tokenizer_files())
    with pytest.raises(ArchiveError, match="100 rows"):
        restore_reward(path)


@pytest.mark.parametrize("score", ["pickscore", "hps", "clipscore"])
def test_scores(archive_path: Path, images: torch.Tensor, score: str) -> None:
    reward = restored(archive_path, score=score)
    cosine = (reward.embed_images(images) * reward.embed_texts(PROMPTS)).sum(-1)
    scale = toy_clip().logit_scale.exp().item()
    expected = {"pickscore": scale * cosine, "hps": cosine, "clipscore": 2.5 * cosine.clamp(min=0)}[score]
    assert torch.allclose(reward(images, PROMPTS), expected, atol=1e-6)


def test_gradient_in_float64(archive_path: Path) -> None:
    reward = restored(archive_path, dtype=torch.float64)
    images = torch.rand(1, 3, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, ["a cat"]).sum(), images)
    direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    step = 1e-5
    with torch.no_grad():
        ends = [reward(images + sign * step * direction, ["a cat"]).item() for sign in (1, -1)]
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx((gradient * direction).sum().item(), rel=1e-6)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in reward.parameters())


def test_half_precision_archives_compute_in_the_dtype_asked_for(tmp_path: Path, images: torch.Tensor) -> None:
    path = convert_hf_clip_to_nemo(toy_clip(), tokenizer_files(), tmp_path / "half.nemo", dtype=torch.float16)
    full, half = restored(path), restored(path, dtype=torch.bfloat16)
    assert (full.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    exact = restored(convert_hf_clip_to_nemo(toy_clip(), tokenizer_files(), tmp_path / "full.nemo"))(images, PROMPTS)
    assert torch.allclose(full(images, PROMPTS), exact, atol=2e-2)
    assert half(images, PROMPTS).dtype == torch.float32
    assert torch.allclose(half(images, PROMPTS), exact, atol=0.6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(full(images, PROMPTS), full(images.clone(), PROMPTS).float())
        inside = full(images, PROMPTS)
    assert torch.equal(inside, full(images, PROMPTS)), "a trainer's autocast must not reach the reward"


def test_text_cache_is_bounded_and_survives_inference_mode(archive_path: Path, images: torch.Tensor) -> None:
    reward = restored(archive_path)
    reward.text_rows.size = 2
    with torch.inference_mode():
        first = reward.embed_texts(PROMPTS)
    assert len(reward.text_rows) == 2
    assert torch.equal(first, reward.embed_texts(PROMPTS))
    leaf = images.clone().requires_grad_()
    reward(leaf, PROMPTS).sum().backward()
    assert leaf.grad is not None
    reward.double()
    assert reward.embed_texts(PROMPTS).dtype == torch.float64
    assert reward.embed_texts([]).shape == (0, 20)


def test_long_prompts_are_truncated_and_counted(archive_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reward = restored(archive_path)
    long = "cat " * 40
    assert torch.isfinite(reward.embed_texts([long, "cat"])).all()
    assert reward.truncated_prompts == 1
    assert "16 tokens" in caplog.text
    ids = reward.tokenize(long)
    assert len(ids) == 16
    assert ids[-1] == END_OF_TEXT
    reward.embed_texts(["cat " * 14])  # exactly fills the limit
    assert reward.truncated_prompts == 2, "only tokenize(long) above counts"


def test_non_finite_images_stay_visible(archive_path: Path, images: torch.Tensor) -> None:
    images[1, 0, 5, 5] = float("nan")
    assert torch.isfinite(restored(archive_path)(images, PROMPTS)).tolist() == [True, False, True]


def _set(path: str, value: Any) -> Callable[..., None]:
    def change(config: dict[str, Any], state: dict[str, torch.Tensor], artifacts: dict[str, bytes]) -> None:
        *sections, key = path.split(".")
        for section in sections:
            config = config[section]
        config[key] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("target", "nemo_aligner_diffusion.rewards.clip.ClipReward", "did you mean .*CLIPReward"),
        ("target", "os.system", "its target 'os.system' is no reward that can be restored"),
        ("target", "evil.MegatronCLIPModel", "is no reward"),
        ("target", "nemo_aligner_diffusion.rewards.custom.load", "is no reward"),
        ("clip", 3, "expected a mapping"),
        ("clip.text_config.hidden_size", 48, r"text_model.* is \(.*24.*and should be \(.*48"),
        ("clip.text_config.hidden_size", "wide", "no network can be built"),
        ("clip.text_config.num_hidden_layers", 3, "is missing"),
        ("clip.text_config.num_hidden_layers", 10**9, "num_hidden_layers"),
        ("clip.vision_config.num_attention_heads", 5, "no network can be built"),
        ("clip.vision_config.num_hidden_layers", 1, "has no place"),
        ("clip.vision_config.hidden_act", "boom", "no network can be built"),
        ("clip.text_config.eos_token_id", 5, "wrong place"),
        ("score", "best", "score is 'best'"),
        ("preprocessing.mean", [0.5, 0.5], "preprocessing.mean"),
        ("preprocessing.std", [0.5, 0.0, 0.5], "preprocessing.std"),
        ("preprocessing.mean", [0.5, float("nan"), 0.5], r"preprocessing\.mean is \[0.5, nan, 0.5\]; expected three"),
        ("preprocessing.std", [0.5, float("inf"), 0.5], "preprocessing.std"),
        ("preprocessing.interpolation", "magic", "interpolation"),
        ("preprocessing.image_size", 64, "image_size is 64"),
        ("tokenizer.max_length", 1, "max_length"),
    ],
)
def test_archives_whose_parts_do_not_fit(archive_path: Path, path: str, value: Any, message: str) -> None:
    with pytest.raises(ArchiveError, match=message) as caught:
        restore_reward(rewritten(archive_path, _set(path, value)))
    assert str(archive_path) in str(caught.value)


def test_no_target_no_tokenizer(archive_path: Path, tmp_path: Path) -> None:
    def drop_tokenizer(config: dict[str, Any], state: dict[str, torch.Tensor], artifacts: dict[str, bytes]) -> None:
        del config["tokenizer"]
        artifacts.clear()

    path = rewritten(archive_path, drop_tokenizer)
    with pytest.raises(ArchiveError, match=r"rm\.model\.tokenizer"):
        restore_reward(path)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    with pytest.raises(ArchiveError, match=r"vocab\.json"):
        restore_reward(path, tokenizer=folder)
    for name, content in tokenizer_files().items():
        (folder / name).write_bytes(content)
    assert torch.isfinite(restored(path, tokenizer=folder).embed_texts(["cat"])).all()


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        (b"{", b"", "damaged"),
        (b"[1]", b"", "map strings"),
        (b'{"a": 0, "b": 0}', b"", "share a token id"),
        (b'{"a": 0}', b"", "startoftext"),
        (None, b"r e x\n", "tuple of length 2"),
        (None, b"#version: 0.2\nq q\n", "`qq` out of vocabulary"),
        (None, b"\xff\xff", "damaged"),
    ],
)
def test_damaged_tokenizers(vocab: bytes | None, merges: bytes, message: str) -> None:
    files = tokenizer_files()
    with pytest.raises(ArchiveError, match=message):
        tokenizer_from_bytes(files["vocab.json"] if vocab is None else vocab, merges, "x.nemo")


def test_tokenizer_larger_than_the_embedding(archive_path: Path) -> None:
    def add_entry(config: dict[str, Any], state: dict[str, torch.Tensor], artifacts: dict[str, bytes]) -> None:
        vocabulary = json.loads(artifacts["vocab.json"])
        artifacts["vocab.json"] = json.dumps({**vocabulary, "zebra</w>": len(vocabulary)}).encode()

    with pytest.raises(ArchiveError, match="same model"):
        restore_reward(rewritten(archive_path, add_entry))


def test_integer_weights_are_refused(archive_path: Path) -> None:
    def to_integers(config: dict[str, Any], state: dict[str, torch.Tensor], artifacts: dict[str, bytes]) -> None:
        state["visual_projection.weight"] = state["visual_projection.weight"].to(torch.int32)

    with pytest.raises(ArchiveError, match=r"visual_projection\.weight holds torch\.int32"):
        restore_reward(rewritten(archive_path, to_integers))


def test_impossible_settings(archive_path: Path) -> None:
    tokenizer = tokenizer_from_bytes(
        **{name.split(".")[0]: data for name, data in tokenizer_files().items()}, origin="t"
    )
    with pytest.raises(RewardError, match="not 'vibes'"):
        CLIPReward(toy_clip(), tokenizer, score="vibes")
    with pytest.raises(AlignerError):
        restore_reward(archive_path.with_name("missing.nemo"))


def test_limits_can_be_changed_for_an_archive_that_is_trusted(tmp_path: Path) -> None:
    path = convert_hf_clip_to_nemo(toy_clip(), tokenizer_files(), tmp_path / "x.nemo")
    with pytest.raises(ArchiveError, match="at most 20 records"):
        restore_reward(path, limits=Limits(records=20))
    restore_reward(path, limits=Limits(records=20_000))
