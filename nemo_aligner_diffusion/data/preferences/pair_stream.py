"""Preference pairs in the order of a stream: what batches for a reward and for a diffusion model have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from nemo_aligner_diffusion.data.bad_samples import BadSamples
from nemo_aligner_diffusion.data.preferences.shards import (
    MOMENTS,
    EncodedPair,
    PreferencePair,
    lost,
    only_texts_wanted,
    place_of,
    read_encoded_pair,
    read_pair,
    samples,
    samples_in,
    wanted,
)
from nemo_aligner_diffusion.data.sample_stream import SampleStream
from nemo_aligner_diffusion.data.shard_index import is_compressed
from nemo_aligner_diffusion.data.shards import tar_sample
from nemo_aligner_diffusion.data.spans import Span, SpanReader, checksum
from nemo_aligner_diffusion.errors import printable
from nemo_aligner_diffusion.formats.tar import Member

PICTURES, LATENTS = 0, 1  # tags in the index


class PairStream(SampleStream):
    """This rank's micro-batches of pairs; arguments, order and errors are those of :class:`.SampleStream`.

    What is wrong with prompt or label, and what is missing, is found when the index is made; what is wrong with the
    pictures under ``on_bad_sample="skip"`` as well, by decoding every one of them once in one process, else when their
    turn comes.
    """

    noun = "pair"

    @abstractmethod
    def content(self, pair: PreferencePair | EncodedPair) -> Any:
        """What a pair holds, decoded; raises ValueError where it is of no use: the message goes on after its name."""

    def passed_over(self, pair: PreferencePair | EncodedPair) -> str | None:
        """Why a pair that is all right is left out, if so."""
        return None

    def scan(self, file: Path, bad: BadSamples) -> Iterator[Span]:
        packed, thorough = is_compressed(file), bad.policy == "skip"
        read = wanted if packed or thorough else only_texts_wanted
        with closing(SpanReader([file])) as reader:
            for number, (key, members) in enumerate(samples(file, bad, read)):
                try:
                    pair = _pair(file, key, members)
                    if thorough:
                        self.content(pair)
                except ValueError as error:
                    bad(f"{file}: sample '{printable(key)}' {error}")
                    continue
                if why := self.passed_over(pair):
                    bad.pass_over(why, f"'{key}' in {file}", "pairs")
                    continue
                tag = LATENTS if isinstance(pair, EncodedPair) else PICTURES
                if packed:
                    name = key if len(key) < 80 and key.isascii() and key.isprintable() else f"{number:09d}"
                    data = tar_sample([(f"{name}.{end}", member.data or b"") for end, member in members.items()])
                    yield Span(0, len(data), checksum(data), tag, data)
                else:
                    start, size = place_of(members)
                    yield Span(start, size, checksum(reader.read(0, start, size, 0)) if thorough else 0, tag)

    def parse(self, data: bytes, tag: int, file: Path) -> tuple[PreferencePair | EncodedPair, Any]:
        bad = BadSamples(self.on_bad_sample)
        for key, members in samples_in(data, file, bad):
            try:
                pair = _pair(file, key, members)
                return pair, self.content(pair)
            except ValueError as error:
                bad(f"{file}: sample '{printable(key)}' {error}")
        raise lost(file)


def _pair(file: Path, key: str, members: dict[str, Member]) -> PreferencePair | EncodedPair:
    contents, origin = {end: member.data or b"" for end, member in members.items()}, f"{file}: {printable(key)}"
    return read_encoded_pair(contents, origin) if MOMENTS in contents else read_pair(contents, origin)
