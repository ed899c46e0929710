"""Have the pictures grown alike, and can one still tell what they show? Both in CLIP's embedding space.

A reward rises cheaply when all seeds of a prompt give one picture, or when pictures turn into what the reward likes and
nobody recognises. :func:`diversity` measures the first, :func:`recognisability` the second.

An ``embedder`` is a :class:`~nemo_aligner_diffusion.rewards.clip.reward.CLIPReward`, or what has its ``embed_images``
(``(B, 3, H, W)`` in ``[0, 1]`` → ``(B, D)``) and ``embed_texts`` (B prompts → ``(B, D)``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

_AT_ONCE = 64  # pictures or texts


@dataclass(frozen=True)
class Recognisability:
    """How often a picture's own prompt is the one that CLIP finds nearest among the candidates.

    Attributes:
        top1: share of pictures, 0…1.
        mean_reciprocal_rank: 1 where the prompt is always first.
        ranks: rank of each picture's prompt, from 1.
    """

    top1: float
    mean_reciprocal_rank: float
    ranks: list[int]


@torch.no_grad()
def embed_images(embedder: Any, images: Tensor) -> Tensor:
    """Unit-length embeddings ``(N, D)``, float32 on the CPU; of videos ``(N, F, 3, H, W)`` their frames' mean."""
    if images.ndim == 5:
        of_frames = embed_images(embedder, images.flatten(0, 1))
        return normalize(of_frames.unflatten(0, (-1, images.shape[1])).mean(1), dim=-1)
    return normalize(torch.cat([embedder.embed_images(part) for part in images.split(_AT_ONCE)]).float().cpu(), dim=-1)


def mean_pairwise_distance(embeddings: Tensor) -> float:
    """Mean of ``1 − cos`` over all pairs of distinct rows of ``(N, D)``.

    Raises:
        ValueError: fewer than two rows.
    """
    count = len(embeddings)
    if count < 2:
        raise ValueError(f"a distance needs two pictures, got {count}")
    unit = normalize(embeddings.double(), dim=-1)
    # Σ_{i≠j} cos_ij = ‖Σ_i u_i‖² − N, with no N×N table
    cosines = float(unit.sum(0).square().sum()) - count
    return max(0.0, 1.0 - cosines / (count * (count - 1)))


def diversity(embeddings: Tensor, prompts: Sequence[str]) -> float:
    """Mean cosine distance (0…2) between the pictures of a prompt (different seeds), averaged over prompts.

    Args:
        embeddings: ``(N, D)`` of :func:`embed_images`.
        prompts: the prompt of each picture; those that have a single one are left out.

    Raises:
        ValueError: numbers differ, or no prompt has two pictures.
    """
    groups: dict[str, list[Tensor]] = {}
    for row, prompt in zip(embeddings, prompts, strict=True):
        groups.setdefault(prompt, []).append(row)
    distances = [mean_pairwise_distance(torch.stack(rows)) for rows in groups.values() if len(rows) > 1]
    if not distances:
        raise ValueError("diversity needs a prompt with at least two pictures (seeds), there is none")
    return sum(distances) / len(distances)


def diversity_ratio(embedder: Any, base: Tensor, tuned: Tensor, prompts: Sequence[str]) -> float:
    """Diversity of the tuned model's pictures divided by that of the base model's; NaN where the base has none."""
    reference = diversity(embed_images(embedder, base), prompts)
    return diversity(embed_images(embedder, tuned), prompts) / reference if reference > 0 else float("nan")


@torch.no_grad()
def recognisability(
    embedder: Any, images: Tensor, prompts: Sequence[str], candidates: Sequence[str] = ()
) -> Recognisability:
    """Retrieve each picture's prompt among ``candidates`` by cosine similarity.

    Args:
        images: ``(N, 3, H, W)`` in ``[0, 1]``.
        prompts: what each picture should show.
        candidates: texts to choose from, beside the prompts themselves; duplicates count once.

    Raises:
        ValueError: numbers differ, or there is no picture.
    """
    if len(images) != len(prompts) or not len(images):
        raise ValueError(
            f"one prompt for each picture, at least one: got {len(images)} pictures, {len(prompts)} prompts"
        )
    texts = list(dict.fromkeys([*prompts, *candidates]))
    parts = [embedder.embed_texts(texts[start : start + _AT_ONCE]) for start in range(0, len(texts), _AT_ONCE)]
    similarity = embed_images(embedder, images) @ normalize(torch.cat(parts).float().cpu(), dim=-1).T
    own = torch.tensor([texts.index(prompt) for prompt in prompts])
    ranks = 1 + (similarity > similarity.gather(1, own[:, None])).sum(1)
    return Recognisability(float((ranks == 1).float().mean()), float((1.0 / ranks).mean()), ranks.tolist())
