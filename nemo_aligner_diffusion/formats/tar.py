"""A walk through the members of a tar file: forward only, bounded in memory, exact about what is wrong.

The standard ``tarfile`` reads extension headers of any size into memory, takes a file cut at a block boundary for a
whole one, does not check the checksum of a gzip stream, and takes several times as long; every rank walks every
compressed shard (``sample_stream.py`` says why), so all four matter here. Format: POSIX.1-1988 (ustar), POSIX.1-2001
(pax), GNU long names.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from nemo_aligner_diffusion.errors import DataError, printable
from nemo_aligner_diffusion.formats.files import open_regular, what_instead

BLOCK = 512  # bytes; headers are one block, data is padded to whole blocks
MAX_EXTENSION_BYTES = 1 << 20  # a pax or GNU long-name header; real ones hold a path
MAX_NUMBER_DIGITS = 19  # of a decimal size in a pax record: 2**63 has as many
MAX_PADDING_BYTES = 64 << 20  # zeros after the end marker; tar pads to 10 KiB, or to what its -b says
ZERO_BLOCK = bytes(BLOCK)
GZIP_MAGIC = b"\x1f\x8b"
REGULAR = b"0\x007"  # type flags of regular files; 7 is "contiguous", the same to a reader
PAX_LOCAL, PAX_GLOBAL, GNU_LONG_NAME, GNU_LONG_LINK = b"x", b"g", b"L", b"K"


class Member(NamedTuple):
    """One member: ``kind`` is "file", "folder", "link" or "other"; ``data`` is None unless it was asked for.

    In the (decompressed) stream its headers, extensions included, begin at byte ``start`` and its data at ``offset``.
    ``part`` counts archives strung together in one file, from 0.
    """

    name: str
    kind: str
    size: int
    data: bytes | None
    start: int
    offset: int
    part: int

    @property
    def end(self) -> int:
        """The byte after its data and padding: where the next member starts."""
        return self.offset + -(-self.size // BLOCK) * BLOCK


def walk_tar(path: Path, wanted: Callable[[str, str, int], bool]) -> Iterator[Member]:
    """Yield every member of a plain or gzipped tar in order; read the data of those that ``wanted(name, kind, size)``.

    Archives strung together (``cat a.tar b.tar``) are read on through all of them.

    Memory is bounded by the largest member that ``wanted`` accepts. Links are reported, never followed; nothing is
    written to disk.

    Raises:
        DataError: the file is no tar, is damaged, or ends before its end-of-archive marker.
    """
    try:
        with open_regular(path, buffering=1 << 15) as raw:
            if raw.read(2) == GZIP_MAGIC:
                raw.seek(0)
                with gzip.GzipFile(fileobj=raw, mode="rb") as stream:
                    yield from walk_stream(path, stream, None, wanted)  # type: ignore[arg-type]
            else:
                raw.seek(0)
                yield from walk_stream(path, raw, os.fstat(raw.fileno()).st_size, wanted)
    except EOFError as error:
        raise _truncated(path, "its gzip stream has no end") from error
    except (zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged: its gzip stream does not decompress ({error}); copy it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def walk_stream(
    path: Path,
    stream: IO[bytes],
    file_size: int | None,
    wanted: Callable[[str, str, int], bool],
    most_header_blocks: int | None = None,
    single: bool = False,
) -> Iterator[Member]:
    """:func:`walk_tar` over an open stream; ``path`` is named in errors.

    Args:
        file_size: bytes in the stream; None for a compressed one, whose length nobody knows before its end.
        wanted: called with the stream at the first byte of the member's data.
        most_header_blocks: a tar whose headers, extensions included, take more blocks is refused; None: any number.
        single: nothing but zeros may follow the end marker, where other readers stop.
    """
    last = ""  # the last complete member, for error messages
    part = padding = 0
    long_name: str | None = None
    long_size: int | None = None
    sparse = False
    header_blocks = 0
    end = stream.tell()
    while True:
        header = stream.read(BLOCK)
        if header == ZERO_BLOCK:
            padding += BLOCK
            if padding > MAX_PADDING_BYTES:
                raise DataError(f"{path}: more than {MAX_PADDING_BYTES:,} zeros follow its end marker; is it whole?")
            continue
        if padding:
            if not header.strip(b"\0"):  # the end of the file; for gzip, its checksum has been compared here
                return
            if single or len(header) < BLOCK or not _checksum_is_right(header):
                raise DataError(
                    f"{path}: something that is no tar header follows the end marker {_after(last)}; cut it "
                    "off, or write the file again"
                )
            end, part, padding = end + padding, part + 1, 0
            long_name, long_size, sparse = None, None, False
        header_blocks += 1
        if most_header_blocks is not None and header_blocks > most_header_blocks:
            raise DataError(
                f"{path} has more than {most_header_blocks:,} blocks of tar headers: it is hostile or no tar"
            )
        if len(header) < BLOCK:
            if header and not last:
                raise _not_a_tar(path, header)
            raise _truncated(
                path, f"it stops after member '{last}' without an end marker" if last else "it holds nothing"
            )
        if not _checksum_is_right(header):
            if not last and long_name is None:
                raise _not_a_tar(path, header)
            raise _damaged(path, last, "no valid tar header there")
        kind_flag, size = header[156:157], _number(header[124:136])
        if size < 0:
            raise _damaged(path, last, f"a member of {size} bytes")

        if kind_flag in (PAX_LOCAL, PAX_GLOBAL, GNU_LONG_NAME, GNU_LONG_LINK):
            if size > MAX_EXTENSION_BYTES:
                raise _damaged(
                    path, last, f"a tar extension header of {size:,} bytes (at most {MAX_EXTENSION_BYTES:,})"
                )
            header_blocks += size // BLOCK
            body = _read_data(path, stream, size, last)
            if kind_flag == GNU_LONG_NAME:
                long_name = _text(body)
            elif kind_flag == PAX_LOCAL:
                try:
                    records = _pax_records(body)
                    long_size = _pax_size(records["size"]) if "size" in records else long_size
                except ValueError as error:
                    raise _damaged(path, last, str(error)) from error
                long_name = records.get("path", long_name)
                sparse = any(keyword.startswith("GNU.sparse.") for keyword in records)
            continue

        name = _text(header[:100])
        is_posix = header[257:262] == b"ustar" and header[263:265] == b"00"  # GNU's keep times in the prefix's place
        if is_posix and header[345:346] != b"\0":
            name = f"{_text(header[345:500])}/{name}"
        name = long_name if long_name is not None else name
        size = long_size if long_size is not None else size
        long_name = long_size = None

        kind = {b"5": "folder", b"1": "link", b"2": "link"}.get(kind_flag, "file" if kind_flag in REGULAR else "other")
        if sparse:  # its data is a map of holes before the content
            kind, sparse = "other", False
        if kind == "file" and name.endswith("/"):  # how tar said "folder" before 1988
            kind = "folder"
        if kind in ("folder", "link"):
            size = 0  # whatever their size field says, no data follows
        offset = stream.tell()
        data = _read_data(path, stream, size, name) if wanted(name, kind, size) else None
        if data is None:
            _skip_data(path, stream, size, name, file_size)
        member = Member(name, kind, size, data, end, offset, part)
        yield member
        last, end = printable(name), member.end


def _checksum_is_right(header: bytes) -> bool:
    try:
        stored = int(header[148:156].strip(b" \0") or b"0", 8)
    except ValueError:
        return False
    return stored == sum(header) - sum(header[148:156]) + 8 * ord(" ")


def _number(field: bytes) -> int:
    """An octal number, or GNU's base-256 for what octal cannot hold; -1 for neither."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big", signed=field[0] == 0xFF)
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        return -1


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _read_data(path: Path, stream: IO[bytes], size: int, name: str) -> bytes:
    padded = -(-size // BLOCK) * BLOCK
    data = stream.read(padded)
    if len(data) < padded:
        raise _truncated(
            path, f"it stops inside member '{printable(name)}' ({len(data):,} of {padded:,} bytes are there)"
        )
    return data[:size]


def _skip_data(path: Path, stream: IO[bytes], size: int, name: str, file_size: int | None) -> None:
    left = -(-size // BLOCK) * BLOCK
    if file_size is not None:
        if stream.tell() + left > file_size:
            raise _truncated(path, f"it stops inside member '{printable(name)}'")
        stream.seek(left, os.SEEK_CUR)
        return
    while left:
        chunk = stream.read(min(left, 1 << 20))
        if not chunk:
            raise _truncated(path, f"it stops inside member '{printable(name)}'")
        left -= len(chunk)


def _pax_records(body: bytes) -> dict[str, str]:
    """Records ``"<length> <keyword>=<value>\\n"``, the length counting itself; ValueError for anything else."""
    records: dict[str, str] = {}
    start, end_of_records = 0, len(body.rstrip(b"\0"))
    while start < end_of_records:  # by position: cutting the front off each time would copy the rest each time
        blank = body.find(b" ", start, start + 10)
        digits = body[start:blank] if blank > start else b""
        end = start + (int(digits) if digits.isdigit() else 0)
        # A record ends with its line break, beyond its blank: every turn of this loop goes on in the body.
        whole = start < blank < end - 1 and body[end - 1 : end] == b"\n"
        keyword, equals, value = body[blank + 1 : end - 1].partition(b"=") if whole else (b"", b"", b"")
        if not equals:
            raise ValueError("a pax header that cannot be read")
        records[keyword.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        start = end
    return records


def _pax_size(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= MAX_NUMBER_DIGITS):
        raise ValueError(f"its pax header gives the size '{printable(text, 40)}'")
    return int(text)


def _damaged(path: Path, last: str, what: str) -> DataError:
    return DataError(f"{path} is damaged {_after(last)}: {what}; copy or write it again")


def _after(last: str) -> str:
    return f"after member '{last}'" if last else "at its beginning"


def _truncated(path: Path, where: str) -> DataError:
    return DataError(f"{path} is truncated: {where}; was the copy interrupted? Copy or write the shard again")


def _not_a_tar(path: Path, start: bytes) -> DataError:
    if instead := what_instead(start):
        return DataError(f"{path} is not a tar archive, but {instead}")
    return DataError(
        f"{path} is not a tar archive: it starts with {start[:16]!r}; expected a shard (.tar, .tar.gz, .tgz) or a file "
        "named *.txt with one prompt a line"
    )
