"""The samples of a webdataset shard: neighbouring members that share the name up to the first dot."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from nemo_aligner_diffusion.data.bad_samples import BadSamples
from nemo_aligner_diffusion.errors import printable
from nemo_aligner_diffusion.formats.tar import Member

DOTTED = (
    "because of a further dot in their names: the name up to its first dot is the sample's, and the rest says what "
    "the member is; rename them"
)
MET_AGAIN = (
    "because their sample had ended before: the members of a sample must be neighbours, as tar --sort=name writes them"
)


def split_name(name: str) -> tuple[str, str]:
    """(key, extension) at the first dot of the last part, as webdataset does; no key for hidden files."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    base, _, extension = last.partition(".")
    if not base or base.startswith("__") or name.startswith("__"):  # webdataset keeps its own notes under __names__
        return "", extension.lower()
    return folder + slash + base, extension.lower()


def shard_samples(
    path: Path, walk: Iterator[Member], most_bytes: Mapping[str, int], bad: BadSamples
) -> Iterator[tuple[str, dict[str, Member]]]:
    """(key, extension -> member) of each sample in ``walk``, which has read the data of acceptable members or none.

    Args:
        path: of the shard, for messages.
        most_bytes: the extensions that count, with the most bytes a member may have; others are no part of a sample.
        bad: decides about links, members that are too large or there twice; counts those that are passed over.
    """
    last, members, part = "", dict[str, Member](), 0
    met: dict[bytes, set[str]] = {}  # digests of keys: names may be long
    for member in walk:
        key, extension = split_name(member.name)
        if member.kind == "folder" or not key:
            continue
        if extension not in most_bytes:
            if extension.rpartition(".")[2] in most_bytes:
                bad.pass_over(DOTTED, f"{member.name!r} in {path}")
            continue
        if key != last or member.part != part:
            if members:
                yield last, members
            if member.part != part:  # archives strung together may count from 0 each
                met.clear()
            last, members, part = key, {}, member.part
            met_before = met.setdefault(hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=8).digest(), set())
            again = bool(met_before)
        name = f"{path}: member '{printable(member.name)}'"
        if extension in met_before:
            bad(f"{name} is there twice; expected a name of its own for every sample")
            continue
        met_before.add(extension)
        if again:
            bad.pass_over(MET_AGAIN, f"{member.name!r} in {path}")
        elif member.kind != "file":
            bad(f"{name} is a {member.kind}, not a file; expected the content itself (no link is followed)")
        elif member.size > most_bytes[extension]:
            bad(f"{name} has {member.size:,} bytes; expected at most {most_bytes[extension]:,}")
        else:
            members[extension] = member
    if members:
        yield last, members
