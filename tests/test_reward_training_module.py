"""The module: what it scores, what moves, what stays; a CLIP in, a .nemo out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny.clip import tokenizer_files as toy_tokenizer_files
from tiny.clip import toy_clip
from tiny.reward_training import blue_shards, toy_nemo

from nemo_aligner_diffusion.data.preferences.reward_pairs import PreferenceDataset, pictures
from nemo_aligner_diffusion.errors import CheckpointError, ConfigurationError
from nemo_aligner_diffusion.reward_training.clip_files import (
    load_hugging_face_clip,
    load_nemo_clip,
    save_clip_reward,
    tokenizer_files,
)
from nemo_aligner_diffusion.reward_training.configuration import TextSettings, TrainedParts, VisionSettings
from nemo_aligner_diffusion.reward_training.loss import preference_loss
from nemo_aligner_diffusion.reward_training.preference_clip import (
    MAX_LOGIT_SCALE,
    PreferenceCLIP,
    choose_trained_parts,
)
from nemo_aligner_diffusion.rewards import Preprocessing, convert_hf_clip_to_nemo, restore_reward
from nemo_aligner_diffusion.rewards.clip.reward import CLIPReward
from nemo_aligner_diffusion.rewards.clip.tokenizer import tokenizer_from_bytes

PROMPTS = ["a red apple", "cat", "a cat, an apple and a very long sentence that is cut", "red"]


def trained(
    vision: int | None = None, text: int | None = 0, projections: bool = True, logit_scale: bool = True
) -> TrainedParts:
    towers = VisionSettings(trainable_layers=vision), TextSettings(trainable_layers=text)
    return TrainedParts(projections, logit_scale, *towers)


EVERYTHING = trained(text=None)


@pytest.fixture
def reward(tmp_path: Path) -> CLIPReward:
    return load_nemo_clip(toy_nemo(tmp_path / "start.nemo"))


def module(reward: CLIPReward, parts: TrainedParts, **options: bool) -> PreferenceCLIP:
    return PreferenceCLIP(reward, parts, lambda named: (torch.optim.SGD([p for _, p in named], 0.1), None), **options)


def images(seed: int = 0) -> torch.Tensor:
    return torch.rand(4, 2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("parts", [trained(), EVERYTHING, trained(0, 0, projections=False)])
def test_scores_are_the_rewards(reward: CLIPReward, parts: TrainedParts) -> None:
    frozen = CLIPReward(toy_clip(), reward.tokenizer)
    pairs = images()
    repeated = [prompt for prompt in PROMPTS for _ in (0, 1)]
    expected = frozen(pairs.flatten(0, 1), repeated).view(4, 2)
    assert torch.allclose(module(reward, parts)(pairs, PROMPTS), expected, rtol=1e-5, atol=1e-5)


def test_pictures_of_any_size_are_scored_as_the_reward_scores_them(tmp_path: Path, reward: CLIPReward) -> None:
    from tiny.reward_training import blue_pairs

    from nemo_aligner_diffusion.data.preferences.shards import write_preference_shards

    pairs = blue_pairs(2, size=(48, 80))
    write_preference_shards(pairs, tmp_path / "s")
    data = PreferenceDataset(
        str(tmp_path / "s"), prepare=Preprocessing(32).square, micro_batch_size=2, shuffle_buffer=0
    )
    batch = next(iter(data))
    mine = module(reward, EVERYTHING)(batch["images"], batch["prompts"])
    frozen = CLIPReward(toy_clip(), reward.tokenizer)
    for row, pair in zip(mine, pairs, strict=True):
        both = torch.stack(pictures(pair))
        assert torch.allclose(row, frozen(both, [pair.prompt] * 2), rtol=1e-5, atol=1e-5)


def moved(reward: CLIPReward, parts: TrainedParts) -> set[str]:
    """Names of the parameters that one step changes."""
    learner = module(reward, parts)
    before = {name: parameter.detach().clone() for name, parameter in reward.model.named_parameters()}
    optimizer = learner.configure_optimizers()
    labels = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0.5, 0.5]])
    preference_loss(learner(images(), PROMPTS), labels).mean().backward()
    optimizer.step()
    return {name for name, parameter in reward.model.named_parameters() if not torch.equal(parameter, before[name])}


def starts(names: set[str], *prefixes: str) -> set[str]:
    return {name for name in names if name.startswith(prefixes)}


def test_everything_moves(reward: CLIPReward) -> None:
    names = {name for name, _ in reward.model.named_parameters()}
    still = names - moved(reward, EVERYTHING)
    assert all(name.endswith("k_proj.bias") for name in still), "a key bias cannot matter: softmax takes it out"


def test_frozen_text_and_no_scale(reward: CLIPReward) -> None:
    names = moved(reward, trained(projections=False, logit_scale=False))
    assert names
    assert names == starts(names, "vision_model.")


def test_the_last_layer_of_each_tower(reward: CLIPReward) -> None:
    names = moved(reward, trained(1, 1))
    assert {"logit_scale", "visual_projection.weight", "text_projection.weight"} <= names
    rest = names - starts(names, "logit_scale", "visual_projection", "text_projection")
    allowed = ("vision_model.encoder.layers.1.", "vision_model.post_layernorm.", "text_model.encoder.layers.1.")
    assert rest == starts(rest, *allowed, "text_model.final_layer_norm.")
    for prefix in allowed:
        assert starts(rest, prefix)


def test_projections_alone(reward: CLIPReward) -> None:
    assert moved(reward, trained(0, 0, logit_scale=False)) == {"visual_projection.weight", "text_projection.weight"}


def test_impossible_choices(reward: CLIPReward) -> None:
    with pytest.raises(ConfigurationError, match="nothing to train"):
        choose_trained_parts(reward.model, trained(0, 0, projections=False, logit_scale=False))
    with pytest.raises(ConfigurationError, match=r"model.text.trainable_layers = 3: the text tower has 2 layers"):
        choose_trained_parts(reward.model, trained(text=3))


def test_activation_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        learner = module(
            load_nemo_clip(toy_nemo(tmp_path / "a.nemo")), EVERYTHING, activation_checkpointing=checkpointing
        )
        learner.train()
        preference_loss(learner(images(), PROMPTS), torch.tensor([[1.0, 0.0]] * 4)).mean().backward()
        gradients.append([p.grad for p in learner.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None
        assert torch.allclose(plain, recomputed, rtol=1e-4, atol=1e-7)


def test_the_scale_is_kept_below_a_hundred(tmp_path: Path, reward: CLIPReward) -> None:
    import pytorch_lightning as pl

    with torch.no_grad():
        reward.model.logit_scale.fill_(4.6)
    learner = PreferenceCLIP(
        reward, trained(0, 0, projections=False), lambda named: (torch.optim.SGD([p for _, p in named], 1e3), None)
    )
    data = PreferenceDataset(
        str(blue_shards(tmp_path / "s", 16)), prepare=Preprocessing(32).square, micro_batch_size=4, epochs=1
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(learner, torch.utils.data.DataLoader(data, batch_size=None))
    assert float(reward.model.logit_scale) <= MAX_LOGIT_SCALE
    assert float(reward.model.logit_scale) != pytest.approx(4.6)


def test_out_and_in_again(tmp_path: Path, reward: CLIPReward) -> None:
    with torch.no_grad():
        for parameter in reward.model.parameters():
            parameter.add_(0.01)
    reward.text_rows.clear()
    reward.name = "mine"
    path = save_clip_reward(reward, tmp_path / "out" / "mine.nemo", extra={"trained_steps": 3})
    back = restore_reward(path)
    assert back.name == "mine"
    pictures = images().flatten(0, 1)
    prompts = [prompt for prompt in PROMPTS for _ in (0, 1)]
    assert torch.equal(back(pictures, prompts), reward(pictures, prompts))
    half = restore_reward(save_clip_reward(reward, tmp_path / "half.nemo", dtype=torch.float16))
    assert torch.allclose(half(pictures, prompts), reward(pictures, prompts), rtol=2e-2, atol=2e-2)
    assert (tmp_path / "half.nemo").stat().st_size < 0.7 * path.stat().st_size


def test_tokenizer_files_come_back() -> None:
    given = toy_tokenizer_files()
    tokenizer = tokenizer_from_bytes(given["vocab.json"], given["merges.txt"], "test")
    files = tokenizer_files(tokenizer)
    again = tokenizer_from_bytes(files["vocab.json"], files["merges.txt"], "test")
    for prompt in (*PROMPTS, "Ünïcode 猫", "red  apple!"):
        assert again(prompt).input_ids == tokenizer(prompt).input_ids
    assert tokenizer_files(again) == files


def test_a_reward_comes_back_as_it_was_and_is_trained_as_it_scores(tmp_path: Path) -> None:
    """HPSv2's archives pad their pictures; CLIPScore's prefix their prompts."""
    from tiny.reward_training import blue_pairs

    from nemo_aligner_diffusion.data.preferences.shards import write_preference_shards
    from nemo_aligner_diffusion.reward_training.evaluate import score_pairs

    prepared = Preprocessing(32, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), "bilinear", "pad")
    start = convert_hf_clip_to_nemo(
        toy_clip(), toy_tokenizer_files(), tmp_path / "start.nemo", preprocessing=prepared, prompt_prefix="a photo of "
    )
    pairs = blue_pairs(2, size=(48, 80))
    write_preference_shards(pairs, tmp_path / "s")
    frozen: Any = restore_reward(start)
    expected = torch.stack([frozen(torch.stack(pictures(pair)), [pair.prompt] * 2) for pair in pairs])
    plain = restore_reward(convert_hf_clip_to_nemo(toy_clip(), toy_tokenizer_files(), tmp_path / "plain.nemo"))
    other = torch.stack([plain(torch.stack(pictures(pair)), [pair.prompt] * 2) for pair in pairs])
    assert (expected - other).abs().max() > 1e-2, "the toy must notice both"
    loaded = load_nemo_clip(start)
    data = PreferenceDataset(
        str(tmp_path / "s"), prepare=loaded.preprocessing.square, micro_batch_size=2, shuffle_buffer=0
    )
    batch = next(iter(data))
    torch.testing.assert_close(score_pairs(loaded, str(tmp_path / "s"))[0], expected, rtol=1e-5, atol=1e-5)
    for parts in (EVERYTHING, trained(0, 0, projections=False)):  # text trained, and frozen
        mine = module(load_nemo_clip(start), parts)(batch["images"], batch["prompts"])
        torch.testing.assert_close(mine.detach(), expected, rtol=1e-5, atol=1e-5)
    again: Any = restore_reward(save_clip_reward(loaded, tmp_path / "again.nemo"))
    assert (again.preprocessing, again.prompt_prefix) == (prepared, "a photo of ")
    assert torch.equal(again(torch.stack(pictures(pairs[0])), [pairs[0].prompt] * 2), expected[0])


def test_from_a_hugging_face_folder(tmp_path: Path, reward: CLIPReward) -> None:
    folder = tmp_path / "clip"
    toy_clip().save_pretrained(folder)
    for name, content in toy_tokenizer_files().items():
        (folder / name).write_bytes(content)
    (folder / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "resample": 2, "size": 32, "crop_size": 32}'
    )
    loaded = load_hugging_face_clip(folder)
    prepared = Preprocessing(32, (0.5,) * 3, (0.25,) * 3, "bilinear", "crop_down")
    assert loaded.preprocessing == prepared
    expected = CLIPReward(toy_clip(), reward.tokenizer, preprocessing=prepared)
    pictures = torch.rand(4, 3, 50, 40)
    assert torch.allclose(loaded(pictures, PROMPTS), expected(pictures, PROMPTS), rtol=1e-5)
    with pytest.raises(CheckpointError, match=r"from_pretrained.*expected config\.json"):
        load_hugging_face_clip(tmp_path)
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"clip'?: a CLIP cannot be had from it: .*header"):
        load_hugging_face_clip(folder)
