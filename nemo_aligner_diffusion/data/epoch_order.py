"""The order of an epoch: from positions within it to rows of a :class:`~.shard_index.ShardIndex`.

A function of the samples in each shard, the seed, the epoch and ``shuffle_buffer``, of nothing else. All of it is
integer arithmetic and Python's Mersenne twister, so it is the same on every machine and with every numpy.

**Up to** :data:`SMALL_SOURCE` **samples**, the shards are shuffled and their samples pass through a shuffle buffer
(webdataset's), exactly as a stream of them would: the order that compressed shards have at any size.

**Beyond**, the shuffled shards are laid end to end and cut into :data:`LANES` equal *lanes*. Position *w* of the epoch
comes from lane ``w % LANES``: neighbours in the order are far apart in the data. Within a lane, windows of
``shuffle_buffer / LANES`` neighbouring samples are shuffled. Seeking costs one window row, memory one window row
(``shuffle_buffer`` samples), and ranks split the *shards*: whenever micro-batch × ranks divides ``LANES``, or ``LANES``
divides it, a rank's positions lie in its own lanes only. The idea of a fixed number of parts that any number of ranks
shares out is that of MosaicML's StreamingDataset ("canonical nodes").
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

LANES = 64
SMALL_SOURCE = 100_000  # samples; their places are 0.8 MB, drawn in 0.1 s an epoch
BLOCK = 1 << 16  # positions of a block where nothing is shuffled

Rows = NDArray[np.int64]


def epoch_rows(counts: Rows, seed: int, epoch: int, shuffle_buffer: int, start: int = 0) -> Iterator[Rows]:
    """The rows of an epoch from position ``start`` on, in blocks.

    Args:
        counts: (shards,) samples in each shard; the rows of shard *s* are the ``counts[s]`` after those of the shards
            before it.
        shuffle_buffer: 0 keeps the order; 1 shuffles the shards only; more, samples as the module says.
    """
    # A string seeds through SHA-512: the same on every machine, and unlike neighbouring integers never correlated.
    shards = list(range(len(counts)))
    if shuffle_buffer > 0:
        random.Random(f"{seed}/{epoch}/files").shuffle(shards)
    sizes = counts[shards]
    ends = np.cumsum(sizes)
    # the row of a place is the place plus a shift that is the shard's
    shifts = (np.cumsum(counts) - counts)[shards] - (ends - sizes)
    total = int(ends[-1])
    if shuffle_buffer <= 1:
        places: Iterator[Rows] = _unshuffled(total, start)
    elif total <= SMALL_SOURCE:
        places = iter([_buffered(total, seed, epoch, shuffle_buffer)[start:]])
    else:
        places = _lanes(total, seed, epoch, max(1, shuffle_buffer // LANES), start)
    for block in places:
        yield block + shifts[np.searchsorted(ends, block, side="right")]


def _unshuffled(total: int, start: int) -> Iterator[Rows]:
    for first in range(start, total, BLOCK):
        yield np.arange(first, min(first + BLOCK, total), dtype=np.int64)


def _buffered(total: int, seed: int, epoch: int, size: int) -> Rows:
    # Imported here: it takes a second, and writers and path handling do without it.
    import webdataset as wds

    buffered = wds.shuffle(size, initial=size, rng=random.Random(f"{seed}/{epoch}/prompts"))
    return np.fromiter(buffered(iter(range(total))), dtype=np.int64, count=total)


def _lanes(total: int, seed: int, epoch: int, window: int, start: int) -> Iterator[Rows]:
    key = int.from_bytes(hashlib.sha512(f"{seed}/{epoch}/lanes".encode()).digest()[:8], "little")
    length = total // LANES  # of a lane; what is left over comes last
    bases = np.arange(LANES, dtype=np.int64)[:, None] * length
    row = LANES * window
    for first in range(start // row * window, length, window):
        places = bases + np.arange(first, min(first + window, length), dtype=np.int64)
        shuffled = np.take_along_axis(places, np.argsort(_scrambled(places, key), axis=1), axis=1)
        yield shuffled.T.ravel()[max(start - LANES * first, 0) :]
    rest = np.arange(LANES * length, total, dtype=np.int64)
    yield rest[np.argsort(_scrambled(rest, key))][max(start - LANES * length, 0) :]


def _scrambled(places: Rows, key: int) -> NDArray[np.uint64]:
    """A pseudorandom number for each place, no two alike (SplitMix64's finaliser is a bijection)."""
    z = (places.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
