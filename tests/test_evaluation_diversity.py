"""Diversity and recognisability against their definitions written out, and with a real CLIP."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from tiny.clip import tokenizer_files, toy_clip
from torch import Tensor
from torch.nn import functional

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.evaluation.diversity import (
    diversity,
    diversity_ratio,
    embed_images,
    mean_pairwise_distance,
    recognisability,
)
from nemo_aligner_diffusion.evaluation.request import annealed_weights


class Plain:
    """An embedding one can compute by hand: pictures are their mean colour, texts name a colour."""

    COLOURS: ClassVar = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}

    def embed_images(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))

    def embed_texts(self, prompts: list[str]) -> Tensor:
        return torch.tensor([self.COLOURS[prompt] for prompt in prompts])


def flat(*colours: tuple[float, float, float]) -> Tensor:
    return torch.tensor(colours)[:, :, None, None].expand(-1, -1, 8, 8)


def test_pairwise_distance_is_its_definition() -> None:
    torch.manual_seed(0)
    points = functional.normalize(torch.randn(7, 5, dtype=torch.float64), dim=-1)
    pairs = [1 - float(points[i] @ points[j]) for i in range(7) for j in range(i)]
    assert mean_pairwise_distance(points * 3) == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)
    assert mean_pairwise_distance(points[:1].expand(4, -1)) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="two pictures, got 1"):
        mean_pairwise_distance(points[:1])


def test_diversity_compares_seeds_of_one_prompt_only() -> None:
    red, green, blue = Plain.COLOURS.values()
    prompts = ["a", "b", "a", "b", "once"]
    images = flat(red, blue, green, green, red)
    assert diversity(embed_images(Plain(), images), prompts) == pytest.approx(1.0)  # orthogonal colours
    same = flat(red, blue, red, blue, red)
    assert diversity(embed_images(Plain(), same), prompts) == pytest.approx(0.0, abs=1e-6)
    half = flat(red, blue, red, green, red)
    assert diversity_ratio(Plain(), images, half, prompts) == pytest.approx(0.5, abs=1e-6)
    assert math.isnan(diversity_ratio(Plain(), same, images, prompts))
    with pytest.raises(ValueError, match="at least two pictures"):
        diversity(embed_images(Plain(), images[:2]), ["a", "b"])


def test_a_video_is_the_mean_of_its_frames() -> None:
    red, green = flat((1.0, 0.0, 0.0)), flat((0.0, 1.0, 0.0))
    videos = torch.cat([torch.stack([red, green], 1), torch.stack([red, red], 1)])
    assert diversity(embed_images(Plain(), videos), ["red", "red"]) == pytest.approx(1 - math.sqrt(0.5))


def test_recognisability_ranks_the_own_prompt() -> None:
    images = flat((1.0, 0.1, 0.0), (0.6, 0.5, 0.4), (0.0, 0.2, 0.9))
    result = recognisability(Plain(), images, ["red", "blue", "blue"], ["red", "green", "blue", "green"])
    assert result.ranks == [1, 3, 1]
    assert result.top1 == pytest.approx(2 / 3)
    assert result.mean_reciprocal_rank == pytest.approx((1 + 1 / 3 + 1) / 3)
    assert recognisability(Plain(), images[:1], ["red"]).ranks == [1]
    with pytest.raises(ValueError, match="0 pictures"):
        recognisability(Plain(), images[:0], [])


def test_a_clip_reward_is_an_embedder() -> None:
    from nemo_aligner_diffusion.rewards.clip.reward import CLIPReward
    from nemo_aligner_diffusion.rewards.clip.tokenizer import tokenizer_from_bytes

    files = tokenizer_files()
    reward = CLIPReward(toy_clip(), tokenizer_from_bytes(files["vocab.json"], files["merges.txt"], "the test"))
    torch.manual_seed(0)
    images = torch.rand(4, 3, 40, 40)
    unit = reward.embed_images(images).double()
    spread = diversity(embed_images(reward, images[:2]), ["red", "red"])
    assert spread == pytest.approx(1 - float(unit[0] @ unit[1]), abs=1e-6)
    scores = reward.score_matrix(images, ["red", "cat", "apple"])
    own = [0, 0, 1, 1]
    expected = [1 + int((row > row[index]).sum()) for row, index in zip(scores, own, strict=True)]
    assert recognisability(reward, images, ["red", "red", "cat", "cat"], ["apple"]).ranks == expected


def test_annealed_weights() -> None:
    assert annealed_weights("base", 3) == [0, 0, 0]
    assert annealed_weights("draft", 3) == [1, 1, 1]
    assert annealed_weights("linear", 4) == [0, 0.25, 0.5, 0.75]
    assert annealed_weights("power_2", 4) == [0, 1 / 16, 1 / 4, 9 / 16]
    assert annealed_weights("power_0.5", 4)[1] == 0.5
    assert annealed_weights("-0.5", 2) == [-0.5, -0.5]
    for wrong in ("cubic", "power_", "power_-1", "nan", ""):
        with pytest.raises(ConfigurationError, match="linear, power_P"):
            annealed_weights(wrong, 4)
