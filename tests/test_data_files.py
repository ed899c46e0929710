"""What is read from shards and text files, and the one message for each thing that can be wrong with them."""

from __future__ import annotations

import gzip
import io
import json
import logging
import random
import tarfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny.prompts import ODD_PROMPTS, prompts_of, tar

from nemo_aligner_diffusion.data.bad_samples import BadSamples
from nemo_aligner_diffusion.data.prompt_files import MAX_PROMPT_BYTES, clean_prompt, locate_prompts, parse_prompt
from nemo_aligner_diffusion.data.prompts import build_prompt_loader, read_prompts
from nemo_aligner_diffusion.errors import DataError
from nemo_aligner_diffusion.formats.tar import walk_tar


def read(path: Path, bad: BadSamples | None = None) -> list[str]:
    return [located.prompt for located in locate_prompts(path, bad or BadSamples("error"))]


def error_of(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_txt_members(tmp_path: Path, mode: str) -> None:
    members = {f"./{number:04d}.txt": text for number, text in enumerate(ODD_PROMPTS)}
    assert read(tar(tmp_path / "s.tar", members, mode)) == ODD_PROMPTS  # by content, not by the name of the file


def test_json_members(tmp_path: Path) -> None:
    members = {
        "0.json": json.dumps({"caption": "c", "score": 1}),
        "1.json": json.dumps({"caption": "c", "prompt": 'p "1"'}),
        "2.json": "\ufeff" + json.dumps({"prompt": ODD_PROMPTS[4]}, ensure_ascii=True),
        "3.JSON": json.dumps({"prompt": "capital\n"}),
    }
    assert read(tar(tmp_path / "s.tar", members)) == ["c", 'p "1"', ODD_PROMPTS[4], "capital"]


def test_image_shards(tmp_path: Path) -> None:
    """As img2dataset writes them: picture, text and metadata under one key give one prompt; notes and folders none."""
    members = {
        "__notes__/x.txt": "note",
        "a.jpg": random.Random(0).randbytes(3000),
        "a.txt": "from txt\r\n",
        "a.json": '{"prompt": "from json"}',
        "b.png": b"",
        "b.json": '{"caption": "b"}',
        "b.negative.txt": "blurry",
        "folder/c.txt": "c\n",
        "._d.txt": b"\xff Apple's",
    }
    for mode in ("w", "w:gz"):
        assert read(tar(tmp_path / "s.tar", members, mode)) == ["from txt", "b", "c"]


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_in_every_tar_format(tmp_path: Path, format_: int) -> None:
    members = {f"{'folder/' * 20}{number}.txt": f"p{number}" for number in range(3)}
    if format_ != tarfile.USTAR_FORMAT:
        members = {f"{'é' * 150}{number}.txt": f"p{number}" for number in range(3)}
    path = tar(tmp_path / "s.tar", members, format=format_)
    assert [member.name for member in walk_tar(path, lambda *_: False)] == list(members)
    assert read(path) == ["p0", "p1", "p2"]


def test_walk_agrees_with_the_standard_library(tmp_path: Path) -> None:
    numbers = random.Random(1)
    members = {f"{number}.bin": numbers.randbytes(numbers.choice([0, 1, 511, 512, 513, 2000])) for number in range(60)}
    for mode in ("w", "w:gz"):
        path = tar(tmp_path / "s.tar", members, mode)
        assert {m.name: m.data for m in walk_tar(path, lambda *_: True)} == members


def test_text_files(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(ODD_PROMPTS).encode())
    assert read(path) == ODD_PROMPTS
    path.write_bytes(b"one\r\ntwo \r\n\n  \n\n")  # empty lines at the end of a file are nothing
    assert read(path) == ["one", "two "]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_cleaning_is_idempotent_and_keeps_the_text(text: str) -> None:
    if not text.strip():
        with pytest.raises(ValueError, match="is an empty prompt"):
            clean_prompt(text)
        return
    cleaned = clean_prompt(text)
    assert clean_prompt(cleaned) == cleaned
    assert text.startswith(cleaned)
    assert set(text[len(cleaned) :]) <= {"\r", "\n"}


@pytest.mark.parametrize(
    ("members", "parts"),
    [
        ({}, ["holds no prompt: found nothing", "expected .txt"]),
        ({"a.jpg": "x", "b.jpg": "x", "Makefile": "x"}, ["holds no prompt: found 2 .jpg, 1 without extension"]),
        ({"a.txt": "ok", "b.txt": " \n"}, ["'b.txt' is an empty prompt"]),
        ({"a.txt": b"caf\xe9"}, ["'a.txt' is not UTF-8: byte 0xe9 at position 3", "iconv"]),
        ({"a.json": b'{"prompt": "\xe9"}'}, ["'a.json' is not UTF-8"]),
        ({"a.json": "{prompt"}, ["'a.json' is not valid JSON"]),
        ({"a.json": "[" * 100_000}, ["'a.json' is not valid JSON"]),
        ({"a.json": '["p"]'}, ["'a.json' holds a JSON list; expected an object"]),
        (
            {"a.json": '{"text": "p", "url": 1}'},
            ["lacks the key 'prompt' and 'caption'", "'text', 'url'", "prompt_key names another"],
        ),
        ({"a.json": "{}"}, ["the keys there are: none"]),
        ({"a.json": '{"prompt": 3}'}, ["'a.json' has a number under 'prompt'; expected a string"]),
        ({"a.json": '{"prompt": null}'}, ["has a null under 'prompt'"]),
        ({"a.json": '{"caption": [["p"]]}'}, ["has a list under 'caption'"]),
        ({"a.json": '{"prompt": ""}'}, ["'a.json' is an empty prompt"]),
        ({"a.json": '{"prompt": "\\ud800"}'}, ["'a.json' is not valid Unicode"]),
        ({"a.txt": "x" * (MAX_PROMPT_BYTES + 1)}, ["'a.txt' is a prompt of 65,537 bytes; expected at most 65,536"]),
        ({"a.txt": "x" * (MAX_PROMPT_BYTES + 9)}, ["member 'a.txt' has 65,545 bytes"]),
        ({"a.json": '{"prompt": "' + "x" * 70_000 + '"}'}, ["is a prompt of 70,000 bytes"]),
    ],
)
def test_bad_members(tmp_path: Path, members: dict[str, bytes | str], parts: list[str]) -> None:
    message = error_of(tar(tmp_path / "s.tar", members))
    for part in parts:
        assert part in message


def test_longest_prompt(tmp_path: Path) -> None:
    longest = "x" * MAX_PROMPT_BYTES
    assert read(tar(tmp_path / "s.tar", {"a.txt": longest + "\r\n"})) == [longest]
    (tmp_path / "p.txt").write_text(longest + "\r\nb\n" + longest)
    assert read(tmp_path / "p.txt") == [longest, "b", longest]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (b"a\n\nb\n", ["line 2 is an empty prompt"]),
        (b"a\ncaf\xe9\n", ["line 2 is not UTF-8: byte 0xe9 at position 3"]),
        (b"a\n" + b"x" * (3 * MAX_PROMPT_BYTES), ["line 2 has more than 65,536 bytes"]),
        (b"a\n\n\n" + b"x" * (3 * MAX_PROMPT_BYTES), ["line 2 is an empty prompt"]),
        (b"\n \n", ["holds no prompt; expected one prompt a line"]),
    ],
)
def test_bad_text_files(tmp_path: Path, text: bytes, parts: list[str]) -> None:
    (tmp_path / "p.txt").write_bytes(text)
    message = error_of(tmp_path / "p.txt")
    for part in parts:
        assert part in message


def test_a_name_twice(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as archive:
        for text in (b"one", b"two"):
            header = tarfile.TarInfo("a.txt")
            header.size = 3
            archive.addfile(header, io.BytesIO(text))
    assert "member 'a.txt' is there twice" in error_of(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_are_not_followed(tmp_path: Path, kind: bytes) -> None:
    (tmp_path / "secret").write_text("secret")
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind_ in (("picture.jpg", tarfile.SYMTYPE), ("a.txt", kind)):
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind_, str(tmp_path / "secret")
            archive.addfile(header)
    assert "member 'a.txt' is a" in error_of(path)


def test_every_cut_of_a_shard_is_noticed(tmp_path: Path) -> None:
    """At whatever byte a copy was interrupted, block boundaries (where tarfile notices nothing) among them."""
    for mode, cuts in (("w", range(1, 5 * 1024 + 1, 128)), ("w:gz", range(1, 10_000, 7))):
        whole = tar(tmp_path / "s.tar", {f"{n}.txt": f"prompt {n}" for n in range(5)}, mode).read_bytes()
        part = tmp_path / "part.tar"
        for cut in cuts:
            if cut >= len(whole):
                break
            part.write_bytes(whole[:cut])
            message = error_of(part)
            assert "truncated" in message or ("not a tar archive" in message and cut < 512)


def test_damage_in_the_middle(tmp_path: Path) -> None:
    whole = bytearray(tar(tmp_path / "s.tar", {f"{n}.txt": "p" for n in range(5)}).read_bytes())
    whole[2 * 1024 + 3] ^= 1
    (tmp_path / "s.tar").write_bytes(whole)
    assert "is damaged after member '1.txt'" in error_of(tmp_path / "s.tar")
    packed = bytearray(gzip.compress(bytes(tar(tmp_path / "t.tar", {"a.txt": "p"}).read_bytes())))
    packed[-6] ^= 1  # in the checksum, behind all data
    (tmp_path / "t.tar").write_bytes(packed)
    assert "does not decompress" in error_of(tmp_path / "t.tar")


@pytest.mark.parametrize(
    "start", [b"PK\x03\x04 a zip", b"prompt one\nprompt two\n", gzip.compress(b"just text", mtime=0)]
)
def test_not_a_tar(tmp_path: Path, start: bytes) -> None:
    (tmp_path / "s.tar").write_bytes(start)
    assert "is not a tar archive" in error_of(tmp_path / "s.tar")
    (tmp_path / "s.tar").write_bytes(start + bytes(2000))
    assert "s.tar is" in error_of(tmp_path / "s.tar")


def test_vanished_file(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in error_of(tmp_path / "s.tar")


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_compressed_bomb_takes_no_memory(tmp_path: Path, kind: bytes) -> None:
    """64 MB of zeros in some 64 kB: as a prompt, and as the extension headers that tarfile reads whole."""
    header = tarfile.TarInfo("a.txt")
    header.size, header.type = 64 << 20, kind
    path = tmp_path / "s.tar"
    with gzip.open(path, "wb") as stream:
        stream.write(header.tobuf(tarfile.GNU_FORMAT))
        for _ in range(64):
            stream.write(bytes(1 << 20))
    tracemalloc.start()
    try:
        message = error_of(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert "67,108,864 bytes" in message


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (b"6 a=b\n" * 170_000, "is truncated"),  # once took time in the square of their number
        (
            b"5014 size=" + b"9" * 5003 + b"\n",
            "gives the size '9999999999",
        ),  # more digits than an int takes
        (b"7" * 200_000, "pax header that cannot be read"),
    ],
)
def test_hostile_pax_headers_take_no_time(tmp_path: Path, records: bytes, message: str) -> None:
    header = tarfile.TarInfo("pax")
    header.size, header.type = len(records), tarfile.XHDTYPE
    content = header.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512)
    (tmp_path / "s.tar").write_bytes(content)
    started = time.process_time()
    assert message in error_of(tmp_path / "s.tar")
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    "records",
    [
        b"0 a=b\n",
        b"1 a=b\n",
        b"2 a=b\n",
        b"3 a=b\n",
        b"5 a=b\n",
        b"7 a=b\n",
        b"6 a=b ",
        b"6 a b\n",
        b"-6 a=b\n",
        b"6a=bc\n",
    ],
)
@pytest.mark.parametrize("before", [b"", b"6 a=b\n", b"9 path=x\n"])
def test_every_pax_record_moves_on_or_is_an_error(tmp_path: Path, before: bytes, records: bytes) -> None:
    """One flipped bit in a length once made the reader turn on the spot for ever."""
    header = tarfile.TarInfo("pax")
    header.size, header.type = len(before + records), tarfile.XHDTYPE
    shard = tar(tmp_path / "s.tar", {"0.txt": "p"})
    body = before + records
    shard.write_bytes(header.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512) + shard.read_bytes())
    assert "pax header that cannot be read" in error_of(shard)


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_shards_strung_together_are_read_through(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    """``cat a.tar b.tar``: most readers stop at the first end marker. The parts may number their samples alike."""
    parts = [tar(tmp_path / f"{n}.tar", {"0.txt": f"a{n}", "1.txt": f"b{n}"}).read_bytes() for n in range(3)]
    path = tmp_path / "s.tar"
    path.write_bytes(b"".join(map(compress, parts)))
    assert read(path) == ["a0", "b0", "a1", "b1", "a2", "b2"]
    starts = [member.start for member in walk_tar(path, lambda *_: False)]
    assert starts == [10240 * part + 1024 * member for part in range(3) for member in range(2)]
    path.write_bytes(compress(parts[0] + b"x" * 512))
    assert "no tar header follows the end marker after member '1.txt'" in error_of(path)
    path.write_bytes(compress(parts[0] + bytes(1 << 20)))  # padding, as tar -b 2048 writes it
    assert read(path) == ["a0", "b0"]
    path.write_bytes(compress(parts[0] + bytes(65 << 20)))
    assert "zeros follow its end marker" in error_of(path)


def test_members_passed_over_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dots = {f"cat no. {n}.txt" if n % 2 else f"{n}.txt": f"p{n}" for n in range(6)}
    again = {f"{n}.txt": f"p{n}" for n in range(3)} | {f"{n}.json": '{"prompt": "other"}' for n in range(3)}
    for name, members, expected, note in (
        ("dots.tar", dots, ["p0", "p2", "p4"], "3 members were passed over, 'cat no. 1.txt' in "),
        ("again.tar", again, ["p0", "p1", "p2"], "3 members were passed over, '0.json' in "),
    ):
        for mode in ("w", "w:gz"):
            path = tar(tmp_path / name, members, mode)
            bad = BadSamples("error")
            assert read(path, bad) == expected
            assert [line.partition("/")[0] for line in bad.notes] == [note]
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                assert read_prompts(path) == expected
                assert note in caplog.text
                caplog.clear()
                loader = build_prompt_loader(
                    path, micro_batch_size=1, epochs=2, shuffle_buffer=0, index_folder=tmp_path / "index"
                )
                assert prompts_of(loader) == expected * 2
                assert caplog.text.count(note) == 1
    twice = tmp_path / "twice.tar"
    with tarfile.open(twice, "w") as archive:
        for name in ("a.txt", "b.txt", "a.txt"):
            header = tarfile.TarInfo(name)
            header.size = 1
            archive.addfile(header, io.BytesIO(b"p"))
    assert "'a.txt' is there twice" in error_of(twice)


@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\r"])
def test_lines_end_as_on_any_system(tmp_path: Path, line_break: str) -> None:
    lines = ["red apple", "x" * MAX_PROMPT_BYTES, "green\u2028apple", *(str(n) for n in range(40_000))]
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xef\xbb\xbf" + line_break.join(lines).encode())
    assert read(path) == lines
    located = list(locate_prompts(path, BadSamples()))
    content = path.read_bytes()
    assert all(content[o : o + len(data)] == data and parse_prompt(data, k) == p for p, o, data, k in located)
    path.write_bytes(f"a{line_break}{line_break}b".encode())
    assert "line 2 is an empty prompt" in error_of(path)
    assert "on_bad_sample=skip" in error_of(path)


def test_byte_order_marks_are_no_part_of_a_prompt(tmp_path: Path) -> None:
    mark = "\ufeff"
    members = {"0.txt": f"{mark}a", "1.txt": f"{mark}{mark}b\n", "2.json": f'{mark}{{"prompt": "{mark}c"}}'}
    assert read(tar(tmp_path / "s.tar", members)) == ["a", "b", "c"]
    (tmp_path / "p.txt").write_text(f"{mark}a\n{mark}b\n", "utf-8")  # two files, one after the other
    assert read(tmp_path / "p.txt") == ["a", "b"]
    (tmp_path / "p.txt").write_text("a\n", "utf-16")
    assert "iconv -f UTF-16" in error_of(tmp_path / "p.txt")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_the_key_of_json_members_can_be_chosen(tmp_path: Path, mode: str) -> None:
    members = {f"{n}.json": json.dumps({"captions": [f"a{n}", f"b{n}"], "prompt": f"p{n}"}) for n in range(3)}
    path = tar(tmp_path / "s.tar", members, mode)
    options = {"micro_batch_size": 1, "epochs": 1, "shuffle_buffer": 0}
    for key, letter in ((None, "p"), ("captions", "a"), (None, "p")):  # an index that is kept is of one key
        expected = [f"{letter}{n}" for n in range(3)]
        assert read_prompts(path, prompt_key=key) == expected
        assert prompts_of(build_prompt_loader(path, prompt_key=key, index_folder=tmp_path, **options)) == expected
    with pytest.raises(DataError, match="lacks the key 'text'; the keys there are: 'captions', 'prompt'"):
        read_prompts(path, prompt_key="text")


def test_names_in_messages_are_printable_and_short(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = "\x1b]0;title\x07\x1b[2J" + "x" * 1_000_000
    path = tar(tmp_path / "s.tar", {"a.txt": "p", f"{name}.txt": "", f"{name}.b.txt": "p", f"{name}y.json": "{"})
    message = error_of(path)
    assert message.isprintable()
    assert "\\x1b]0;title" in message
    assert len(message) < 1000
    with caplog.at_level(logging.WARNING):
        assert read_prompts(path, on_bad_sample="skip") == ["p"]
    assert all(record.getMessage().isprintable() and len(record.getMessage()) < 1000 for record in caplog.records)
    assert len(caplog.records) == 3


def test_skipping_counts_and_keeps_the_first_messages(tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {f"{number:02d}.txt": b"\xff" for number in range(8)}
    members |= {"good.txt": "good", "last.json": "[]"}
    bad = BadSamples("skip")
    assert read(tar(tmp_path / "s.tar", members), bad) == ["good"]
    assert (bad.count, len(bad.messages)) == (9, 5)
    assert "'00.txt' is not UTF-8" in bad.messages[0]


def test_skipping_keeps_what_came_before_the_damage(tmp_path: Path) -> None:
    whole = tar(tmp_path / "s.tar", {f"{n}.txt": f"p{n}" for n in range(5)}).read_bytes()
    (tmp_path / "s.tar").write_bytes(whole[: 3 * 1024 + 700])
    bad = BadSamples("skip")
    assert read(tmp_path / "s.tar", bad) == ["p0", "p1"]  # p2 was waiting for members of its key
    assert bad.count == 1


def test_skipping_in_text(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"a\n\n\xff\nb\n" + b"x" * (2 * MAX_PROMPT_BYTES) + b"\nc\n")
    bad = BadSamples("skip")
    assert read(tmp_path / "p.txt", bad) == ["a", "b", "c"]
    assert bad.count == 3


def test_unknown_policy() -> None:
    with pytest.raises(DataError, match="on_bad_sample is 'ignore'; expected 'error' or 'skip'"):
        BadSamples("ignore")  # type: ignore[arg-type]
