"""Intervals, tests and distances against their definitions written out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from nemo_aligner_diffusion.evaluation.statistics import (
    bootstrap_interval,
    frechet_distance,
    kernel_distance,
    sign_flip_p,
)


def features(count: int, size: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.randn(count, size, generator=generator, dtype=torch.float64) @ mixing + shift


def test_the_interval_of_a_mean_is_as_wide_as_its_standard_error_says():
    values = features(400, 1, 0)[:, 0].tolist()
    low, high = bootstrap_interval(values)
    error = float(np.std(values)) / math.sqrt(len(values))
    mean = sum(values) / len(values)
    assert low == pytest.approx(mean - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.2 * error)
    assert bootstrap_interval([3.0]) == (3.0, 3.0)


def test_the_paired_test_is_that_of_all_sign_changes():
    differences = [0.9, 1.4, -0.2, 0.7, 1.1, 0.3, -0.4, 0.8]
    mean = sum(differences) / len(differences)
    flips = itertools.product((1, -1), repeat=len(differences))
    means = [sum(s * d for s, d in zip(signs, differences, strict=True)) / len(differences) for signs in flips]
    exact = sum(abs(m) >= abs(mean) - 1e-12 for m in means) / len(means)
    assert sign_flip_p(differences) == pytest.approx(exact, abs=0.01)
    assert sign_flip_p([0.0, 0.0]) == 1.0


def test_the_frechet_distance_is_its_definition():
    a, b = features(60, 5, 1), features(80, 5, 2, shift=0.5)
    product = torch.cov(a.T) @ torch.cov(b.T)
    values, vectors = np.linalg.eig(product.numpy())  # not symmetric: the root by its own eigenvectors
    root = vectors @ np.diag(np.sqrt(values.astype(complex))) @ np.linalg.inv(vectors)
    expected = float((a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace())
    assert frechet_distance(a, b) == pytest.approx(expected - 2 * float(np.trace(root).real), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    one = features(30, 1, 3)  # in one dimension: |μ − μ'|² + (σ − σ')²
    two = 3 * one + 1
    expected = float((one.mean() - two.mean()) ** 2 + (one.std() - two.std()) ** 2)
    assert frechet_distance(one, two) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="needs two pictures of each at least, got 1"):
        frechet_distance(a[:1], a)


def test_the_kernel_distance_is_a_mean_over_pairs():
    a, b = features(7, 3, 4), features(5, 3, 5, shift=1.0)

    def kernel(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x @ y / 3 + 1) ** 3)

    within = [
        sum(kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j) / (len(x) * (len(x) - 1))
        for x in (a, b)
    ]
    across = sum(kernel(x, y) for x in a for y in b) / (len(a) * len(b))
    assert kernel_distance(a, b) == pytest.approx(sum(within) - 2 * across, rel=1e-9)
