"""Preferences between two pictures of a prompt, in webdataset shards.

A sample is four members that share the name up to the first dot. The names are the columns of Pick-a-Pic (Kirstain et
al., 2023, arXiv 2305.01569), whose layout NeMo-Aligner's reward training reads too::

    000000017.jpg_0    the two pictures, JPEG, PNG or WebP whatever the name says (png_0, webp_0, 0.jpg, 0.png, … are
    000000017.jpg_1    read as well)
    000000017.txt      the prompt, UTF-8
    000000017.label    1/0: the first was preferred; 0/1: the second; 0.5/0.5: a tie; any two shares of 1

In place of ``.txt`` or ``.label`` a ``.json`` member may hold ``prompt`` or ``caption``, and ``label_0`` (``label_1``
is its complement). Other members are passed over unread. Since prompts lie in ``.txt`` or ``.json``, preference shards
serve as prompt shards too. In place of the pictures, ``.moments.safetensors`` holds both as a VAE has encoded them
(:mod:`.latents`).

Imports neither torch nor webdataset: the writing tools start at once.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_aligner_diffusion.data.bad_samples import BadSamples
from nemo_aligner_diffusion.data.paths import is_text_file
from nemo_aligner_diffusion.data.prompt_files import MAX_JSON_BYTES, MAX_PROMPT_BYTES, PROMPT_KEYS, clean_prompt
from nemo_aligner_diffusion.data.shard_samples import shard_samples, split_name
from nemo_aligner_diffusion.data.shards import Sample, WrittenShards, write_sample_shards
from nemo_aligner_diffusion.errors import DataError, printable
from nemo_aligner_diffusion.formats.files import decode_utf8, parse_json
from nemo_aligner_diffusion.formats.pictures import FORMATS, MAX_PICTURE_BYTES, decode_picture, picture_format
from nemo_aligner_diffusion.formats.tar import ZERO_BLOCK, Member, walk_stream, walk_tar

DEFAULT_PAIRS_PER_SHARD = 1_000
MAX_LABEL_BYTES = 64
LABEL_TOLERANCE = 1e-4  # on the sum of a label's parts
MOMENTS = "moments.safetensors"
_PICTURE_NAMES = ("jpg", "jpeg", "png", "webp", "image", "img")
_SLOTS = {f"{name}_{slot}": slot for name in _PICTURE_NAMES for slot in (0, 1)}
_SLOTS |= {f"{slot}.{name}": slot for name in _PICTURE_NAMES for slot in (0, 1)}
_LIMITS = {"txt": MAX_PROMPT_BYTES + 2, "json": MAX_JSON_BYTES, "label": MAX_LABEL_BYTES}
_TEXTS = frozenset(_LIMITS)  # what says prompt and label
_LIMITS |= dict.fromkeys((*_SLOTS, MOMENTS), MAX_PICTURE_BYTES)


@dataclass(frozen=True)
class PreferencePair:
    """Two pictures of one prompt and which was preferred.

    Attributes:
        pictures: encoded (JPEG, PNG or WebP).
        prompt: what both were made from.
        label: share of the preference that each has; not negative, sum 1. Equal shares are a tie.
        origin: where it comes from, for messages.
    """

    pictures: tuple[bytes, bytes]
    prompt: str
    label: tuple[float, float]
    origin: str = ""


@dataclass(frozen=True)
class EncodedPair:
    """The same, of pictures that a VAE has encoded: ``moments`` is what :func:`.latents.read_moments` reads."""

    moments: bytes
    prompt: str
    label: tuple[float, float]
    origin: str = ""


def write_preference_shards(
    pairs: Iterable[PreferencePair],
    output: str | os.PathLike[str],
    samples_per_shard: int | None = None,
    overwrite: bool = False,
) -> WrittenShards:
    """Write ``output/preferences-0000.tar``, …: all of them complete under their names, or none.

    ``pairs`` is read once and streamed. Equal pairs give equal bytes. Naming and atomicity are those of
    :func:`nemo_aligner_diffusion.data.shards.write_prompt_shards`; a shard holds 1,000 pairs if not told otherwise.

    Raises:
        DataError: a pair is unusable (names it), or there is none.
        OutputError: ``output`` cannot be written, or holds such shards already and ``overwrite`` is not set.
    """
    each = DEFAULT_PAIRS_PER_SHARD if samples_per_shard is None else samples_per_shard
    return write_sample_shards(pair_members(pairs), output, "pair", each, None, False, "preferences", overwrite)


def pair_members(pairs: Iterable[PreferencePair]) -> Iterator[Sample]:
    """The members of each pair, named by its number."""
    for number, pair in enumerate(pairs):
        try:
            first, second = (picture_format(picture) for picture in pair.pictures)
            prompt, label = clean_prompt(pair.prompt).encode(), format_label(pair.label).encode()
        except ValueError as error:
            raise DataError(f"{pair.origin or f'pair {number}'} {error}") from error
        key = f"{number:09d}"
        yield [
            (f"{key}.{FORMATS[first]}_0", pair.pictures[0]),
            (f"{key}.{FORMATS[second]}_1", pair.pictures[1]),
            (f"{key}.txt", prompt),
            (f"{key}.label", label),
        ]


def read_preference_file(path: Path, bad: BadSamples, decode: bool = False) -> Iterator[PreferencePair]:
    """Yield the pairs of a shard in file order, one in memory at a time.

    Under ``skip`` an unusable pair costs itself; a damaged shard costs its rest.

    Args:
        bad: what to do about an unusable pair.
        decode: decode the pictures whole; else only their headers are looked at, and a damaged body is found by
            :func:`decode_picture`.

    Raises:
        DataError: something is unusable and ``bad`` says to stop. The message names file and member.
    """
    for key, members in samples(path, bad, wanted):
        try:
            contents = {extension: member.data or b"" for extension, member in members.items()}
            pair = read_pair(contents, f"{path}: {printable(key)}")
            for picture in pair.pictures:
                decode_picture(picture) if decode else picture_format(picture)
        except ValueError as error:
            bad(f"{path}: sample '{printable(key)}' {error}")
        else:
            yield pair


def place_of(members: Mapping[str, Member]) -> tuple[int, int]:
    """(first byte, bytes) of a sample in its uncompressed shard."""
    start = min(member.start for member in members.values())
    return start, max(member.end for member in members.values()) - start


def samples_in(data: bytes, path: Path, bad: BadSamples) -> Iterator[tuple[str, dict[str, Member]]]:
    """:func:`samples` of the bytes of :func:`place_of`; there is one if the shard is as it was."""
    return shard_samples(path, walk_stream(path, io.BytesIO(data + 2 * ZERO_BLOCK), None, wanted), _LIMITS, bad)


def lost(path: Path) -> DataError:
    return DataError(f"{path}: a sample lost its members since it was indexed; copy the shard again")


def samples(
    path: Path, bad: BadSamples, wanted: Callable[[str, str, int], bool]
) -> Iterator[tuple[str, dict[str, Member]]]:
    """(key, extension -> member) of each sample of a shard, with the data of those members that are ``wanted``.

    Raises:
        DataError: the shard is unusable, and ``bad`` says to stop.
    """
    try:
        count_before, found = bad.count, False
        if is_text_file(path):
            raise DataError(f"{path} is a text file; expected shards (.tar, .tar.gz) of preference pairs")
        for sample in shard_samples(path, walk_tar(path, wanted), _LIMITS, bad):
            found = True
            yield sample
        if not found and bad.count == count_before:
            raise DataError(
                f"{path} holds no preference pair; expected members such as 000.jpg_0, 000.jpg_1, 000.txt, 000.label"
            )
    except DataError as error:
        bad.shard(error)


def wanted(name: str, kind: str, size: int) -> bool:
    """Every member of a sample."""
    return kind == "file" and size <= _LIMITS.get(split_name(name)[1], -1)


def only_texts_wanted(name: str, kind: str, size: int) -> bool:
    """What says prompt and label; pictures and moments are left unread."""
    return split_name(name)[1] in _TEXTS and wanted(name, kind, size)


def read_pair(members: Mapping[str, bytes], origin: str) -> PreferencePair:
    """The pair of a sample's members by their extensions; nothing is decoded, so pictures may be empty.

    Raises:
        ValueError: a member is missing, or says no prompt or label; the message goes on after the sample's name.
    """
    pictures: list[bytes] = []
    for slot in (0, 1):
        there = [name for name in members if _SLOTS.get(name) == slot]
        if len(there) != 1:
            several = f"has {len(there)} members for picture {slot}" if there else f"lacks its picture {slot}"
            listed = ", ".join(f".{name}" for name in members)
            raise ValueError(f"{several} (it has {listed}); expected .jpg_0, .jpg_1, .txt and .label")
        pictures.append(members[there[0]])
    return PreferencePair((pictures[0], pictures[1]), *_prompt_and_label(members), origin)


def read_encoded_pair(members: Mapping[str, bytes], origin: str) -> EncodedPair:
    """The same of a sample with a member :data:`MOMENTS`."""
    return EncodedPair(members[MOMENTS], *_prompt_and_label(members), origin)


def _prompt_and_label(members: Mapping[str, bytes]) -> tuple[str, tuple[float, float]]:
    extra = _json(members["json"]) if "json" in members else {}
    if "txt" in members:
        try:
            prompt = clean_prompt(decode_utf8(members["txt"]))
        except ValueError as error:
            raise ValueError(f"has a .txt that {error}") from error
    else:
        text = next((extra[key] for key in PROMPT_KEYS if isinstance(extra.get(key), str)), None)
        if text is None:
            raise ValueError("lacks its prompt; expected a .txt member, or .json with a string prompt or caption")
        prompt = clean_prompt(text)
    if "label" in members:
        label = read_label(*members["label"].decode("utf-8", "replace").strip().split("/"))
    elif "label_0" in extra:
        label = read_label(extra["label_0"], extra.get("label_1"))
    else:
        raise ValueError("lacks its label; expected a .label member such as 1/0, or .json with label_0")
    return prompt, label


def _json(data: bytes) -> dict[str, Any]:
    try:
        content = parse_json(data)
    except ValueError as error:
        raise ValueError(f"has a .json that {error}") from error
    if not isinstance(content, dict):
        raise ValueError("has a .json that is no object; expected keys such as prompt and label_0")
    return content


def read_label(*shares: Any) -> tuple[float, float]:
    """Two shares of 1, given as numbers or text; of a single one the other is the complement.

    Raises:
        ValueError: they are no such shares; the message says what was expected, without naming the place.
    """
    given = [share for share in shares if share is not None]
    try:
        if any(isinstance(share, bool) for share in given):
            raise TypeError
        numbers = [float(share) for share in given]
        first, second = numbers if len(numbers) > 1 else (numbers[0], 1 - numbers[0])
    except (TypeError, ValueError, IndexError):
        written = "/".join(map(str, given))[:40]
        raise ValueError(f"has the label {written!r}; expected 1/0, 0/1, or 0.5/0.5 for a tie") from None
    if not (first >= 0 and second >= 0 and abs(first + second - 1) <= LABEL_TOLERANCE):  # nor NaN
        wrong = "has a share below 0" if min(first, second) < 0 else f"sums to {first + second:g}"
        raise ValueError(
            f"has the label {first:g}/{second:g}, which {wrong}; expected two shares of 1, such as 1/0, 0/1, or "
            "0.5/0.5 for a tie"
        )
    return first, second


def format_label(label: tuple[float, float]) -> str:
    """``1/0`` and the like, checked; reading it back gives the same numbers."""
    first, second = read_label(*label)
    return "/".join(f"{value:g}" if float(f"{value:g}") == value else repr(value) for value in (first, second))
