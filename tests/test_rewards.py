"""The reward protocol, the analytic rewards, preprocessing, and building rewards from a configuration."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny.pictures import fractal, photograph
from torch import Tensor

from nemo_aligner_diffusion import embedded_assets
from nemo_aligner_diffusion.errors import AlignerError, ConfigurationError, RewardError
from nemo_aligner_diffusion.rewards import (
    Composite,
    Compressibility,
    Incompressibility,
    Part,
    Preprocessing,
    Symmetry,
    build_reward,
    convert_hf_clip_to_nemo,
)
from nemo_aligner_diffusion.rewards.jpeg import CHROMINANCE, LUMINANCE, jpeg, quantisation_steps
from nemo_aligner_diffusion.rewards.settings import RewardSettings
from nemo_aligner_diffusion.rewards.support.preprocessing import centre_crop, resize_short_side


def smooth_pictures(count: int, height: int, width: int, detail: float = 3.0, seed: int = 0) -> Tensor:
    """Sums of a few waves, ``(count, 3, height, width)`` within ``[0.2, 0.8]``."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.linspace(0, 1, height).view(-1, 1), torch.linspace(0, 1, width).view(1, -1)
    pictures = torch.zeros(count, 3, height, width)
    for _ in range(5):
        frequency = torch.rand(count, 1, 1, 1, 2, generator=generator) * detail * 2 * torch.pi
        phase = torch.rand(count, 3, 1, 1, generator=generator) * 2 * torch.pi
        pictures += torch.sin(frequency[..., 0] * rows + frequency[..., 1] * columns + phase)
    return 0.5 + 0.06 * pictures


def to_pil(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy())


def from_pil(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255


def test_symmetry_values() -> None:
    half = smooth_pictures(1, 8, 8)
    mirrored = torch.cat([half, half.flip(-1)], dim=-1)
    left_white = torch.zeros(1, 3, 4, 4)
    left_white[..., :2] = 1
    ramp = torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(1, 3, 4, 4)
    reward = Symmetry().build()
    assert reward(mirrored, [""]).item() == 0
    assert reward(left_white, [""]).item() == -1
    assert reward(ramp, [""]).item() == -0.5
    pictures = smooth_pictures(2, 9, 7).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reward(x, ["", ""]), pictures)


@pytest.mark.parametrize(
    ("height", "width"), [(512, 512), (512, 300), (300, 512), (200, 500), (380, 200), (224, 224), (100, 140), (64, 64)]
)
def test_resize_matches_pillow_on_natural_pictures(height: int, width: int) -> None:
    """A photograph and 1/f noise, made smaller and larger; worst pixel of all, edges and overshoot included."""
    for picture in (photograph(height, width), fractal(height, width, seed=height + width)):
        pixels = from_pil(to_pil(picture))
        for size in (32, 64, 224, 336):
            ours = resize_short_side(pixels.unsqueeze(0), size)[0]
            theirs = from_pil(to_pil(picture).resize((ours.shape[2], ours.shape[1]), Image.Resampling.BICUBIC))
            assert (ours - theirs).abs().max() < 1e-2
            assert ours.amin() >= 0
            assert ours.amax() <= 1


def bicubic_matrix(length: int, target: int) -> Tensor:
    """Weights ``(target, length)`` of the antialiased bicubic filter (a = −1/2), float64, by its formula."""
    scale = max(length / target, 1)
    centres = (torch.arange(target, dtype=torch.float64) + 0.5) * length / target
    distance = ((torch.arange(length, dtype=torch.float64) + 0.5 - centres[:, None]) / scale).abs()
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0))
    return weights / weights.sum(1, keepdim=True)


@pytest.mark.parametrize(("height", "width"), [(90, 120), (120, 75)])
def test_a_pad_that_keeps_overshoot_is_the_filter_itself(height: int, width: int) -> None:
    """HPSv2's own transform resizes the float tensor; the default cuts as Pillow does."""
    picture = photograph(height, width)[None].double()
    picture[..., 20:60, 30:50] = 1  # hard edges
    picture[..., 20:60, 50:70] = 0
    scale = 32 / max(height, width)
    target = round(height * scale), round(width * scale)
    exact = bicubic_matrix(height, target[0]) @ picture @ bicubic_matrix(width, target[1]).T
    top, left = (32 - target[0]) // 2, (32 - target[1]) // 2
    uncut = Preprocessing(32, resize="pad_uncut").square(picture)[..., top:, left:][..., : target[0], : target[1]]
    torch.testing.assert_close(uncut, exact, rtol=0, atol=1e-6)
    cut = Preprocessing(32, resize="pad").square(picture)
    assert exact.amax() > 1.02
    assert (cut.amin(), cut.amax()) == (0, 1)


@pytest.mark.parametrize("reward", [Symmetry(), Compressibility(), Incompressibility(quality=80, reduction="mean")])
def test_rewards_without_a_network_compute_in_their_own_precision(reward: RewardSettings) -> None:
    pictures, built = smooth_pictures(2, 32, 40), reward.build()

    def scored(dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        given = pictures.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            score = built(given, ["", ""])
        return score.detach(), torch.autograd.grad(score.sum(), given)[0]

    exact = built(pictures.double(), ["", ""])
    for got, expected in zip(scored(torch.bfloat16), scored(None), strict=True):
        assert torch.equal(got, expected), "the training loop's autocast has no say"
    torch.testing.assert_close(scored(torch.bfloat16)[0].double(), exact, rtol=1e-4, atol=1e-7)
    assert exact.dtype == torch.float64


def test_resize_keeps_what_lies_outside_and_each_picture_to_itself() -> None:
    pixels = from_pil(to_pil(photograph(96, 120))).unsqueeze(0)
    wide = torch.cat([pixels, 3 * pixels - 1])
    together = resize_short_side(wide, 32)
    assert torch.equal(together[:1], resize_short_side(pixels, 32))
    assert together[1].amin() < -0.5
    assert together[1].amax() > 1.5
    assert (together[1] - (3 * together[0] - 1)).abs().mean() < 1e-3


@pytest.mark.parametrize("resize", ["crop", "crop_down", "pad", "pad_uncut", "squash"])
@pytest.mark.parametrize(("height", "width"), [(45, 30), (30, 45), (7, 13), (32, 32)])
def test_ways_to_a_square(resize: str, height: int, width: int) -> None:
    picture = smooth_pictures(1, height, width)
    square = Preprocessing(20, mean=(0, 0, 0), std=(1, 1, 1), resize=resize)(picture)
    assert square.shape == (1, 3, 20, 20)
    black = (square.abs().amax(dim=1)[0] == 0).sum().item()
    if resize.startswith("pad") and height != width:  # HPSv2: the long side fills the square, the short one is rounded
        short = round(20 * min(height, width) / max(height, width))
        assert black == 20 * (20 - short)
        before = (20 - short) // 2
        inside = (
            square[0, 0, before : before + short, :] if height < width else square[0, 0, :, before : before + short]
        )
        assert inside.amin() > 0
    else:
        assert black == 0


def test_centre_crop_and_statistics() -> None:
    picture = torch.arange(7 * 4).reshape(1, 1, 4, 7).expand(1, 3, 4, 7).double()
    assert torch.equal(centre_crop(picture, (4, 4)), picture[..., 2:6])  # 1.5 rounds to the even 2 …
    assert torch.equal(centre_crop(picture, (4, 4), down=True), picture[..., 1:5])
    grey = Preprocessing(8, mean=(0.5, 0.25, 0.0), std=(1.0, 0.5, 0.25))(torch.full((1, 3, 10, 12), 0.5))
    assert torch.allclose(grey[0, :, 3, 3], torch.tensor([0.0, 0.5, 2.0]), atol=1e-5)
    assert Preprocessing(8)(torch.zeros(1, 3, 8, 8, dtype=torch.float16)).dtype == torch.float32


@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
@pytest.mark.parametrize(("height", "width"), [(12, 9), (5, 8), (6, 6)])
def test_preprocessing_gradient(height: int, width: int, resize: str) -> None:
    pictures = torch.rand(1, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    pictures = pictures.requires_grad_()
    assert torch.autograd.gradcheck(Preprocessing(6, resize=resize), pictures)


@pytest.mark.parametrize("subsampling", [False, True])
def test_jpeg_gradient_of_odd_sizes(subsampling: bool) -> None:
    torch.manual_seed(0)
    pictures = torch.rand(1, 3, 5, 11, dtype=torch.float64, requires_grad=True)
    reward = Compressibility(quality=70, chroma_subsampling=subsampling).build()
    assert torch.autograd.gradcheck(lambda x: reward(x, [""]), pictures)


@pytest.mark.parametrize("subsampling", [False, True])
@pytest.mark.parametrize("quality", [30, 90])
def test_jpeg_is_pillows(quality: int, subsampling: bool) -> None:
    picture = smooth_pictures(1, 48, 56, detail=5)[0]
    stream = io.BytesIO()
    to_pil(picture).save(stream, "JPEG", quality=quality, subsampling=2 if subsampling else 0)
    decoded = Image.open(stream)
    for number, table in enumerate((LUMINANCE, CHROMINANCE)):
        assert decoded.quantization[number] == [step for row in quantisation_steps(table, quality) for step in row]
    ours = jpeg(from_pil(to_pil(picture)).unsqueeze(0), quality, subsampling, exact_rounding=True)[0]
    theirs = from_pil(decoded)
    # Pillow rounds to whole numbers between the stages: a coefficient near a half may fall to the other side.
    assert (ours - theirs).abs().mean() < 1.5 / 255


def test_following_the_compressibility_gradient_shrinks_the_file() -> None:
    torch.manual_seed(0)
    picture = (smooth_pictures(1, 64, 64, detail=3) + 0.03 * torch.randn(1, 3, 64, 64)).clamp(0, 1)

    def file_size(image: Tensor) -> int:
        stream = io.BytesIO()
        to_pil(image[0].clamp(0, 1)).save(stream, "JPEG", quality=80)
        return stream.tell()

    reward, moved = Compressibility().build(), picture.clone()
    for _ in range(40):
        moved.requires_grad_()
        (gradient,) = torch.autograd.grad(reward(moved, [""]).sum(), moved)
        moved = (moved + 0.003 * gradient.sign()).detach()
    assert reward(moved, [""]) > 0.5 * reward(picture, [""])
    assert file_size(moved) < 0.9 * file_size(picture)  # 600 bytes of either are header


def test_composite_weighs_and_reports_its_parts() -> None:
    pictures = smooth_pictures(2, 16, 16)
    parts = {"mirror": Part(Symmetry(), 2.0), "small": Part(Compressibility().build(), -0.5)}
    reward = Composite(members=parts).build()
    total, components = reward.scores(pictures, ["a", "b"])
    assert list(components) == ["mirror", "small"]
    assert torch.equal(components["mirror"], Symmetry().build()(pictures, ["a", "b"]))
    assert torch.allclose(total, 2 * components["mirror"] - 0.5 * components["small"])
    assert torch.equal(reward(pictures, ["a", "b"]), total)


def test_non_finite_pictures_give_non_finite_rewards() -> None:
    pictures = smooth_pictures(2, 16, 16)
    pictures[1, 0, 3, 3] = float("nan")
    for reward in (
        Symmetry().build(),
        Compressibility().build(),
        Composite(members={"s": Part(Symmetry(), 0.0)}).build(),
    ):
        assert torch.isfinite(reward(pictures, ["", ""])).tolist() == [True, False]


@pytest.mark.parametrize(
    ("images", "prompts"),
    [
        (torch.rand(3, 8, 8), ["a"]),
        (torch.rand(1, 4, 8, 8), ["a"]),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["a"]),
        (torch.rand(2, 3, 8, 8), ["a"]),
        (torch.rand(1, 3, 8, 8), "a"),
    ],
)
def test_wrong_calls_are_named(images: Tensor, prompts: list[str]) -> None:
    with pytest.raises(RewardError, match="needs"):
        Symmetry().build()(images, prompts)


def test_rewards_stay_in_evaluation_mode() -> None:
    reward = Composite(members={"mirror": Part(Symmetry())}).build()
    reward.train()
    assert not any(module.training for module in reward.modules())


def test_build_from_configuration(tmp_path: Path) -> None:
    from omegaconf import OmegaConf
    from tiny.clip import tokenizer_files, toy_clip

    path = convert_hf_clip_to_nemo(toy_clip(), tokenizer_files(), tmp_path / "clip.nemo")
    clip = build_reward({"name": "clip", "model": {"restore_from_path": str(path)}, "trainer": {"precision": "bf16"}})
    assert next(clip.parameters()).dtype == torch.bfloat16
    section = OmegaConf.create(
        {
            "name": "composite",
            "model": None,
            "parts": {
                "fit": {"weight": 0.5, "name": "clip", "model": {"restore_from_path": str(path)}},
                "symmetry": {"weight": 3},
                "small": {"name": "compressibility", "quality": 40, "reduction": "mean"},
            },
        }
    )
    pictures = smooth_pictures(2, 32, 32)
    total, parts = build_reward(section).scores(pictures, ["a cat", "red"])
    assert torch.allclose(total, 0.5 * parts["fit"] + 3 * parts["symmetry"] + parts["small"])
    expected = Compressibility(quality=40, reduction="mean").build()(pictures, ["", ""])
    assert torch.equal(parts["small"], expected)
    incompressible = build_reward({"name": "incompressibility", "quality": 40, "reduction": "mean", "parts": None})
    assert torch.equal(incompressible(pictures, ["", ""]), -expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "simmetry"}, "did you mean symmetry"),
        ({"nmae": "clip"}, "did you mean name"),
        ({"name": "clip", "model": {"restore_from": "x"}}, "restore_from_path"),
        ({"name": "clip", "model": {"micro_batch_size": 0}}, ">= 1"),
        ({"name": "clip", "model": "x.nemo"}, "section"),
        ({"name": "symmetry", "trainer": {"precision": "fp23"}}, "precision"),
        ({"name": "composite"}, "rm.parts"),
        ({"name": "composite", "parts": {"symmetry": {"weight": "much"}}}, "rm.parts.symmetry.weight"),
        ({"name": "composite", "parts": {"mirror": {"weight": 1}}}, "rm.parts.mirror.name = 'mirror': expected one of"),
    ],
)
def test_configuration_errors(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build_reward(config)


def test_the_kinds_of_compressibility_agree() -> None:
    batch, prompts = smooth_pictures(3, 64, 64), [""] * 3
    score = Compressibility(quality=80).build()(batch, prompts)
    assert torch.equal(Incompressibility(quality=80).build()(batch, prompts), -score)
    mean = Compressibility(quality=80, reduction="mean").build()(batch, prompts)
    assert torch.allclose(mean * 3 * 64 * 64, score, rtol=1e-4)


@pytest.mark.parametrize(
    "settings", [{"quality": 0}, {"quality": 101}, {"quality": 50.5}, {"reduction": "max"}], ids=str
)
def test_impossible_jpeg_settings(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        build_reward({"name": "compressibility", **settings})
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        Compressibility(**settings)


def test_a_key_without_effect_is_named(caplog: pytest.LogCaptureFixture) -> None:
    build_reward({"name": "symmetry", "model": {"restore_from_path": None}, "parts": {}, "chroma_subsampling": None})
    assert caplog.text == ""
    build_reward({"name": "symmetry", "quality": 30, "chroma_subsampling": False})
    assert "rm.quality has no effect" in caplog.text
    assert "rm.chroma_subsampling has no effect" in caplog.text


def test_embedded_assets_are_named_where_they_are_missing() -> None:
    with pytest.raises(AlignerError, match=r"prompts_validate\.txt is missing.*Reinstall"):
        embedded_assets.embedded_prompts_path("validate")
