"""Damage to the file as a whole, and tar and gzip tricks."""

from __future__ import annotations

import gzip
import random
import tarfile
from dataclasses import replace

import torch

from tests.fuzz.cases import any_seed, category
from tests.fuzz.pickle_cases import zip_of
from tests.fuzz.seeds import CONFIG, WEIGHTS, legacy_seed, seeds, torch_file

BLOCK = 512
EVIL_NAMES = (
    *("../evil", "./../evil", "a/../../evil", "/tmp/evil", "//tmp/evil", "..", "./..", "a/..", "~/../../evil", "/"),
    *("C:\\evil", "C:/evil", "..\\evil", "a\\..\\..\\evil", "\\\\host\\share", "ev\nil", "e\x1b[2Jvil"),
    *("./" * 100 + "../evil", "x" * 5000, "/".join(["d"] * 400), "\u202eevil", "evil\u2028", "....//evil/.."),
    *("./.../..", "/dev/shm/evil", "/proc/self/mem", "../../../../../../../../tmp/evil"),
)


# Damage


@category("damage", hostile=False, weight=20)
def truncated(drawn: random.Random) -> bytes:
    content = any_seed(drawn).pack()
    return content[: drawn.randrange(len(content))]


@category("damage", hostile=False, weight=30)
def flipped_bits(drawn: random.Random) -> bytes:
    content = bytearray(any_seed(drawn).pack())
    for _ in range(drawn.choice((1, 1, 2, 8, 64))):
        content[drawn.randrange(len(content))] ^= 1 << drawn.randrange(8)
    return bytes(content)


@category("damage", hostile=False, weight=20)
def random_bytes(drawn: random.Random) -> bytes:
    content = bytearray(any_seed(drawn).pack())
    length = drawn.choice((1, 4, 16, 512, 4096))
    start = drawn.randrange(len(content))
    content[start : start + length] = drawn.randbytes(length)
    return bytes(content)


@category("damage", hostile=False, weight=20)
def swapped_blocks(drawn: random.Random) -> bytes:
    content = bytearray(any_seed(drawn).pack())
    size = drawn.choice((16, 512, 512, 1024, 10_240))
    a, b = (drawn.randrange(max(len(content) // size, 1)) * size for _ in range(2))
    content[a : a + size], content[b : b + size] = content[b : b + size], content[a : a + size]
    return bytes(content)


@category("damage", hostile=False, weight=20)
def moved_blocks(drawn: random.Random) -> bytes:
    """Some bytes cut out, written twice, or overwritten with zeros."""
    content = any_seed(drawn).pack()
    size = drawn.choice((1, 100, 512, 1024, 5120))
    start = drawn.randrange(len(content))
    piece = content[start : start + size]
    changed = drawn.choice((b"", piece + piece, bytes(len(piece))))
    return content[:start] + changed + content[start + size :]


@category("damage", hostile=False)
def spliced(drawn: random.Random) -> bytes:
    """The beginning of one archive and the end of another."""
    first, second = any_seed(drawn).pack(), any_seed(drawn).pack()
    return (
        first[: drawn.randrange(len(first) // BLOCK) * BLOCK] + second[drawn.randrange(len(second) // BLOCK) * BLOCK :]
    )


@category("damage", hostile=True)
def no_archive(drawn: random.Random) -> bytes:
    size = drawn.choice((0, 1, 2, 3, 511, 512, 513, 1024, 100_000))
    start = drawn.choice(
        (b"", b"\x1f\x8b", b"\x1f\x8b\x08\x00", b"PK\x03\x04", b"<html>", b"\x80\x02", b"ustar", b"\0" * 512)
    )
    return start + (bytes(size) if drawn.random() < 0.3 else drawn.randbytes(size))


# Headers


@category("tar", hostile=False, weight=30)
def header_fields(drawn: random.Random) -> bytes:
    """Random bytes in fields of a header whose checksum is made right again."""
    content = bytearray(replace(any_seed(drawn), gzipped=False).pack())
    starts = [at for at in range(0, len(content) - BLOCK, BLOCK) if content[at + 257 : at + 262] == b"ustar"]
    for _ in range(drawn.choice((1, 1, 3))):
        at = drawn.choice(starts)
        field, size = drawn.choice(
            (
                (0, 100),
                (100, 8),
                (108, 8),
                (116, 8),
                (124, 12),
                (124, 12),
                (136, 12),
                (156, 1),
                (157, 100),
                (257, 8),
                (345, 155),
            )
        )
        value = drawn.choice(
            (drawn.randbytes(size), bytes(size), b"7" * size, b"\xff" * size, b"\x80" + b"\xff" * (size - 1))
        )
        if drawn.random() < 0.5:
            value = value[: drawn.randrange(size) + 1]
        content[at + field : at + field + len(value)] = value
        _checksum(content, at)
    return bytes(content)


def _checksum(content: bytearray, at: int) -> None:
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + BLOCK])


def _header(
    name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "", form: int = tarfile.GNU_FORMAT
) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info.tobuf(form, errors="surrogateescape")


def _raw(kind: bytes, body: bytes, declared: int | None = None, name: str = "././@LongLink") -> bytes:
    """An extension header with a body, whatever size it declares."""
    return _header(name, len(body) if declared is None else declared, kind) + body + bytes(-len(body) % BLOCK)


def _put_first(drawn: random.Random, extra: bytes) -> bytes:
    """``extra``, in tar's own bytes, before the members of a good archive or after them."""
    content = replace(any_seed(drawn), gzipped=False, folder_entry=False).pack()
    if drawn.random() < 0.5:
        return extra + content
    end = len(content.rstrip(b"\0"))
    end += -end % BLOCK
    return content[:end] + extra + bytes(2 * BLOCK)


@category("tar", hostile=True)
def names_that_climb(drawn: random.Random) -> bytes:
    name = drawn.choice(EVIL_NAMES)
    seed = any_seed(drawn)
    form = drawn.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))
    if drawn.random() < 0.5:
        return seed.with_members((name, b"evil")).pack(format_=form)
    at = drawn.randrange(len(seed.members))
    members = [(name, c) if number == at else (m, c) for number, (m, c) in enumerate(seed.members)]
    return replace(seed, members=tuple(members)).pack(format_=form)


@category("tar", hostile=True)
def links(drawn: random.Random) -> bytes:
    kind = drawn.choice((tarfile.SYMTYPE, tarfile.LNKTYPE))
    link = drawn.choice(
        ("/etc/passwd", "../../evil", CONFIG, f"./{WEIGHTS}", "/tmp", "/dev/zero", ".", "/proc/self/environ", "loop")
    )
    name = drawn.choice(("loop", "./link", "sub", f"./{CONFIG}", WEIGHTS))
    extra = _header(name, drawn.choice((0, 0, 4, 1 << 33)), kind, link)
    if drawn.random() < 0.5:  # and a file "inside" the link
        extra += _header(f"{name}/evil", 4) + b"evil".ljust(BLOCK, b"\0")
    return _put_first(drawn, extra)


@category("tar", hostile=True)
def special_files(drawn: random.Random) -> bytes:
    kind = drawn.choice(
        (
            tarfile.CHRTYPE,
            tarfile.BLKTYPE,
            tarfile.FIFOTYPE,
            tarfile.GNUTYPE_SPARSE,
            b"D",
            b"M",
            b"V",
            b"N",
            b"Z",
            b"\xff",
            b"A",
        )
    )
    return _put_first(
        drawn, _header(drawn.choice(("device", CONFIG, "x")), drawn.choice((0, 512)), kind) + bytes(BLOCK)
    )


@category("tar", hostile=True)
def huge_sizes(drawn: random.Random) -> bytes:
    """A member that says it has gigabytes: in octal, in base 256, negative, or in a pax record."""
    name = drawn.choice((f"./{CONFIG}", "x", WEIGHTS, "0123_vocab.json"))
    header = bytearray(_header(name, 1))
    way = drawn.randrange(4)
    if way == 0:
        header[124:136] = b"%011o\0" % drawn.choice((8**11 - 1, 1 << 32, (1 << 33) - 1))
    elif way == 1:
        header[124:136] = b"\x80" + drawn.choice((1 << 34, 1 << 40, 1 << 63, (1 << 88) - 1)).to_bytes(11, "big")
    elif way == 2:
        header[124:136] = b"\xff" + drawn.choice((b"\xff" * 11, bytes(11), drawn.randbytes(11)))
    _checksum(header, 0)
    extra = bytes(header) + b"x".ljust(BLOCK, b"\0")
    if way == 3:
        size = drawn.choice((1 << 33, 1 << 63, 10**30, 10**4400, -1, -(10**20)))
        digits = str(size) if size < 10**100 else "9" * 4400
        extra = _raw(tarfile.XHDTYPE, _record("size", digits)) + extra
        if size > 10**19 or size < 0:  # no size at all: ignored, and the member of one byte is a stranger
            extra += _header("../climbs", 0)
    return extra + replace(any_seed(drawn), gzipped=False).pack()


def _record(key: str, value: str) -> bytes:
    text = f" {key}={value}\n".encode("utf-8", "surrogateescape")
    length = len(text)
    while len(str(length)) + len(text) != length:
        length = len(str(length)) + len(text)
    return str(length).encode() + text


@category("tar", hostile=False)
def pax_tricks(drawn: random.Random) -> bytes:
    """Paths, link targets, character sets, sparse maps and nonsense in pax headers, of one member or of all."""
    choices = [
        _record("path", drawn.choice(EVIL_NAMES)),
        _record("linkpath", "/etc/passwd"),
        _record("hdrcharset", "BINARY"),
        _record("GNU.sparse.major", "1")
        + _record("GNU.sparse.minor", "0")
        + _record("GNU.sparse.realsize", str(1 << 40)),
        _record("GNU.sparse.map", "0,1," * 1000) + _record("GNU.sparse.size", str(1 << 50)),
        _record("GNU.sparse.name", "/tmp/evil"),
        _record("comment", "x" * drawn.choice((10, 60_000, 900_000))),
        b"1" * drawn.choice((100, 100_000, 1_000_000)),
        b"0 a=b\n" * 10,
        b"99999 path=x\n",
        b"6 a=b\n" * drawn.choice((10, 10_000, 170_000)),
        b"-5 path=x\n",
        "٣ a=b\n".encode(),
        drawn.randbytes(300),
        b"",
        b" " * 5000,
        b"12 path=\xff\xfe\n",
    ]
    kind = drawn.choice((tarfile.XHDTYPE, tarfile.XGLTYPE, b"X"))
    body = drawn.choice(choices)
    declared = drawn.choice((None, None, None, 1 << 20, (1 << 20) + 1, 1 << 32, 0))
    return _put_first(drawn, _raw(kind, body, declared, "pax"))


@category("tar", hostile=False)
def gnu_long_names(drawn: random.Random) -> bytes:
    body = drawn.choice(
        [name.encode() for name in EVIL_NAMES] + [b"", b"x" * 900_000, b"\0" * 600, drawn.randbytes(200), b"a"]
    )
    kind = drawn.choice((tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK))
    declared = drawn.choice((None, None, 0, 1 << 21, 1 << 33))
    return _put_first(drawn, _raw(kind, body, declared) * drawn.choice((1, 2, 50)))


@category("tar", hostile=True, weight=2)
def chained_extension_headers(drawn: random.Random) -> bytes:
    """Thousands of headers that each announce the next: recursion in some readers, time in others."""
    kind = drawn.choice((tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK))
    body = drawn.choice((b"", b"x", b"6 a=b\n" * 80, b"6 a=b\n" * 80_000))
    unit = _raw(kind, body)
    return gzip.compress(unit * ((12 << 20) // len(unit)) + seeds()["clip"].pack(), 1, mtime=0)


@category("tar", hostile=True)
def sparse_files(drawn: random.Random) -> bytes:
    """GNU's old sparse format: a map in the header, gigabytes of nothing."""
    header = bytearray(_header(drawn.choice((f"./{CONFIG}", "big")), 512, tarfile.GNUTYPE_SPARSE))
    for entry in range(4):
        at = 386 + 24 * entry
        header[at : at + 24] = b"%011o\0%011o\0" % (drawn.randrange(8**11), drawn.randrange(8**11))
    header[482] = drawn.randrange(2)  # another block of map follows
    header[483:495] = b"%011o\0" % (8**11 - 1)
    _checksum(header, 0)
    return _put_first(drawn, bytes(header) + bytes(BLOCK * drawn.choice((1, 2, 5))))


@category("tar", hostile=True)
def duplicate_members(drawn: random.Random) -> bytes:
    seed = any_seed(drawn)
    name, content = drawn.choice(seed.members)
    spelling = drawn.choice((name, f"./{name}", f".//{name}", name.removeprefix("./"), f"././{name}", f"./{name}/"))
    if spelling.endswith("/"):  # a folder of that name: then the file again, so that it counts as twice
        spelling = spelling.rstrip("/") + "/."
    return seed.with_members((spelling, drawn.choice((content, b"", b"target: os.system\n")))).pack()


@category("tar", hostile=True, weight=2)
def many_members(drawn: random.Random) -> bytes:
    count = drawn.choice((4097, 6000, 20_000, 100_000))
    kind = drawn.choice((tarfile.REGTYPE, tarfile.DIRTYPE))
    blocks = b"".join(_header(f"m{number}", 0, kind) for number in range(count))
    return gzip.compress(blocks + seeds()["clip"].pack(), 1, mtime=0)


@category("tar", hostile=True)
def model_parallel(drawn: random.Random) -> bytes:
    """Ranks that are no tensor-parallel shards of one model, or very many; or a distributed checkpoint."""
    seed = seeds()["megatron_rank"]
    if drawn.random() < 0.3:
        weights = drawn.choice((seed.content(WEIGHTS)[:5000], zip_of(b"\x80\x02}."), torch_file({"a": torch.zeros(1)})))
        names = (f"mp_rank_{rank:02d}/{WEIGHTS}" for rank in range(1, drawn.choice((3, 17, 1000))))
        return seed.with_members(*((name, weights) for name in names)).pack()
    extra = drawn.choice(
        ("mp_rank_01/model_weights.ckpt", "model_weights/__0_0.distcp", "tp_rank_01_pp_rank_000/model_weights.ckpt")
    )
    return seed.with_members((extra, seed.content(WEIGHTS))).pack()


# gzip


@category("gzip", hostile=True, weight=1)
def gzip_bombs(drawn: random.Random) -> bytes:
    """Hundreds of megabytes out of some kilobytes: of nothing, of a good archive and then nothing, inside a member."""
    way = drawn.randrange(4)
    if way == 0:
        return gzip.compress(bytes(drawn.choice((70, 200)) << 20), 1, mtime=0)
    if way == 1:
        return gzip.compress(seeds()["clip"].pack() + bytes(80 << 20), 1, mtime=0)
    name = drawn.choice((f"./{CONFIG}", f"./{WEIGHTS}", "./0123abcd_vocab.json"))
    bomb = bytes(drawn.choice((70, 80, 100)) << 20)  # beyond the floor: an archive may unpack to 64 MiB
    if way == 2:
        return gzip.compress(seeds()["megatron"].with_content(name.removeprefix("./"), bomb).pack(), 1, mtime=0)
    return gzip.compress(_header(name, len(bomb)) + bomb + seeds()["clip"].pack(), 1, mtime=0)


@category("gzip", hostile=True)
def nested_gzip(drawn: random.Random) -> bytes:
    content = seeds()["clip"].pack()
    for _ in range(drawn.choice((2, 3, 20))):
        content = gzip.compress(content, 1, mtime=0)
    return content


@category("gzip", hostile=True, weight=2)
def strings_of_gzip(drawn: random.Random) -> bytes:
    """Very many empty gzip files one after the other, each of 20 bytes."""
    empty = gzip.compress(b"", 1, mtime=0)
    return empty * drawn.choice((100, 10_000, 200_000)) + gzip.compress(seeds()["clip"].pack(), 1, mtime=0)


@category("gzip", hostile=False)
def gzip_trailers(drawn: random.Random) -> bytes:
    """Garbage or padding after the end, wrong checksums and lengths, optional header fields."""
    content = bytearray(seeds()["clip_gzipped"].pack())
    way = drawn.randrange(4)
    if way == 0:
        return bytes(content) + drawn.choice(
            (drawn.randbytes(20), bytes(1000), b"\x1f\x8b", b"\x1f\x8b\x08\x00" + bytes(30))
        )
    if way == 1:
        content[-drawn.randrange(1, 9)] ^= 0xFF
    elif way == 2:
        content[3] = drawn.randrange(256)
    else:
        half = len(content) // 2
        return gzip.compress(seeds()["clip"].pack()[:half], mtime=0) + gzip.compress(
            seeds()["clip"].pack()[half:], mtime=0
        )
    return bytes(content)


@category("gzip", hostile=True)
def archive_in_archive(drawn: random.Random) -> bytes:
    inner = any_seed(drawn).pack()
    name = drawn.choice((CONFIG, WEIGHTS))
    return any_seed(drawn).with_content(name, inner).pack()


@category("damage", hostile=True)
def legacy_weights(drawn: random.Random) -> bytes:
    """PyTorch's format of before 1.6, whole or spoilt: named as such, never unpickled."""
    seed = legacy_seed()
    weights = bytearray(seed.content(WEIGHTS))
    for _ in range(drawn.choice((0, 1, 10))):
        weights[drawn.randrange(2000)] = drawn.randrange(256)
    return seed.with_content(WEIGHTS, bytes(weights[: drawn.choice((len(weights), 100, 3000))])).pack()
