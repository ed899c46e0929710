"""The order of an epoch: from places within it to rows of a :class:`~.shard_index.ShardIndex`.

A function of the samples in each shard, the seed, the epoch and ``shuffle_buffer``, of nothing else. All of it is
integer arithmetic and Python's Mersenne twister, so it is the same on every machine and with every numpy.

**Up to** :data:`SMALL_SOURCE` **samples**, and for compressed shards at any size, the shards are shuffled and their
samples pass through a shuffle buffer (webdataset's), exactly as a stream of them would.

**Beyond**, the shuffled shards are laid end to end and cut into :data:`LANES` equal *lanes*. Place *w* of the epoch
comes from lane ``w % LANES``: neighbours in the order are far apart in the data. Within a lane, windows of
``shuffle_buffer / LANES`` neighbouring samples are shuffled. Seeking costs one window row, memory one window row
(``shuffle_buffer`` samples), and ranks split the *shards*: whenever micro-batch × ranks divides ``LANES``, or ``LANES``
divides it, a rank's places lie in its own lanes only. The idea of a fixed number of parts that any number of ranks
shares out is that of MosaicML's StreamingDataset ("canonical nodes").
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
from numpy.typing import NDArray

LANES = 64
SMALL_SOURCE = 100_000  # samples; their places are 0.8 MB, drawn in 0.1 s an epoch
BLOCK = 1 << 16  # places of a block where nothing is shuffled

Rows = NDArray[np.int64]


class EpochOrder:
    """The rows of epoch ``epoch``.

    Args:
        counts: (shards,) samples in each shard; the rows of shard *s* are the ``counts[s]`` after those of the shards
            before it.
        shuffle_buffer: 0 keeps the order; 1 shuffles the shards only; more, samples as the module says.
        streamed: have the order of a stream at any size.
    """

    def __init__(self, counts: Rows, seed: int, epoch: int, shuffle_buffer: int, streamed: bool = False) -> None:
        # A string seeds through SHA-512: the same on every machine, and unlike neighbouring integers never correlated.
        self._key = f"{seed}/{epoch}"
        self._buffer = shuffle_buffer
        shards = list(range(len(counts)))
        if shuffle_buffer > 0:
            random.Random(f"{self._key}/files").shuffle(shards)
        sizes = counts[shards]
        self._ends = np.cumsum(sizes)
        # the row of a place is the place plus a shift that is the shard's
        self._shifts = (np.cumsum(counts) - counts)[shards] - (self._ends - sizes)
        self._total = int(self._ends[-1])
        self._as_a_stream = streamed or self._total <= SMALL_SOURCE

    def block(self, place: int) -> tuple[int, Rows]:
        """(first place, rows) of the block of neighbouring places that ``place`` is in."""
        if self._buffer <= 1:
            first = place // BLOCK * BLOCK
            block = np.arange(first, min(first + BLOCK, self._total), dtype=np.int64)
        elif self._as_a_stream:
            first, block = 0, self._buffered()
        else:
            first, block = self._window_row(place)
        return first, block + self._shifts[np.searchsorted(self._ends, block, side="right")]

    def _buffered(self) -> Rows:
        # Imported here: it takes a second, and writers and path handling do without it.
        import webdataset as wds

        buffered = wds.shuffle(self._buffer, initial=self._buffer, rng=random.Random(f"{self._key}/prompts"))
        return np.fromiter(buffered(iter(range(self._total))), dtype=np.int64, count=self._total)

    def _window_row(self, place: int) -> tuple[int, Rows]:
        key = int.from_bytes(hashlib.sha512(f"{self._key}/lanes".encode()).digest()[:8], "little")
        length = self._total // LANES  # of a lane; what is left over comes last
        if place >= LANES * length:
            rest = np.arange(LANES * length, self._total, dtype=np.int64)
            return LANES * length, rest[np.argsort(_scrambled(rest, key))]
        window = max(1, self._buffer // LANES)
        first = place // (LANES * window) * window  # in each lane
        lanes = np.arange(LANES, dtype=np.int64)[:, None] * length
        places = lanes + np.arange(first, min(first + window, length), dtype=np.int64)
        shuffled = np.take_along_axis(places, np.argsort(_scrambled(places, key), axis=1), axis=1)
        return LANES * first, shuffled.T.ravel()


def _scrambled(places: Rows, key: int) -> NDArray[np.uint64]:
    """A pseudorandom number for each place, no two alike (SplitMix64's finaliser is a bijection)."""
    z = (places.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
