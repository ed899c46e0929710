"""Files that others wrote, read in one place: never waited for, bounded, and wrong in one line."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from nemo_aligner_diffusion.errors import AlignerError, printable

MAX_DOCUMENT_BYTES = 64 << 20  # of JSON or text; tokenizers and tables of weights have some 10 MB
UTF8_MARK = b"\xef\xbb\xbf"  # what some editors put before UTF-8
_LINE_BREAK = re.compile(rb"\r\n|\n|\r")


def open_regular(path: str | os.PathLike[str], buffering: int = -1) -> IO[bytes]:
    """Open for reading, but never wait: a FIFO or a device that has taken a file's place is an OSError, not a hang."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file")
    return open(descriptor, "rb", buffering=buffering)


def read_bytes(path: str | os.PathLike[str], most: int = MAX_DOCUMENT_BYTES) -> bytes:
    """A whole regular file.

    Raises:
        OSError: it cannot be read, or has more than ``most`` bytes.
    """
    with open_regular(path) as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes")
    return data


def decode_utf8(data: bytes) -> str:
    """Text without the byte order mark, or a ValueError that says where it went wrong and what to do."""
    try:
        return data.removeprefix(UTF8_MARK).decode()
    except UnicodeDecodeError as error:
        found = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
        raise ValueError(
            f"is not UTF-8: byte 0x{data[error.start]:02x} at position {error.start} ({data[:40]!r}…); expected UTF-8: "
            f"convert it, for example with iconv -f {found} -t utf-8"
        ) from error


def what_instead(start: bytes) -> str | None:
    """What a file with these first bytes is in place of what was wanted: a stand-in that a download left."""
    if start.startswith(b"version https://"):
        return "a Git LFS pointer, not the file itself; fetch that with git lfs pull"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page; download the file itself, not its page"
    return None


def text_lines(stream: IO[bytes], most: int) -> Iterator[tuple[int, bytes]]:
    """(offset, line) for lines that end as on Unix, Windows or old Macs; of one of more than ``most`` bytes, a part.

    That part has more than ``most`` bytes, too. Memory is bounded by it.
    """
    rest, offset, passing_over = b"", 0, False
    while chunk := stream.read(1 << 17):
        block = rest + chunk
        if block.endswith(b"\r"):  # a line feed may follow
            block += stream.read(1)
        start = 0
        for line_break in _LINE_BREAK.finditer(block):
            if not passing_over:
                yield offset + start, block[start : line_break.start()]
            passing_over = False
            start = line_break.end()
        rest, offset = block[start:], offset + start
        if passing_over or len(rest) > most:
            if not passing_over:
                yield offset, rest
            rest, offset, passing_over = b"", offset + len(rest), True
    if rest:
        yield offset, rest


def parse_json(data: bytes) -> Any:
    """A JSON document.

    Raises:
        ValueError: it is none, or nested too deeply; the message goes on after the file's name.
    """
    text = decode_utf8(data)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON ({printable(error)})") from error


def read_json(path: str | os.PathLike[str], error: type[AlignerError]) -> dict[str, Any]:
    """The JSON object in a file; whatever is wrong with it is an ``error`` that names the file."""
    try:
        content = parse_json(read_bytes(path))
    except OSError as problem:
        raise error(f"{Path(path)} cannot be read: {problem.strerror or problem}") from problem
    except ValueError as problem:
        raise error(f"{Path(path)} {problem}") from problem
    if not isinstance(content, dict):
        raise error(f"{Path(path)} holds a JSON {json_type(content)}; expected an object")
    return content


def json_type(value: object) -> str:
    """What JSON calls the type of a value."""
    names: dict[type, str] = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
