"""What a VAE made of the two pictures of a pair: the ``.moments.safetensors`` member of a latent shard.

It holds one tensor, ``moments``, ``(2, 2, C, h, w)`` float32: of each picture the mean and the standard deviation of
the VAE's posterior, before any scaling. How it was made stands in the file's ``__metadata__``, as one JSON text, for
safetensors writes several entries in any order and equal pairs must give equal bytes.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass, fields
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_aligner_diffusion.errors import printable
from nemo_aligner_diffusion.formats.files import parse_json

VERSION = 1
MAX_HEADER_BYTES = 1 << 14  # ours has some 400
_KEY = "nemo_aligner_diffusion.moments"
_EXPECTED = "expected what nad-encode-latents writes; encode the pictures again"


@dataclass(frozen=True)
class Encoding:
    """How a pair was encoded.

    Attributes:
        vae: :func:`~nemo_aligner_diffusion.diffusion.network.latents.vae_fingerprint`.
        height, width: of the pictures that the VAE was given.
        crop, flip: of :class:`.PairSettings`.
        seed: that places of ``crop: random`` and ``flip`` were drawn from.
    """

    vae: str
    height: int
    width: int
    crop: str
    flip: bool
    seed: int
    version: int = VERSION


def write_moments(moments: Tensor, made: Encoding) -> bytes:
    """The member's content; ``moments`` ``(2, 2, C, h, w)``."""
    from safetensors.torch import save

    said = json.dumps(asdict(made), sort_keys=True)
    return save({"moments": moments.detach().float().cpu().contiguous()}, {_KEY: said})


def read_moments(data: bytes) -> tuple[Tensor, Encoding]:
    """``(2, 2, C, h, w)`` float32, finite, deviations not negative; and how it was made.

    Raises:
        ValueError: it is none; the message goes on after the sample's name.
    """
    try:
        (length,) = struct.unpack("<Q", data[:8])
        if not 0 < length <= MAX_HEADER_BYTES:
            raise ValueError(f"its header has {length:,} bytes")
        header = parse_json(data[8 : 8 + length])
        made = _encoding(header["__metadata__"][_KEY])
        entry = header["moments"]
        shape, (start, end) = entry["shape"], entry["data_offsets"]
    except (ValueError, TypeError, KeyError, struct.error) as error:
        said = printable(error, 100) if isinstance(error, ValueError) else "its header lacks an entry"
        raise ValueError(f"has moments that cannot be read ({said}); {_EXPECTED}") from error
    content = data[8 + length :]
    whole = isinstance(shape, list) and all(isinstance(side, int) and 0 < side < 1 << 16 for side in shape)
    if len(header) != 2 or entry.get("dtype") != "F32" or not whole or len(shape) != 5 or shape[:2] != [2, 2]:
        said = printable(f"{entry.get('dtype')} of the shape {shape}", 100)
        raise ValueError(f"has moments that are {said}; expected F32 of [2, 2, C, h, w]")
    if start != 0 or end != 4 * prod(shape) or len(content) != end:
        raise ValueError(f"has moments of {len(content):,} bytes where {4 * prod(shape):,} belong; {_EXPECTED}")
    values = np.frombuffer(content, "<f4").reshape(shape)
    if not np.isfinite(values).all():
        raise ValueError(f"has moments that are NaN or infinite; {_EXPECTED}")
    if (values[:, 1] < 0).any():
        raise ValueError(f"has moments with a negative standard deviation; {_EXPECTED}")
    return torch.from_numpy(values.astype(np.float32)), made


def _encoding(text: Any) -> Encoding:
    said = parse_json(text.encode()) if isinstance(text, str) else None
    if not isinstance(said, dict) or said.get("version") != VERSION:
        version = said.get("version") if isinstance(said, dict) else None
        raise ValueError(f"its format is version {printable(version, 20)}, not {VERSION}")
    kinds = {"str": str, "int": int, "bool": bool}
    for field in fields(Encoding):
        if type(said.get(field.name)) is not kinds[str(field.type)]:
            raise ValueError(f"its header says no {field.name}")
    return Encoding(**{field.name: said[field.name] for field in fields(Encoding)})
