"""Classifier, detector and feature-symmetry rewards against transformers' own processors and forward passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny.clip import tokenizer_files, toy_clip
from tiny.reward_networks import LABELS, classifier_folder, detector_folder
from torch import Tensor
from transformers import AutoTokenizer, Owlv2ForObjectDetection, OwlViTForObjectDetection, ViTForImageClassification
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil
from transformers.models.levit.image_processing_pil_levit import LevitImageProcessorPil
from transformers.models.mobilevit.image_processing_pil_mobilevit import MobileViTImageProcessorPil
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil
from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil
from transformers.models.perceiver.image_processing_pil_perceiver import PerceiverImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from nemo_aligner_diffusion.config.load import load_config
from nemo_aligner_diffusion.embedded_assets import embedded_reward_path
from nemo_aligner_diffusion.errors import ConfigurationError, RewardError
from nemo_aligner_diffusion.rewards import (
    Classifier,
    Composite,
    Detection,
    Ensemble,
    FeatureSymmetry,
    build_reward,
    convert_hf_clip_to_nemo,
    restore_reward,
)
from nemo_aligner_diffusion.rewards.base import NetworkReward
from nemo_aligner_diffusion.rewards.classifier import class_index, fixed_views
from nemo_aligner_diffusion.rewards.support.image_processor import ImageProcessor


def pictures(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth pictures with values that eight bits hold exactly, and room for a resize to overshoot."""
    generator = torch.Generator().manual_seed(seed)
    small = 0.2 + 0.6 * torch.rand(count, 3, 5, 5, generator=generator)
    large = torch.nn.functional.interpolate(small, size=(height, width), mode="bicubic", align_corners=True)
    return (large.clamp(0, 1) * 255).round() / 255


def to_pil(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy())


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier_folder(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module", params=["owlvit", "owlv2"])
def owl(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, detector_folder(tmp_path_factory.mktemp(request.param), request.param)


def classifier(folder: Path, target_class: str, **settings: Any) -> NetworkReward:
    reward = Classifier(from_pretrained=str(folder), target_class=target_class, **settings).build()
    assert isinstance(reward, NetworkReward)
    return reward


def detector(folder: Path, query: str | None = None, **settings: Any) -> NetworkReward:
    reward = Detection(from_pretrained=str(folder), query=query, **settings).build()
    assert isinstance(reward, NetworkReward)
    return reward


def box_logits(reward: NetworkReward, images: Tensor, prompts: list[str]) -> Tensor:
    assert isinstance(reward.settings, Detection)
    return reward.settings.box_logits(reward, images, *reward.rows(prompts))


# From the configuration


@pytest.mark.parametrize(
    ("words", "score"),
    [
        (["rm=pickscore"], "pickscore"),
        (["rm=hpsv2"], "hps"),
        (["rm=clipscore"], "clipscore"),
        (["rm=clip"], "pickscore"),
    ],
)
def test_the_groups_of_clip_rewards_score_as_they_say(words: list[str], score: str, tmp_path: Path) -> None:
    path = convert_hf_clip_to_nemo(toy_clip(), tokenizer_files(), tmp_path / "clip.nemo")
    cfg = load_config("draftp_sd", [*words, f"rm.model.restore_from_path={path}"])
    reward: Any = build_reward(cfg.rm)
    assert reward.score_type == score


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["rm=classifier", "rm.model.from_pretrained=VIT", "rm.target_class=tabby cat"], Classifier),
        (["rm.name=classifier", "rm.model.from_pretrained=VIT", "rm.target_class=2", "rm.views=3"], Classifier),
        (["rm=detection", "rm.model.from_pretrained=OWL", "rm.query=a cat", "rm.remove=true"], Detection),
        (["rm.name=detection", "rm.model.from_pretrained=OWL", "rm.trainer.precision=bf16"], Detection),
        (["rm=feature_symmetry", "rm.distance=l2", "rm.model.micro_batch_size=1"], FeatureSymmetry),
        (["rm=ensemble", "rm.parts.second={name:symmetry,normalize:{mean:-0.2,std:0.1}}"], Ensemble),
        (["rm=composite", "rm.parts.owl={name:detection,model:{from_pretrained:OWL}}"], Composite),
    ],
)
def test_what_the_configuration_composes_can_be_built(
    words: list[str], kind: type, vit: Path, owl: tuple[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    words = [word.replace("VIT", str(vit)).replace("OWL", str(owl[1])) for word in words]
    reward: Any = build_reward(load_config("draftp_sd", words).rm)
    assert isinstance(reward.settings, kind)
    assert "no effect" not in caplog.text
    batch = pictures(2, 32, 32).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(batch, ["a cat", "red"]).sum(), batch)
    assert torch.isfinite(gradient).all()
    assert (gradient.flatten(1).abs().sum(1) > 0).all()


# Preprocessing

SIDES = {"height": 24, "width": 24}


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessorPil(size={"height": 24, "width": 20}),
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=SIDES),
        BitImageProcessorPil(size={"shortest_edge": 20}, crop_size=SIDES),  # smaller than the crop: padded
        ConvNextImageProcessorPil(size={"shortest_edge": 24}, crop_pct=0.875),
        ConvNextImageProcessorPil(size={"shortest_edge": 384}),
        EfficientNetImageProcessorPil(size=SIDES, rescale_factor=1 / 127.5, rescale_offset=True),
        EfficientNetImageProcessorPil(size=SIDES, include_top=False),
        LevitImageProcessorPil(size={"shortest_edge": 24}, crop_size=SIDES),
        MobileViTImageProcessorPil(size={"shortest_edge": 28}, crop_size=SIDES),
        OwlViTImageProcessorPil(size=SIDES),
    ],
    ids=lambda processor: type(processor).__name__,
)
@pytest.mark.parametrize(("height", "width"), [(40, 56), (61, 37), (16, 24)])
def test_preprocessing_is_transformers(processor: Any, height: int, width: int) -> None:
    picture = pictures(1, height, width, seed=height)
    ours = ImageProcessor.of(processor, "test")(picture)
    theirs = processor(to_pil(picture[0]), return_tensors="pt").pixel_values
    assert ours.shape == theirs.shape
    scale = theirs.std() / picture.std()
    assert (ours - theirs).abs().max() < 2e-2 * scale


def test_owlv2_preprocessing_is_transformers() -> None:
    """Its processor needs scipy: these are the red values, times 255, that it gave (transformers 5.23, scipy 1.17)."""
    theirs = [
        [35.93, 122.93, 168.07, 2.61],
        [42.98, 129.99, 173.86, 2.69],
        [50.48, 137.49, 180.01, 2.77],
        [57.54, 144.54, 185.80, 2.86],
    ]
    processor = Owlv2ImageProcessorPil(size={"height": 4, "width": 4}, do_normalize=False)
    height, width = 10, 7
    values = np.arange(height * width).reshape(height, width) * 37 % 256
    picture = torch.from_numpy(values).expand(1, 3, -1, -1) / 255
    ours = ImageProcessor.of(processor, "test")(picture)[0, 0] * 255
    torch.testing.assert_close(ours, torch.tensor(theirs), rtol=0, atol=6e-3)


def test_owlv2_preprocessing_has_a_gradient() -> None:
    steps = ImageProcessor.of(Owlv2ImageProcessorPil(size={"height": 5, "width": 5}), "test")
    picture = torch.rand(1, 3, 9, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(steps, picture)


def test_unknown_preprocessing_is_refused() -> None:
    with pytest.raises(RewardError, match=r"PerceiverImageProcessor.* is not known here; known are those of Beit, Bit"):
        ImageProcessor.of(PerceiverImageProcessorPil(), "rm.model.from_pretrained")
    with pytest.raises(RewardError, match=r"PIL's filter 4; known are 0 \(nearest\)"):
        ImageProcessor.of(ViTImageProcessorPil(size=SIDES, resample=4), "rm.model.from_pretrained")
    with pytest.raises(RewardError, match="expected height and width, or shortest_edge"):
        ImageProcessor.of(ViTImageProcessorPil(size={"shortest_edge": 24, "longest_edge": 48}), "test")


# Classifier


def test_the_classifier_is_transformers(vit: Path) -> None:
    batch = pictures(3, 32, 32)
    model = ViTForImageClassification.from_pretrained(vit).eval()
    processor = ViTImageProcessorPil.from_pretrained(vit)
    inputs = processor([to_pil(picture) for picture in batch], return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits.log_softmax(-1)
    assert expected.std(dim=0).max() > 1e-2, "the toy must tell the pictures apart"
    for index, label in enumerate(LABELS):
        for target in (index, str(index), label, label.split(",")[0].upper()):
            reward = build_reward(
                {"name": "classifier", "model": {"from_pretrained": str(vit)}, "target_class": target}
            )
            torch.testing.assert_close(reward(batch, [""] * 3), expected[:, index], rtol=1e-4, atol=1e-6)


def test_a_multi_label_classifier_scores_by_the_sigmoid(tmp_path: Path) -> None:
    folder = classifier_folder(tmp_path / "vit", problem_type="multi_label_classification")
    batch = pictures(2, 32, 32)
    model = ViTForImageClassification.from_pretrained(folder).eval()
    inputs = ViTImageProcessorPil.from_pretrained(folder)([to_pil(p) for p in batch], return_tensors="pt")
    with torch.no_grad():
        expected = torch.nn.functional.logsigmoid(model(**inputs).logits[:, 3])
    reward = classifier(folder, "banana")
    torch.testing.assert_close(reward(batch, ["", ""]), expected, rtol=1e-4, atol=1e-6)


def test_views_are_averaged_and_micro_batches_change_nothing(vit: Path) -> None:
    batch = pictures(2, 48, 40).requires_grad_()
    single = classifier(vit, "1")
    several = classifier(vit, "1", views=7)
    views = fixed_views(batch, 10)
    assert len(views) == 10
    assert torch.equal(views[0], batch)
    assert torch.equal(views[1], batch.flip(-1))
    assert {tuple(view.shape[-2:]) for view in views[2:]} == {(42, 35)}
    expected = torch.stack([single(view, ["", ""]) for view in views[:7]]).mean(0)
    torch.testing.assert_close(several(batch, ["", ""]), expected)
    pieces = classifier(vit, "1", views=7, micro_batch_size=3, activation_checkpointing=True)
    torch.testing.assert_close(pieces(batch, ["", ""]), expected)
    (whole,) = torch.autograd.grad(expected.sum(), batch)
    (part,) = torch.autograd.grad(pieces(batch, ["", ""]).sum(), batch)
    torch.testing.assert_close(part, whole, rtol=1e-3, atol=1e-7)
    assert (whole.flatten(1).abs().sum(1) > 0).all()


def test_a_users_own_network_is_a_class_of_settings(vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_network.py").write_text(
        """
from dataclasses import dataclass
from nemo_aligner_diffusion.rewards.settings import HuggingFaceSettings
from nemo_aligner_diffusion.settings import Kind, setting

@dataclass(frozen=True, kw_only=True)
class Confidence(HuggingFaceSettings):
    name = "confidence"
    auto_class = "AutoModelForImageClassification"
    what = "an image classifier"
    needs = {"from_pretrained": "google/vit-base-patch16-224"}
    power: float = setting(1.0, Kind("float", low=0), "exponent")

    def score(self, network, images):
        return network.model(pixel_values=network.pixels(images)).logits.softmax(-1).amax(-1) ** self.power
"""
    )
    monkeypatch.chdir(tmp_path)

    def built(**kwargs: Any) -> Any:
        return build_reward({"name": "custom", "import_path": "own_network:Confidence", "kwargs": kwargs})

    batch = pictures(2, 32, 32)
    one = built(from_pretrained=str(vit))(batch, ["", ""])
    two = built(from_pretrained=str(vit), power=2, micro_batch_size=1)(batch, ["", ""])
    torch.testing.assert_close(two, one**2)
    with pytest.raises(ConfigurationError, match=r"needs rm\.model\.from_pretrained, such as"):
        built()
    with pytest.raises(RewardError, match="power = -1: expected a number >= 0"):
        built(from_pretrained=str(vit), power=-1)


def test_an_unknown_class_lists_the_nearest(vit: Path) -> None:
    config = ViTForImageClassification.from_pretrained(vit).config
    assert class_index(config, " Carassius auratus ") == 0
    with pytest.raises(RewardError, match=r"did you mean golden retriever.*an index \(0 … 4\)"):
        class_index(config, "golden retreiver")
    with pytest.raises(RewardError, match=r"part of tabby, tabby cat, Egyptian cat"):
        class_index(config, "cat")
    with pytest.raises(RewardError, match="none of the classifier's 5 classes"):
        class_index(config, "5")
    with pytest.raises(RewardError, match="Expected a name, or an index"):
        class_index(config, "zzzz")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"target_class": None}, "needs rm.target_class"),
        ({"model": {}}, "needs rm.model.from_pretrained"),
        ({"model": {"from_pretrained": "/no/such"}}, "Give the path of the folder of a transformers model"),
        ({"model": {"restore_from_path": "x.nemo"}}, "which restores no file"),
        ({"views": 11}, "<= 10"),
        (
            {"model": {"from_pretrained": "nobody/has-this"}},
            "the folder of a transformers model, an image classifier .* could not be had",
        ),
    ],
)
def test_what_a_classifier_cannot_be_made_of(vit: Path, change: dict[str, Any], expected: str) -> None:
    section = {"name": "classifier", "model": {"from_pretrained": str(vit)}, "target_class": 0, **change}
    with pytest.raises((ConfigurationError, RewardError), match=expected):
        build_reward(section)


def test_a_folder_that_is_no_classifier_is_named(vit: Path, owl: tuple[str, Path], tmp_path: Path) -> None:
    def fails(folder: Path, expected: str) -> None:
        with pytest.raises(RewardError, match=expected):
            classifier(folder, "0")

    fails(owl[1], "an image classifier cannot be had from it")
    fails(tmp_path, "config.json")
    headless = tmp_path / "headless"
    ViTForImageClassification.from_pretrained(vit).vit.save_pretrained(headless)
    fails(headless, r"lacks 2 weights of an image classifier, e\.g\. classifier\.bias")
    remote = classifier_folder(tmp_path / "remote")
    config = json.loads((remote / "config.json").read_text())
    (remote / "config.json").write_text(json.dumps({**config, "vision": {"_attn_implementation": "evil/kernel"}}))
    fails(remote, "names code on the hub, vision._attn_implementation = 'evil/kernel'")
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}}
    (remote / "config.json").write_text(json.dumps(config))
    (remote / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    fails(remote, "cannot be had from it")
    assert not (tmp_path / "ran").exists()


# Detection


def reference_logits(kind: str, folder: Path, batch: Tensor, queries: list[str]) -> Tensor:
    """transformers' own forward pass, ``(B, boxes)``; the pixels by its processor where that needs no scipy."""
    if kind == "owlvit":
        model: Any = OwlViTForObjectDetection.from_pretrained(folder).eval()
        processor = OwlViTImageProcessorPil.from_pretrained(folder)
        pixels = processor([to_pil(picture) for picture in batch], return_tensors="pt").pixel_values
    else:
        model = Owlv2ForObjectDetection.from_pretrained(folder).eval()
        mean, std = (np.array(getattr(Owlv2ImageProcessorPil, f"image_{name}")) for name in ("mean", "std"))
        side = max(batch.shape[-2:])
        square = np.zeros((len(batch), side, side, 3))
        square[:, : batch.shape[2], : batch.shape[3]] = batch.permute(0, 2, 3, 1).numpy()
        pixels = torch.from_numpy((square - mean) / std).permute(0, 3, 1, 2).float()
    tokens = AutoTokenizer.from_pretrained(folder)(queries, padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        return model(pixel_values=pixels, **tokens).logits[..., 0].double()


def test_the_detector_is_transformers(owl: tuple[str, Path]) -> None:
    kind, folder = owl
    batch = pictures(2, 32, 32 if kind == "owlvit" else 24)
    queries = ["a cat", "red apple"]
    expected = reference_logits(kind, folder, batch, queries)
    reward = build_reward({"name": "detection", "model": {"from_pretrained": str(folder)}, "temperature": 0})
    assert isinstance(reward, NetworkReward)
    torch.testing.assert_close(box_logits(reward, batch, queries).double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(reward(batch, queries).double(), expected.amax(1).sigmoid().log(), rtol=1e-4, atol=1e-6)
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    same = build_reward({"name": "detection", "model": {"from_pretrained": str(folder)}, "query": "a cat"})
    smooth = 0.1 * (reference_logits(kind, folder, batch, ["a cat", "a cat"]) / 0.1).exp().sum(1).log()
    torch.testing.assert_close(same(batch, queries).double(), smooth.sigmoid().log(), rtol=1e-4, atol=1e-6)


def test_removing_is_the_opposite_and_levels_off(owl: tuple[str, Path]) -> None:
    _, folder = owl
    batch = pictures(2, 40, 32).requires_grad_()
    add = detector(folder, "cat")
    remove = detector(folder, "cat", remove=True)
    present, absent = add(batch, ["", ""]), remove(batch, ["", ""])
    torch.testing.assert_close(present.exp() + absent.exp(), torch.ones(2))
    (up,) = torch.autograd.grad(present.sum(), batch)
    (down,) = torch.autograd.grad(absent.sum(), batch)
    assert torch.nn.functional.cosine_similarity(up[0].flatten(), down[0].flatten(), dim=0) < -0.99
    assert (present < 0).all()
    assert (absent < 0).all()
    pieces = detector(folder, "cat", micro_batch_size=1, activation_checkpointing=True)
    (again,) = torch.autograd.grad(pieces(batch, ["", ""]).sum(), batch)
    torch.testing.assert_close(again, up, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"query": "  "}, "query is empty"),
        ({"temperature": -1}, "temperature = -1"),
        ({"model": {}}, "needs rm.model.from_pretrained"),
    ],
)
def test_what_a_detector_cannot_be_made_of(owl: tuple[str, Path], change: dict[str, Any], expected: str) -> None:
    with pytest.raises((ConfigurationError, RewardError), match=expected):
        build_reward({"name": "detection", "model": {"from_pretrained": str(owl[1])}, **change})


def test_a_classifier_is_no_detector(vit: Path) -> None:
    with pytest.raises(RewardError, match="a model of type 'vit'; expected owlvit or owlv2"):
        detector(vit, "cat")


# Feature symmetry


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_feature_symmetry_prefers_the_symmetric(distance: str) -> None:
    left = pictures(1, 64, 32, seed=3)
    symmetric = torch.cat([left, left.flip(-1)], dim=-1)
    other = pictures(1, 64, 64, seed=4)
    reward = build_reward({"name": "feature_symmetry", "distance": distance})
    batch = torch.cat([symmetric, other]).requires_grad_()
    scores = reward(batch, ["", ""])
    assert scores[0].item() == pytest.approx(0, abs=1e-5)
    assert scores[1] < -1e-2
    (gradient,) = torch.autograd.grad(scores[1], batch)
    moved = (batch + 0.02 * gradient.sign()).clamp(0, 1).detach()
    assert reward(moved, ["", ""])[1] > scores[1]


def test_feature_symmetry_compares_the_towers_patches() -> None:
    clip: Any = restore_reward(embedded_reward_path())
    picture = pictures(1, clip.preprocessing.size, clip.preprocessing.size)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (clip.preprocessing.mean, clip.preprocessing.std))
    with torch.no_grad():
        tower = clip.model.vision_model
        one = tower(pixel_values=(picture - mean) / std).last_hidden_state[:, 1:]
        two = tower(pixel_values=(picture.flip(-1) - mean) / std).last_hidden_state[:, 1:]
    cosine = (one * two).sum(-1) / (one.norm(dim=-1) * two.norm(dim=-1))
    reward = FeatureSymmetry().build()
    torch.testing.assert_close(reward(picture, [""]), cosine.mean(1) - 1, rtol=1e-4, atol=1e-6)
    with pytest.raises(ConfigurationError, match="expected one of cosine, l2"):
        FeatureSymmetry(distance="manhattan")
