"""The loss against an oracle in float64, accuracy, calibration against a set worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch

from nemo_aligner_diffusion.errors import DataError
from nemo_aligner_diffusion.reward_training.evaluate import preference_figures
from nemo_aligner_diffusion.reward_training.loss import correct, decided, preference_loss
from nemo_aligner_diffusion.rewards.rules import Colourfulness


def oracle(first: float, second: float, share: float) -> float:
    """KL(label ‖ softmax), term by term."""
    total = 0.0
    for part, predicted in (
        (share, 1 / (1 + math.exp(second - first))),
        (1 - share, 1 / (1 + math.exp(first - second))),
    ):
        if part > 0:
            total += part * (math.log(part) - math.log(predicted))
    return total


def test_against_the_oracle() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(200, 2, generator=generator, dtype=torch.float64) * 4
    share = torch.cat([torch.tensor([0.0, 1.0, 0.5] * 50), torch.rand(50, generator=generator)]).double()
    labels = torch.stack([share, 1 - share], dim=1)
    expected = [oracle(*row, part) for row, part in zip(scores.tolist(), share.tolist(), strict=True)]
    assert torch.allclose(
        preference_loss(scores, labels), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-14
    )


def test_gradient() -> None:
    scores = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1.0, 0], [0, 1], [0.5, 0.5], [0.7, 0.3], [0, 1], [1, 0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: preference_loss(s, labels), scores)
    preference_loss(scores, labels).sum().backward()
    assert scores.grad is not None
    assert torch.allclose(scores.grad, scores.detach().softmax(1) - labels)


@pytest.mark.parametrize("share", [0.5, 0.3, 0.9])
def test_the_minimum_is_zero_and_lies_at_the_label(share: float) -> None:
    labels = torch.tensor([[share, 1 - share]], dtype=torch.float64)
    assert preference_loss(labels.log(), labels).item() == pytest.approx(0, abs=1e-15)
    for shift in (-0.1, 0.1):
        assert preference_loss(labels.log() + torch.tensor([[shift, 0.0]]), labels).item() > 1e-4


def test_a_certain_label_costs_nothing_in_the_limit_and_is_finite() -> None:
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert preference_loss(torch.tensor([[60.0, 0.0], [0.0, 60.0]]), labels).tolist() == [0.0, 0.0]
    assert preference_loss(torch.tensor([[0.0, 1e4], [1e4, 0.0]]), labels).tolist() == [1e4, 1e4]


def test_near_nemo_aligners_definition() -> None:
    """The mean of CE plus Σ l·log l of labels smoothed by 1e-4, as its loss_func computes: apart by a constant only."""
    scores = torch.randn(64, 2, dtype=torch.float64)
    labels = torch.tensor([[1.0, 0], [0, 1], [0.5, 0.5], [1, 0]], dtype=torch.float64).repeat(16, 1)
    smoothed = (labels + 1e-4) / (labels + 1e-4).sum(1, keepdim=True)
    theirs = -(labels * scores.log_softmax(1)).sum(1).mean() + (smoothed * smoothed.log()).sum(1).mean()
    assert abs(float(preference_loss(scores, labels).mean() - theirs)) < 1.1e-3


def test_swapping_the_sides_changes_nothing() -> None:
    scores, labels = torch.randn(40, 2), torch.rand(40, 1)
    labels = torch.cat([labels, 1 - labels], dim=1)
    assert torch.allclose(preference_loss(scores, labels), preference_loss(scores.flip(1), labels.flip(1)), atol=1e-6)
    assert torch.equal(correct(scores, labels), correct(scores.flip(1), labels.flip(1)))
    once, swapped = preference_figures(scores, labels), preference_figures(scores.flip(1), labels.flip(1))
    assert (once.accuracy, once.ties) == (swapped.accuracy, swapped.ties)
    assert once.calibration_error == pytest.approx(swapped.calibration_error)


def test_decided_and_correct() -> None:
    labels = torch.tensor([[1.0, 0], [0, 1], [0.5, 0.5], [0.4, 0.6]])
    assert decided(labels).tolist() == [True, True, False, True]
    scores = torch.tensor([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0], [3.0, 3.0]])
    assert correct(scores, labels)[decided(labels)].tolist() == [1.0, 0.0, 0.5]


def logits(*probabilities: float) -> torch.Tensor:
    """Scores whose softmax gives the first picture these probabilities."""
    return torch.tensor([[math.log(p), math.log(1 - p)] for p in probabilities], dtype=torch.float64)


def test_figures_of_a_set_worked_out_by_hand() -> None:
    # Five bins over [0.5, 1]: widths of 0.1. Confidence 0.95 0.95 0.95 0.65 0.65, right 1 1 0 1 0; one tie at 0.7.
    scores = logits(0.95, 0.05, 0.95, 0.65, 0.35, 0.7)
    labels = torch.tensor([[1, 0], [0, 1], [0, 1], [1, 0], [1, 0], [0.5, 0.5]])
    figures = preference_figures(scores, labels, bins=5)
    assert (figures.pairs, figures.ties) == (6, 1)
    assert figures.accuracy == pytest.approx(3 / 5)
    assert figures.mean_confidence == pytest.approx((3 * 0.95 + 2 * 0.65) / 5)
    # 3/5·|2/3 − 0.95| + 2/5·|1/2 − 0.65|
    assert figures.calibration_error == pytest.approx(0.6 * (0.95 - 2 / 3) + 0.4 * 0.15)
    assert [part["pairs"] for part in figures.bins] == [0, 2, 0, 0, 3]
    assert figures.bins[1]["accuracy"] == pytest.approx(0.5)
    assert figures.bins[4]["confidence"] == pytest.approx(0.95)
    assert [part["low"] for part in figures.bins] == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
    expected = [-math.log(0.95), -math.log(0.95), -math.log(0.05), -math.log(0.65), -math.log(0.35)]
    tie = -0.5 * math.log(0.7) - 0.5 * math.log(0.3) - math.log(2)
    assert figures.loss == pytest.approx((sum(expected) + tie) / 6)
    assert json.loads(json.dumps(figures.as_dict(), allow_nan=False))["bins"][0]["accuracy"] is None


def test_extremes() -> None:
    certain = preference_figures(torch.tensor([[1e4, 0.0]] * 3), torch.tensor([[1.0, 0.0]] * 3))
    assert (certain.accuracy, certain.calibration_error, certain.bins[-1]["pairs"]) == (1.0, 0.0, 3)
    ties = preference_figures(torch.zeros(2, 2), torch.full((2, 2), 0.5))
    assert math.isnan(ties.accuracy)
    assert math.isnan(ties.calibration_error)
    assert ties.loss == pytest.approx(0.0)
    with pytest.raises(DataError, match="no pair"):
        preference_figures(torch.empty(0, 2), torch.empty(0, 2))
    with pytest.raises(DataError, match="1 of 2 pairs"):
        preference_figures(torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]), torch.tensor([[1.0, 0.0]] * 2))


def test_colourfulness() -> None:
    colourfulness = Colourfulness().score
    grey, red = torch.full((1, 3, 4, 4), 0.5, requires_grad=True), torch.zeros(1, 3, 4, 4)
    red[:, 0] = 1.0
    of_grey = colourfulness(grey, [""])
    assert of_grey.item() == pytest.approx(0, abs=1e-5)
    (slope,) = torch.autograd.grad(of_grey.sum(), grey)
    assert slope.abs().max() == 0, "not NaN"
    # rg = 255, yb = 127.5 everywhere: no spread, 0.3·√(255² + 127.5²)
    assert colourfulness(red, [""]).item() == pytest.approx(0.3 * math.hypot(255, 127.5))
