"""The samples of a stream by their position, and what is put in the place of those that can no longer be read."""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING, Any

from nemo_aligner_diffusion.data.bad_samples import BadSampleError
from nemo_aligner_diffusion.data.epoch_order import EpochOrder
from nemo_aligner_diffusion.data.spans import SpanReader
from nemo_aligner_diffusion.errors import DataError

if TYPE_CHECKING:
    from nemo_aligner_diffusion.data.sample_stream import SampleStream

logger = logging.getLogger(__name__)

REPLACEMENT_TRIES = 1_000  # samples drawn in place of one that cannot be read, before giving up


class SampleReader:
    """Reads samples of ``stream`` by their global sample index; for one iteration in one process.

    Under ``on_bad_shard="skip"`` what became unreadable is replaced and counted, else it is an error.
    """

    def __init__(self, stream: SampleStream, worker: int | None = None) -> None:
        self.stream, self.index = stream, stream.index
        self.who = f"data rank {stream.rank}" + (f", worker {worker}" if worker is not None else "")
        self._spans = SpanReader(self.index.sources(stream.files))
        self._epoch = -1
        self._first, self._rows = 0, self.index.counts[:0]  # the block of the epoch's order that was used last
        self._lost: set[int] = set()  # files that something could not be read from
        self._replaced = 0

    def row(self, position: int) -> int:
        """The index's row of the sample at ``position`` of the stream."""
        epoch, place = divmod(position, len(self.index))
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, self._rows[:0]
            self._order = EpochOrder(
                self.index.counts, self.stream.seed, epoch, self.stream.shuffle_buffer, bool(self.index.unpacked)
            )
        if not 0 <= place - self._first < len(self._rows):
            self._first, self._rows = self._order.block(place)
        return int(self._rows[place - self._first])

    def sample(self, position: int) -> Any:
        """The sample at ``position``, or what replaces it."""
        row = self.row(position)
        # Every sample is tried, those of a lost file, too: what a rank gets must not depend on what it met before.
        try:
            return self._read(row)
        except DataError as error:
            if self.stream.on_bad_shard == "error" or isinstance(error, BadSampleError):
                raise DataError(f"{error} ({self.who}, sample {position} of the run)") from error
            self._lose(row, error)
        self._replaced += 1
        self.stream.replaced += 1
        draw = random.Random(f"{self.stream.seed}/{position}/replacement")
        for _ in range(REPLACEMENT_TRIES):
            other = draw.randrange(len(self.index))
            try:
                return self._read(other)
            except DataError as error:
                self._lose(other, error)
        raise DataError(
            f"{self.stream.named()}: {len(self._lost)} of {len(self.stream.files)} files have become unreadable and no "
            f"other sample was found in {REPLACEMENT_TRIES:,} tries ({self.who}); is the disk there?"
        )

    def end_epoch(self, epoch: int) -> None:
        """Count what was replaced since the last call."""
        if self._replaced:
            logger.warning(
                "epoch %d: replaced %d %ss of %d shards that became unreadable (%s)",
                epoch,
                self._replaced,
                self.stream.noun,
                len(self._lost),
                self.who,
            )
        self._replaced, self._lost = 0, set()

    def close(self) -> None:
        self._spans.close()

    def _read(self, row: int) -> Any:
        offset, size, crc, tag = self.index.records[row].item()
        file = self.index.file_of(row)
        return self.stream.parse(self._spans.read(file, offset, size, crc), tag, self.stream.files[file])

    def _lose(self, row: int, error: DataError) -> None:
        file = self.index.file_of(row)
        if file not in self._lost:
            self._lost.add(file)
            logger.warning("%s; what cannot be read is replaced by other %ss (%s)", error, self.stream.noun, self.who)
