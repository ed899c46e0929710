"""The zip around the weights: bombs, overlaps, and tables of contents that say what is not so."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zipfile

from tests.fuzz.cases import category
from tests.fuzz.pickle_cases import GOOD, carrier, zip_of
from tests.fuzz.seeds import WEIGHTS, Seed

LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"


def _places(content: bytes, signature: bytes) -> list[int]:
    found, at = [], content.find(signature)
    while at >= 0:
        found.append(at)
        at = content.find(signature, at + 1)
    return found


def _packed(seed: Seed, weights: bytes) -> bytes:
    return seed.with_content(WEIGHTS, weights).pack()


@category("zip", hostile=True, weight=20)
def zip_bombs(drawn: random.Random) -> bytes:
    """Records that unpack to much, lie in each other, are countless, or say they are huge."""
    way = drawn.randrange(6)
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of duplicate names, which are the point
        if way == 0:
            with zipfile.ZipFile(
                stream, "w", drawn.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
            ) as target:
                target.writestr("archive/data.pkl", GOOD)
                target.writestr("archive/data/0", bytes(drawn.choice((1 << 16, 4 << 20))))
        elif way == 1:
            with zipfile.ZipFile(stream, "w") as target:
                for number in range(drawn.choice((8200, 20_000))):
                    target.writestr(f"archive/data/{number}", b"")
                target.writestr("archive/data.pkl", GOOD)
        elif way == 2:
            with zipfile.ZipFile(stream, "w") as target:
                for name in drawn.choice(
                    (
                        ("archive/data.pkl",) * 2,
                        ("a/data.pkl", "b/data.pkl"),
                        ("data.pkl",),
                        ("a/x.pkl",),
                        ("a/data.pkl/",),
                        ("a/data.pkl", "a/constants.pkl"),
                    )
                ):
                    target.writestr(name, GOOD)
        elif way == 3:
            with zipfile.ZipFile(stream, "w") as target:
                target.writestr("archive/data.pkl", GOOD + bytes(drawn.choice((2 << 20, 8 << 20))))
        else:
            content = bytearray(zip_of(GOOD, {str(n): bytes(4096) for n in range(20)}))
            for at in _places(content, CENTRAL)[1:]:
                if way == 4:  # every record's data begins where the first one's does
                    content[at + 42 : at + 46] = bytes(4)
                else:
                    huge = drawn.choice((0xFFFFFFFE, 0x7FFFFFFF, 1 << 20))
                    content[at + 20 : at + 28] = struct.pack("<II", huge, huge)
            stream.write(content)
    return _packed(carrier(drawn), stream.getvalue())


@category("zip", hostile=True, weight=10)
def names_that_readers_tell_apart(drawn: random.Random) -> bytes:
    """Python's reader tells names apart by case and beyond a NUL, torch's does not: two records under one name."""
    seed = carrier(drawn)
    with zipfile.ZipFile(io.BytesIO(seed.content(WEIGHTS))) as good:
        records = [(entry.filename, good.read(entry)) for entry in good.infolist()]
    name, content = drawn.choice(records)
    top, _, rest = name.partition("/")
    other = drawn.choice((f"{top}/{rest.upper()}", f"{top}/{rest.title()}", f"{name}\0", f"{name}\0.txt"))
    if other in dict(records):  # a number has no case
        other = f"{name}\0"
    records.insert(drawn.choice((0, len(records))), (other, drawn.choice((GOOD, content, bytes(len(content))))))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as target:
        for record, data in records:
            target.writestr(zipfile.ZipInfo(record.replace("\0", "N")), data)
    return _packed(seed, stream.getvalue().replace(other.replace("\0", "N").encode(), other.encode()))


@category("zip", hostile=False, weight=40)
def zip_fields(drawn: random.Random) -> bytes:
    """Random bytes in the headers of the real weights' zip."""
    seed = carrier(drawn)
    content = bytearray(seed.content(WEIGHTS))
    for _ in range(drawn.choice((1, 1, 2, 5))):
        signature, size = drawn.choice(
            ((LOCAL, 30), (CENTRAL, 46), (END, 22), (b"PK\x06\x06", 56), (b"PK\x06\x07", 20))
        )
        if places := _places(content, signature):
            at = drawn.choice(places) + drawn.randrange(4, size)
            value = drawn.choice((drawn.randbytes(1), drawn.randbytes(4), b"\xff" * 4, b"\xff" * 8, bytes(4)))
            content[at : at + len(value)] = value
    return _packed(seed, bytes(content))


@category("zip", hostile=False, weight=20)
def zip_ends(drawn: random.Random) -> bytes:
    """Cut, with a comment, with two ends, with something before the start."""
    seed = carrier(drawn)
    content = seed.content(WEIGHTS)
    other = zip_of(b"\x80\x02cos\nsystem\nX\x0c\0\0\0touch canary\x85R.")
    end = content[-22:]
    changed = drawn.choice(
        (
            content[: -drawn.randrange(1, 300)],
            content + bytes(drawn.randrange(1, 70_000)),
            content[:-2] + struct.pack("<H", 10) + b"a comment!",
            content[:-2] + struct.pack("<H", len(other)) + other,
            content + other,
            other + content,
            drawn.randbytes(50) + content,
            content + end,
            content[:-22] + other[-22:],
            content[:4] + other,
            b"PK\x03\x04" + end,
            b"PK\x03\x04" + bytes(100),
            b"PK\x03\x04PK\x06\x07" + struct.pack("<IQI", 0, 1 << 60, 1) + end,
        )
    )
    return _packed(seed, changed)


@category("zip", hostile=True, weight=10)
def strange_records(drawn: random.Random) -> bytes:
    """Names that climb, code beside the pickle, TorchScript, another byte order's mark, an unknown version."""
    records = {"0": bytes(16)}
    stream = io.BytesIO(zip_of(b"\x80\x02}X\x01\0\0\0aNs.", records))
    name = drawn.choice(
        (
            "../../evil",
            "/tmp/evil",
            "archive/../../evil",
            "archive/code/__torch__.py",
            "archive/constants.pkl",
            "archive\\..\\evil",
            "archive/data/" + "x" * 60_000,
        )
    )
    with zipfile.ZipFile(stream, "a") as target:
        target.writestr(name, b"open('canary', 'w')")
    return _packed(carrier(drawn), stream.getvalue())
