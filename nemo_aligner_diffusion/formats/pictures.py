"""Encoded pictures of other people, decoded in one place: upright, in 8 bits, bounded."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from nemo_aligner_diffusion.errors import printable

MAX_PICTURE_BYTES = 64 << 20
MAX_PICTURE_PIXELS = 1 << 26  # 8192 × 8192; a few kB of PNG can claim much more
FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # Pillow's name -> the usual suffix


def picture_format(data: bytes) -> str:
    """Pillow's name of a picture's format, from its header.

    Raises:
        ValueError: no JPEG, PNG or WebP, or larger than :data:`MAX_PICTURE_PIXELS`.
    """
    with _open(data) as picture:
        return str(picture.format)


def decode_picture(data: bytes) -> Image.Image:
    """The whole picture as RGB: turned as its EXIF orientation says, 16 bits scaled to 8, on white where transparent.

    Raises:
        ValueError: it cannot be decoded; the message does not name the place.
    """
    with _open(data) as picture:
        try:
            picture.load()
            upright = ImageOps.exif_transpose(picture)
            if upright.mode.startswith("I"):  # 16-bit grey, which Pillow's conversion to RGB clips at 255
                grey = np.asarray(upright).astype(np.float64) / 257
                upright = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
            if upright.has_transparency_data:
                rgba = upright.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
            return upright.convert("RGB")
        except Exception as error:  # truncated or damaged data: OSError, SyntaxError, struct.error, …
            raise ValueError(
                f"has a picture that cannot be read ({printable(error, 100) or type(error).__name__}); copy it again"
            ) from error


def picture_of(array: Any) -> Image.Image:
    """``(3, H, W)`` floats in [0, 1] as an RGB picture; values outside are clamped, NaN becomes black."""
    array = np.nan_to_num(np.asarray(array, dtype=np.float32), nan=0.0).clip(0.0, 1.0)
    return Image.fromarray(np.rint(array.transpose(1, 2, 0) * 255.0).astype(np.uint8))


def encode_png(picture: Image.Image) -> bytes:
    """PNG: what is read back is what was given."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def _open(data: bytes) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(data), formats=tuple(FORMATS))
    except Image.DecompressionBombError as error:
        raise ValueError(f"has a picture of more than {MAX_PICTURE_PIXELS:,} pixels, the most expected") from error
    except Exception as error:  # Pillow's own, and what damaged headers make its parsers raise
        start = f"it starts with {data[:12]!r}" if data else "it is empty"
        raise ValueError(f"has a picture that is no JPEG, PNG or WebP: {start}; encode it again") from error
    if picture.width * picture.height > MAX_PICTURE_PIXELS:
        raise ValueError(
            f"has a picture of {picture.width} × {picture.height} pixels; expected at most {MAX_PICTURE_PIXELS:,}"
        )
    return picture
