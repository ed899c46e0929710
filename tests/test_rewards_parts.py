"""Composites with normalised and clipped parts, ensembles, and augmentation keyed by sample."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nemo_aligner_diffusion.errors import AlignerError, CheckpointError, RewardError
from nemo_aligner_diffusion.rewards import Composite, Compressibility, Ensemble, Part, Shaping, Symmetry, build_reward
from nemo_aligner_diffusion.rewards.augmentation import Augmentation
from nemo_aligner_diffusion.rewards.base import FunctionReward, Reward
from nemo_aligner_diffusion.rewards.support.augmented import AugmentedReward, SampleKeys, scoring_samples
from nemo_aligner_diffusion.rewards.support.parted import (
    STATISTICS_FILE,
    apply_statistics,
    known_statistics,
    parted_rewards,
    read_statistics,
    statistics_of,
)


class Brightness(Reward):
    """A reward whose value and gradient are known: ``slope`` times the mean of the values."""

    name = "brightness"

    def __init__(self, slope: float = 1.0) -> None:
        super().__init__()
        self.slope = slope
        self.freeze()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.slope * images.mean(dim=(1, 2, 3))


def grey(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone().requires_grad_()


def slopes(reward: Reward, images: Tensor) -> list[float]:
    (gradient,) = torch.autograd.grad(reward(images, [""] * len(images)).sum(), images)
    return (gradient.sum(dim=(1, 2, 3))).tolist()


# Shaping


def test_parts_are_normalised_then_clipped_and_logged_raw() -> None:
    shaping = Shaping(normalize=(0.5, 0.25), clip=(-1.0, 1.0))
    reward = Composite(members={"a": Part(Brightness(), 2.0, shaping), "b": Part(Brightness(10))}).build()
    images = grey(0.0, 0.5, 0.6, 1.0)
    total, components = reward.scores(images, [""] * 4)
    assert components["a"].tolist() == pytest.approx([0, 0.5, 0.6, 1])
    assert components["b"].tolist() == pytest.approx([0, 5, 6, 10])
    assert total.tolist() == pytest.approx([2 * -1 + 0, 0 + 5, 2 * 0.4 + 6, 2 * 1 + 10])
    assert slopes(reward, images) == pytest.approx([10, 10 + 2 / 0.25, 10 + 2 / 0.25, 10]), "no gradient beyond a bound"


def test_a_smooth_clip_fades_out() -> None:
    shaping = Shaping(clip=(0.0, 1.0), clip_mode="smooth")
    reward = Composite(members={"a": Part(Brightness(), shaping=shaping)}).build()
    images = grey(-3.0, 0.0, 0.5, 1.0, 4.0)
    values, gradient = reward(images, [""] * 5).tolist(), slopes(reward, images)
    assert values == pytest.approx([0, 0.119, 0.5, 0.881, 1], abs=2e-3)
    assert gradient[2] == pytest.approx(1)
    assert gradient[3] == pytest.approx(0.42, abs=1e-2)
    assert 0 < gradient[4] < 1e-3


def test_one_sided_bounds_and_nan() -> None:
    reward = Composite(members={"a": Part(Brightness(), shaping=Shaping(clip=(None, 0.5)))}).build()
    assert reward(grey(-9.0, 0.7), ["", ""]).tolist() == pytest.approx([-9, 0.5])
    assert reward(grey(float("nan")), [""]).isnan().all()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"normalize": "bse"}, "rm.parts.symmetry.normalize = 'bse': expected {mean: …, std: …}, or base"),
        ({"normalize": {"mean": 1}}, "expected mean and std, or base"),
        ({"normalize": {"mean": 1, "std": 0}}, "normalize.std = 0: expected a number > 0"),
        ({"normalize": {"mean": 1, "sd": 2}}, "did you mean std"),
        ({"clip": [2, 1]}, "rm.parts.symmetry.clip = .*low < high"),
        ({"clip": [1]}, r"expected \[low, high\]"),
        ({"clip": ["a", 1]}, "symmetry.clip = 'a': expected a number"),
        ({"clip": [0, None], "clip_mode": "smooth"}, "needs both bounds"),
        ({"clip_mode": "soft"}, "expected one of hard, smooth"),
        ({"normalise": 1}, "did you mean normalize"),
        ({"augment": {"noise_std": -1}}, "rm.parts.symmetry.augment.noise_std = -1"),
        ({"augment": {"noise": 1}}, "did you mean augment.noise_std"),
    ],
)
def test_shapes_that_cannot_be(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(AlignerError, match=expected):
        build_reward({"name": "composite", "parts": {"symmetry": settings}})


def test_base_statistics_inner_parts_first_and_back_again() -> None:
    section = {
        "name": "composite",
        "parts": {
            "both": {
                "normalize": "base",
                "name": "composite",
                "parts": {"symmetry": {"normalize": "base"}, "compressibility": {"weight": 0.1}},
            },
            "plain": {"name": "symmetry", "normalize": {"mean": 0, "std": 2}},
        },
    }
    reward = build_reward(section)
    images, prompts = torch.rand(5, 3, 16, 16), [""] * 5
    with pytest.raises(RewardError, match=r"rm\.parts\.both\.parts\.symmetry\.normalize is base: .* not known here"):
        reward(images, prompts)
    places = []
    for parted in parted_rewards(reward):
        for part in parted.unmeasured():
            places.append(parted.place(part))
            parted.statistics[part] = statistics_of(parted.place(part), parted.part(part)(images, prompts))
    assert places == ["rm.parts.both.parts.symmetry", "rm.parts.both"]
    symmetry, size = Symmetry().build()(images, prompts), Compressibility().build()(images, prompts)
    inner = (symmetry - symmetry.mean()) / symmetry.std(correction=0) + 0.1 * size
    expected = (inner - inner.mean()) / inner.std(correction=0) + symmetry / 2
    torch.testing.assert_close(reward(images, prompts), expected, rtol=1e-4, atol=1e-5)
    again = build_reward(section)
    apply_statistics(again, known_statistics(reward))
    assert torch.equal(again(images, prompts), reward(images, prompts))
    assert set(known_statistics(again)) == set(places), "fixed numbers are the configuration's own"


def test_figures_of_another_reward_are_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    def section(**changed: Any) -> dict[str, Any]:
        return {"name": "composite", "parts": {"size": {"name": "compressibility", "normalize": "base", **changed}}}

    first = build_reward(section())
    (parted,) = parted_rewards(first)
    parted.statistics["size"] = (-3.0, 2.0)
    figures = known_statistics(first)
    for changed, taken in (
        ({}, True),
        ({"weight": 3.0, "augment": {"noise_std": 0.1}}, True),
        ({"quality": 80}, False),
        ({"name": "incompressibility"}, False),
    ):
        again = build_reward(section(**changed))
        caplog.clear()
        apply_statistics(again, figures)
        assert bool(known_statistics(again)) == taken
        assert ("rm.parts.size: its scale was measured of a reward with other settings" in caplog.text) == (not taken)
    older = build_reward(section(quality=80))
    apply_statistics(older, {"rm.parts.size": {"mean": -3.0, "std": 2.0}})
    assert known_statistics(older)["rm.parts.size"]["mean"] == -3, "a file of before it was recorded is believed"


def test_statistics_of_nothing_and_of_damage(tmp_path: Any) -> None:
    for scores in (torch.tensor([1.0]), torch.tensor([2.0, 2.0]), torch.tensor([1.0, float("nan")])):
        with pytest.raises(RewardError, match=r"rm\.parts\.a\.normalize is base, but the . scores"):
            statistics_of("rm.parts.a", scores)
    assert read_statistics(tmp_path) == {}
    for text in ("{", "[1]", '{"a": {"mean": 1}}', '{"a": 3}'):
        (tmp_path / STATISTICS_FILE).write_text(text)
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_statistics(tmp_path)


def test_a_run_is_judged_on_the_scale_it_was_trained_on(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from nemo_aligner_diffusion.cli.generate import read_request
    from nemo_aligner_diffusion.evaluation import generation
    from nemo_aligner_diffusion.evaluation.run_files import RunFiles

    section = {"name": "composite", "parts": {"symmetry": {"normalize": "base"}}}
    run = RunFiles(tmp_path, {"rm": section})
    request = read_request(["--prompt", "a"])
    (tmp_path / STATISTICS_FILE).write_text('{"rm.parts.symmetry": {"mean": -0.25, "std": 0.5}}', encoding="utf-8")
    reward = generation._reward(request, run, torch.device("cpu"))
    assert reward is not None
    images = torch.rand(2, 3, 8, 8)
    expected = (Symmetry().build()(images, ["", ""]) + 0.25) / 0.5
    torch.testing.assert_close(reward(images, ["", ""]), expected)
    (tmp_path / STATISTICS_FILE).write_text("{", encoding="utf-8")
    assert generation._reward(request, run, torch.device("cpu")) is None
    assert "cannot be read" in capsys.readouterr().err
    (tmp_path / STATISTICS_FILE).unlink()
    assert generation._reward(request, run, torch.device("cpu")) is None
    assert "not known here" in capsys.readouterr().err


# Ensembles


def test_ensembles_trust_agreement() -> None:
    judges = {"one": Part(Brightness(1)), "two": Part(Brightness(3))}
    images = grey(0.5, -0.5, 0.0)
    for aggregate, values, gradient in (
        ("mean", [1.0, -1.0, 0.0], [2, 2, 2]),
        ("min", [0.5, -1.5, 0.0], [1, 3, 2]),
        ("mean_minus_std", [1 - 0.5 * 0.5, -1 - 0.5 * 0.5, 0], [1.5, 2.5, 2]),
    ):
        reward = Ensemble(members=judges, aggregate=aggregate, std_weight=0.5).build()
        total, components = reward.scores(images, [""] * 3)
        assert total.tolist() == pytest.approx(values, abs=1e-5)
        assert components["two"].tolist() == pytest.approx([1.5, -1.5, 0])
        assert slopes(reward, images) == pytest.approx(gradient, abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"aggregate": "max"}, "expected one of mean, min"),
        ({"std_weight": -1}, "expected a number >= 0"),
        ({"parts": {"symmetry": {"weight": 2}}}, "count alike"),
        ({"parts": {}}, "needs rm.parts"),
    ],
)
def test_ensembles_that_cannot_be(settings: dict[str, Any], expected: str) -> None:
    section = {"name": "ensemble", "parts": {"symmetry": {}, "compressibility": {}}, **settings}
    with pytest.raises(AlignerError, match=expected):
        build_reward(section)


# Augmentation

EVERYTHING = {
    "crop_scale": 0.5,
    "flip_probability": 0.5,
    "colour_jitter": 0.3,
    "dropout": 0.2,
    "noise_std": 0.1,
    "views": 2,
}


def keyed(*indices: int, step: int = 3, seed: int = 1, draw: int = 0) -> Any:
    return scoring_samples(SampleKeys(seed, step, indices, draw))


def test_augmented_scores_do_not_depend_on_the_layout() -> None:
    images = torch.rand(4, 3, 24, 20)
    reward = build_reward({"name": "compressibility", "augment": EVERYTHING})
    assert isinstance(reward, AugmentedReward)
    with keyed(10, 11, 12, 13):
        together = reward(images, [""] * 4)
    apart = []
    for rows, indices in (([2], (12,)), ([3, 0], (13, 10)), ([1], (11,))):
        with keyed(*indices):
            apart.append((rows, reward(images[rows], [""] * len(rows))))
    for rows, scores in apart:
        torch.testing.assert_close(scores, together[rows])
    plain = Compressibility().build()(images, [""] * 4)
    assert torch.equal(reward(images, [""] * 4), plain), "without keys the pictures are scored as they are"
    for other in (keyed(10, 11, 12, 13, step=4), keyed(10, 11, 12, 13, seed=2), keyed(10, 11, 12, 13, draw=1)):
        with other:
            assert not torch.isclose(reward(images, [""] * 4), together).any()


def test_parts_draw_their_own_numbers_and_know_their_rows() -> None:
    part = {"name": "compressibility", "augment": {"noise_std": 0.2}}
    reward = build_reward({"name": "composite", "parts": {"a": part, "b": part, "c": {"name": "symmetry"}}})
    images = torch.rand(2, 3, 16, 16)
    with keyed(0, 1):
        parts = reward.components(images, ["", ""])
    assert not torch.isclose(parts["a"], parts["b"]).any()
    assert torch.equal(parts["c"], Symmetry().build()(images, ["", ""]))
    with keyed(0, 1, 2), pytest.raises(RewardError, match="given 2 pictures where the training step announced 3"):
        reward(images, ["", ""])


@pytest.mark.parametrize("one", [key for key in EVERYTHING if key != "views"])
def test_each_augmentation_is_differentiable(one: str) -> None:
    augmentation = Augmentation(**{one: EVERYTHING[one]})
    images = torch.rand(2, 3, 9, 7, dtype=torch.float64, requires_grad=True)

    def perturbed(x: Tensor) -> Tensor:
        return augmentation(x, [torch.Generator().manual_seed(seed) for seed in (4, 5)])

    assert perturbed(images).shape == images.shape
    assert not torch.equal(perturbed(images), images)
    assert torch.autograd.gradcheck(perturbed, images)


def test_what_the_augmentations_do() -> None:
    ramp = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)

    def perturbed(images: Tensor, seed: int, **settings: float) -> Tensor:
        return Augmentation(**settings)(images, [torch.Generator().manual_seed(seed)])  # type: ignore[arg-type]

    assert torch.allclose(perturbed(ramp, 0, flip_probability=1.0), ramp.flip(-1), atol=1e-6)
    spans = [float(crop.max() - crop.min()) for crop in (perturbed(ramp, s, crop_scale=0.25) for s in range(40))]
    assert min(spans) > 0.5 - 0.05
    assert min(spans) < 0.65
    assert max(spans) > 0.9
    flat = torch.full((1, 3, 64, 64), 0.5)
    noise = perturbed(flat, 0, noise_std=0.1) - 0.5
    assert noise.std().item() == pytest.approx(0.1, rel=0.05)
    dropped = [(perturbed(ramp, s, dropout=0.3) != ramp).float().mean().item() for s in range(40)]
    assert np.mean(dropped) == pytest.approx(0.3, abs=0.05)
    factors = [(perturbed(flat, s, colour_jitter=0.2) / flat).mean().item() for s in range(40)]
    assert 0.8 <= min(factors) < 0.9 < 1.1 < max(factors) <= 1.2
    unchanged = perturbed(ramp, 0)
    assert torch.equal(unchanged, ramp)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("crop_scale", 0),
        ("crop_scale", 1.5),
        ("flip_probability", 2),
        ("colour_jitter", 1),
        ("dropout", -0.1),
        ("noise_std", -1),
        ("noise_std", float("inf")),
        ("views", 0),
        ("views", 1.5),
        ("noise_std", "much"),
    ],
)
def test_impossible_augmentations(key: str, value: Any) -> None:
    with pytest.raises(AlignerError, match=rf"rm\.augment\.{key}"):
        build_reward({"name": "symmetry", "augment": {key: value}})


def test_neutral_augmentation_costs_nothing() -> None:
    neutral = {"crop_scale": 1.0, "flip_probability": 0, "colour_jitter": 0, "dropout": 0, "noise_std": 0, "views": 4}
    assert isinstance(build_reward({"name": "symmetry", "augment": neutral}), FunctionReward)


# Compressibility against Pillow


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float:
    ranks = [np.argsort(np.argsort(values)).astype(float) for values in (left, right)]
    return float(np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize(("quality", "subsampling"), [(50, True), (65, True), (80, False), (90, False)])
def test_compressibility_ranks_pieces_of_a_photograph_as_pillow_does(quality: int, subsampling: bool) -> None:
    from matplotlib import cbook

    with cbook.get_sample_data("grace_hopper.jpg") as file:
        photograph = np.asarray(Image.open(file).convert("RGB"))
    pieces = [photograph[y : y + 128, x : x + 128] for y in range(0, 473, 64) for x in range(0, 385, 64)]
    sizes = []
    for piece in pieces:
        stream = io.BytesIO()
        Image.fromarray(piece).save(stream, "JPEG", quality=quality)
        sizes.append(-float(stream.tell()))
    batch = torch.from_numpy(np.stack(pieces)).permute(0, 3, 1, 2) / 255
    scores = Compressibility(quality=quality, chroma_subsampling=subsampling).build()(batch, [""] * len(pieces))
    assert rank_correlation(scores.tolist(), sizes) >= 0.9
