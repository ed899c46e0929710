"""Random numbers keyed by what they are for, so that a run is the same under any layout and after any resume."""

from __future__ import annotations

import hashlib
import random
import struct

import torch


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
