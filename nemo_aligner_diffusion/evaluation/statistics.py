"""How sure a difference is, and how far two sets of pictures are apart; float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def bootstrap_interval(values: Sequence[float], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of independent ``values`` (Efron 1979); of one value itself twice."""
    given = torch.tensor(list(values), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means = given[torch.randint(len(given), (draws, len(given)), generator=generator)].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def sign_flip_p(differences: Sequence[float], draws: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of a paired test: how often a mean at least as far from 0 comes out of random signs.

    The identity counts as one of the draws, so that it is never 0 (Phipson and Smyth 2010).
    """
    given = torch.tensor(list(differences), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    signs = 2 * torch.randint(2, (draws, len(given)), generator=generator).double() - 1
    far = (signs * given).mean(1).abs() >= given.mean().abs() - 1e-12 * given.abs().max()
    return (1 + int(far.sum())) / (1 + draws)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """``|μ_a − μ_b|² + tr(Σ_a + Σ_b − 2(Σ_a Σ_b)^½)`` of features ``(N, D)`` (Heusel et al. 2017, FID).

    Raises:
        ValueError: fewer than two rows.
    """
    a, b = _two_at_least(a), _two_at_least(b)
    first, second = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # (Σ_a Σ_b)^½ has the trace of the symmetric (Σ_a^½ Σ_b Σ_a^½)^½
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + first.trace() + second.trace() - 2 * cross)


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy of features under ``(x·y/D + 1)³`` (Bińkowski et al. 2018, KID).

    Raises:
        ValueError: fewer than two rows.
    """
    a, b = _two_at_least(a), _two_at_least(b)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        full = kernel(x, x)
        return (full.sum() - full.trace()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def _two_at_least(features: Tensor) -> Tensor:
    if len(features) < 2:
        raise ValueError(f"a distance between sets needs two pictures of each at least, got {len(features)}")
    return features.double()
