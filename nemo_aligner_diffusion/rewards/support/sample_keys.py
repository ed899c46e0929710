"""Which samples are being scored: what a reward's random numbers are keyed by.

A reward that perturbs pictures while training must draw the same numbers for a sample under any layout (devices,
micro-batches) and after any resume, as the sampler's noise does (:mod:`~nemo_aligner_diffusion.diffusion.noise`). The
training step says around each scoring call which samples it holds; without that (validation, evaluation, a call by
hand) a reward is free of randomness.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from nemo_aligner_diffusion.diffusion.noise import key_to_seed
from nemo_aligner_diffusion.errors import RewardError


@dataclass(frozen=True)
class SampleKeys:
    """The samples of one scoring call.

    Attributes:
        seed: the run's.
        step: optimizer steps done.
        indices: global index of each picture of the call, in order.
        draw: tells apart the calls that score a sample more than once in a step (DRaFT-LV).
    """

    seed: int
    step: int
    indices: tuple[int, ...]
    draw: int = 0

    def generators(self, *purpose: int | str) -> list[torch.Generator]:
        """A CPU generator for each picture; the same one for the same keys and purpose, anywhere."""
        return [
            torch.Generator().manual_seed(key_to_seed("reward", self.seed, self.step, index, self.draw, *purpose))
            for index in self.indices
        ]


_CURRENT: ContextVar[SampleKeys | None] = ContextVar("nemo_aligner_diffusion_sample_keys", default=None)


@contextlib.contextmanager
def scoring_samples(keys: SampleKeys) -> Iterator[None]:
    """Within, :func:`current_keys` gives ``keys``."""
    token = _CURRENT.set(keys)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current_keys(pictures: int) -> SampleKeys | None:
    """The keys of the ``pictures`` being scored, or ``None`` where nothing random is wanted.

    Raises:
        RewardError: the keys are for another number of pictures.
    """
    keys = _CURRENT.get()
    if keys is not None and len(keys.indices) != pictures:
        raise RewardError(
            f"A reward was given {pictures} pictures where the training step announced {len(keys.indices)}: a reward "
            "that calls another must pass on the whole batch."
        )
    return keys
