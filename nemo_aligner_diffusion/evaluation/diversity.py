"""Have the pictures grown alike, and can one still tell what they show? Both in CLIP's embedding space.

A reward rises cheaply when all seeds of a prompt give one picture, or when pictures turn into what the reward likes and
nobody recognises. :func:`seed_diversity` measures the first, :func:`recognisability` the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Embedder(Protocol):
    """What is needed of a ``CLIPReward``."""

    def embed_images(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` in ``[0, 1]`` → ``(B, D)``."""
        ...

    def embed_texts(self, prompts: list[str]) -> Tensor:
        """B prompts → ``(B, D)``."""
        ...


@dataclass(frozen=True)
class Diversity:
    """Mean cosine distance (0…2) between the pictures of one prompt.

    Attributes:
        mean: over prompts.
        by_prompt: for each prompt with at least two pictures.
    """

    mean: float
    by_prompt: dict[str, float]


@dataclass(frozen=True)
class Recognisability:
    """How often a picture's own prompt is the one that CLIP finds nearest among the candidates.

    Attributes:
        top1: share of pictures, 0…1.
        mean_reciprocal_rank: 1 where the prompt is always first.
        ranks: rank of each picture's prompt, from 1.
        nearest: the candidate nearest to each picture.
    """

    top1: float
    mean_reciprocal_rank: float
    ranks: list[int]
    nearest: list[str]


@torch.no_grad()
def embed_images(embedder: Embedder, images: Tensor, batch_size: int = 64) -> Tensor:
    """Unit-length embeddings ``(N, D)``, float32 on the CPU; of videos ``(N, F, 3, H, W)`` their frames' mean."""
    if images.ndim == 5:
        of_frames = embed_images(embedder, images.flatten(0, 1), batch_size)
        return torch.nn.functional.normalize(of_frames.unflatten(0, (-1, images.shape[1])).mean(1), dim=-1)
    parts = [embedder.embed_images(images[start : start + batch_size]) for start in range(0, len(images), batch_size)]
    return torch.nn.functional.normalize(torch.cat(parts).float().cpu(), dim=-1)


def mean_pairwise_distance(embeddings: Tensor) -> float:
    """Mean of ``1 − cos`` over all pairs of distinct rows of ``(N, D)``.

    Raises:
        ValueError: fewer than two rows.
    """
    count = len(embeddings)
    if count < 2:
        raise ValueError(f"a distance needs two pictures, got {count}")
    unit = torch.nn.functional.normalize(embeddings.double(), dim=-1)
    # Σ_{i≠j} cos_ij = ‖Σ_i u_i‖² − N, with no N×N table
    cosines = float(unit.sum(0).square().sum()) - count
    return max(0.0, 1.0 - cosines / (count * (count - 1)))


def seed_diversity(embedder: Embedder, images: Tensor, prompts: Sequence[str], batch_size: int = 64) -> Diversity:
    """Mean pairwise distance between pictures of the same prompt (different seeds).

    Args:
        images: ``(N, 3, H, W)`` in ``[0, 1]``.
        prompts: the prompt of each picture; pictures of equal prompts form a group.

    Raises:
        ValueError: numbers differ, or no prompt has two pictures.
    """
    if len(images) != len(prompts):
        raise ValueError(f"one prompt for each picture: got {len(images)} pictures and {len(prompts)} prompts")
    return diversity_of(embed_images(embedder, images, batch_size), prompts)


def diversity_of(embeddings: Tensor, prompts: Sequence[str]) -> Diversity:
    """:func:`seed_diversity` of pictures by their embeddings ``(N, D)``."""
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(index)
    groups = {prompt: rows for prompt, rows in groups.items() if len(rows) > 1}
    if not groups:
        raise ValueError("diversity needs a prompt with at least two pictures (seeds), there is none")
    by_prompt = {prompt: mean_pairwise_distance(embeddings[rows]) for prompt, rows in groups.items()}
    return Diversity(sum(by_prompt.values()) / len(by_prompt), by_prompt)


def diversity_ratio(embedder: Embedder, base: Tensor, tuned: Tensor, prompts: Sequence[str]) -> float:
    """Diversity of the tuned model's pictures divided by that of the base model's; NaN where the base has none."""
    reference = seed_diversity(embedder, base, prompts).mean
    return seed_diversity(embedder, tuned, prompts).mean / reference if reference > 0 else float("nan")


@torch.no_grad()
def recognisability(
    embedder: Embedder,
    images: Tensor,
    prompts: Sequence[str],
    candidates: Sequence[str] | None = None,
    batch_size: int = 64,
) -> Recognisability:
    """Retrieve each picture's prompt among ``candidates`` by cosine similarity.

    Args:
        images: ``(N, 3, H, W)`` in ``[0, 1]``.
        prompts: what each picture should show.
        candidates: texts to choose from (duplicates count once; the prompts themselves are added); None: the prompts.

    Raises:
        ValueError: numbers differ, or there is no picture.
    """
    if len(images) != len(prompts) or not len(images):
        raise ValueError(
            f"one prompt for each picture, at least one: got {len(images)} pictures, {len(prompts)} prompts"
        )
    texts = list(dict.fromkeys([*prompts, *(candidates or [])]))
    parts = [embedder.embed_texts(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
    text_embeddings = torch.nn.functional.normalize(torch.cat(parts).float().cpu(), dim=-1)
    similarity = embed_images(embedder, images, batch_size) @ text_embeddings.T
    own = torch.tensor([texts.index(prompt) for prompt in prompts])
    ranks = 1 + (similarity > similarity.gather(1, own[:, None])).sum(1)
    return Recognisability(
        top1=float((ranks == 1).float().mean()),
        mean_reciprocal_rank=float((1.0 / ranks).mean()),
        ranks=ranks.tolist(),
        nearest=[texts[index] for index in similarity.argmax(1).tolist()],
    )
