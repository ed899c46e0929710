"""Names, limits and the one form of error that the reader and the writer share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass

from nemo_aligner_diffusion.errors import ArchiveError

CONFIG_NAME = "model_config.yaml"
WEIGHTS_NAME = "model_weights.ckpt"
ARTIFACT_SCHEME = "nemo:"
# What save_nemo writes as nemo_version. In such archives an artifact's prefix is a digest of its content, which the
# reader checks; NeMo's own prefixes are random.
OUR_VERSION = "nemo_aligner_diffusion 1"
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What the reader accepts, in bytes and counts. Raise a field for an archive you trust.

    Those on what is parsed (configuration, pickle, records, members) keep a hostile file from taking more than about a
    second; the largest real archives stay a factor of three or more below each.
    """

    members: int = 4096
    config_bytes: int = 256 << 10
    artifact_bytes: int = 256 << 20
    ranks: int = 16  # tensor-parallel shards; they share the next two limits
    pickle_bytes: int = 2 << 20  # the structure of the state dict, without the numbers: about 250 bytes a tensor
    records: int = 8192  # files in the weights' zip: one a tensor, and a few more
    weights_bytes: int = 128 << 30
    name_characters: int = 512
    # A gzipped archive may unpack to gzip_ratio times its size (random weights reach about 4) or to gzip_floor_bytes.
    gzip_ratio: int = 64
    gzip_floor_bytes: int = 64 << 20


def archive_error(path: str | os.PathLike[str], found: str, remedy: str) -> ArchiveError:
    return ArchiveError(f"{os.fspath(path)}: the .nemo archive {found}. {remedy}")


def artifact_digest(content: bytes) -> str:
    """32 hexadecimal digits, as long as the prefix NeMo gives."""
    return hashlib.sha256(content).hexdigest()[:32]


def listing(names: Iterable[str], most: int = 6) -> str:
    """The first names in order, for a message."""
    ordered = sorted(names)
    return (", ".join(map(repr, ordered[:most])) + (", …" if len(ordered) > most else "")) or "nothing"
