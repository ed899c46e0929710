"""Random numbers keyed by what they are for, so that a run is the same under any layout and after any resume."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Sequence

import torch
from torch import Tensor


def key_to_seed(*key: int | str) -> int:
    """A 63-bit seed from a tuple such as ``("latents", seed, step, sample_index)``; stable across machines."""
    digest = hashlib.blake2b(digest_size=8)
    for part in key:
        encoded = part.encode() if isinstance(part, str) else struct.pack("<q", part)
        digest.update(struct.pack("<I", len(encoded)) + encoded)
    return int.from_bytes(digest.digest(), "little") >> 1


def sample_generator(seed: int, step: int, sample_index: int) -> torch.Generator:
    """The generator of all noise of one sample of one step.

    Always on the CPU: the same picture on any device, whatever rank the sample lands on.
    """
    return torch.Generator().manual_seed(key_to_seed("sample", seed, step, sample_index))


def plan_random(seed: int, step: int) -> random.Random:
    """The random source of an optimizer step's plan: equal on every rank without communication.

    Not of a micro-batch: how many of them make a step depends on the layout, and a run must not.
    """
    return random.Random(key_to_seed("plan", seed, step, 0))


def gaussian(generators: Sequence[torch.Generator], shape: Sequence[int], like: Tensor | None = None) -> Tensor:
    """One standard normal tensor ``(len(generators), *shape)``, row ``b`` drawn from ``generators[b]``.

    Drawn in float32 on the CPU, then moved to the device and dtype of ``like``.
    """
    # said, because trainer.precision may have made another dtype the default, whose numbers are others
    drawn = torch.stack([torch.randn(tuple(shape), generator=g, dtype=torch.float32) for g in generators])
    return drawn if like is None else drawn.to(device=like.device, dtype=like.dtype)
