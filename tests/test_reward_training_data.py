"""Preference shards: written, read back, streamed; and what is said about unusable ones."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny.prompts import ODD_PROMPTS, tar
from tiny.reward_training import blue_pairs, blue_shards, encode, picture

from nemo_aligner_diffusion.data.bad_samples import BadSamples
from nemo_aligner_diffusion.data.preferences.reward_pairs import PreferenceDataModule, PreferenceDataset, pictures
from nemo_aligner_diffusion.data.preferences.shards import (
    PreferencePair,
    format_label,
    read_label,
    read_preference_file,
    write_preference_shards,
)
from nemo_aligner_diffusion.data.prompts import read_prompts
from nemo_aligner_diffusion.errors import DataError, OutputError
from nemo_aligner_diffusion.formats.pictures import decode_picture
from nemo_aligner_diffusion.rewards import Preprocessing

PNG = encode(picture(0.5, 0))
JPEG = encode(picture(0.5, 0), "JPEG")
GOOD: dict[str, bytes | str] = {"7.jpg_0": JPEG, "7.jpg_1": PNG, "7.txt": "a cat", "7.label": "1/0\n"}


def read(path: Path, policy: str = "error") -> list[PreferencePair]:
    return list(read_preference_file(path, BadSamples(policy)))  # type: ignore[arg-type]


def test_round_trip_of_odd_prompts_and_labels(tmp_path: Path) -> None:
    labels = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.7, 0.3), (1 / 3, 2 / 3)]
    pairs = [
        PreferencePair((JPEG, PNG) if n % 2 else (PNG, JPEG), prompt, labels[n % 5])
        for n, prompt in enumerate(ODD_PROMPTS)
    ]
    written = write_preference_shards(pairs, tmp_path / "s", samples_per_shard=4)
    assert written.samples == len(ODD_PROMPTS)
    assert [path.name for path in written.paths] == [f"preferences-000{n}.tar" for n in range(3)]
    back = [pair for path in written.paths for pair in read(path)]
    assert [(p.pictures, p.prompt, p.label) for p in back] == [(p.pictures, p.prompt, p.label) for p in pairs]
    assert read_prompts(str(tmp_path / "s")) == ODD_PROMPTS, "preference shards are prompt shards too"
    again = write_preference_shards(pairs, tmp_path / "again", samples_per_shard=4)
    assert [p.read_bytes() for p in again.paths] == [p.read_bytes() for p in written.paths]


def test_member_names(tmp_path: Path) -> None:
    path = write_preference_shards([PreferencePair((JPEG, PNG), "x", (0.5, 0.5))], tmp_path).paths[0]
    with tarfile.open(path) as archive:
        assert archive.getnames() == ["000000000.jpg_0", "000000000.png_1", "000000000.txt", "000000000.label"]
        member = archive.extractfile("000000000.label")
        assert member is not None
        assert member.read() == b"0.5/0.5"


@pytest.mark.parametrize(
    "members",
    [
        GOOD,
        {"7.0.jpg": JPEG, "7.1.png": PNG, "7.json": '{"caption": "a cat", "label_0": 1}'},
        {"./a/7.JPEG_0": JPEG, "./a/7.webp_1": PNG, "./a/7.json": '{"prompt": "a cat", "label_0": 1, "label_1": 0}'},
        {**GOOD, "7.model_0": "sdxl", "README": "x", "__notes__": "x"},
    ],
)
def test_layouts_that_are_read(tmp_path: Path, members: dict[str, bytes | str]) -> None:
    (pair,) = read(tar(tmp_path / "a.tar", members))
    assert (pair.pictures, pair.prompt, pair.label) == ((JPEG, PNG), "a cat", (1.0, 0.0))


def without(*names: str, **changed: bytes | str) -> dict[str, bytes | str]:
    return {name: data for name, data in GOOD.items() if name.removeprefix("7.") not in names} | {
        f"7.{name}": data for name, data in changed.items()
    }


@pytest.mark.parametrize(
    ("members", "parts"),
    [
        (without("jpg_1"), ["'7'", "lacks its picture 1", ".jpg_0, .txt, .label"]),
        (without("jpg_0"), ["lacks its picture 0"]),
        (without("txt"), ["lacks its prompt", ".txt"]),
        (without("label"), ["lacks its label", "1/0"]),
        (without(png_0=PNG), ["2 members for picture 0"]),
        (without(label="1/1"), ["label 1/1", "sums to 2", "0.5/0.5 for a tie"]),
        (without(label="0/0"), ["sums to 0"]),
        (without(label="-1/2"), ["-1/2", "a share below 0"]),
        (without(label="nan/1"), ["nan/1"]),
        (without(label="first"), ["'first'", "expected 1/0"]),
        (without(label=b"\xff\xfe"), ["expected 1/0"]),
        (without("label", json='{"label_0": true}'), ["True"]),
        (without("label", json='{"label_0": 0.9, "label_1": 0.3}'), ["sums to 1.2"]),
        (without("label", json="[1]"), ["no object"]),
        (without("label", json="{"), ["not valid JSON"]),
        (without(txt=b"caf\xe9"), ["0xe9", "iconv"]),
        (without(txt="  "), ["empty prompt"]),
        (without(jpg_0=b"GIF89a..."), ["no JPEG, PNG or WebP", "GIF89a"]),
        (without(jpg_0=b""), ["it is empty"]),
    ],
)
def test_unusable_pairs(tmp_path: Path, members: dict[str, bytes | str], parts: list[str]) -> None:
    path = tar(tmp_path / "a.tar", {**members, "8.jpg_0": JPEG, "8.jpg_1": PNG, "8.txt": "ok", "8.label": "0/1"})
    with pytest.raises(DataError) as caught:
        read(path)
    for part in (str(path), *parts):
        assert part in str(caught.value)
    assert [pair.prompt for pair in read(path, "skip")] == ["ok"]


def test_damaged_shards_and_wrong_files(tmp_path: Path) -> None:
    path = write_preference_shards(blue_pairs(3), tmp_path / "s").paths[0]
    cut = tmp_path / "cut.tar"
    cut.write_bytes(path.read_bytes()[:-12_000])
    with pytest.raises(DataError, match="truncated"):
        read(cut)
    assert 0 < len(read(cut, "skip")) < 3
    with pytest.raises(DataError, match="no preference pair"):
        read(tar(tmp_path / "other.tar", {"0.md": "x"}))
    (tmp_path / "a.txt").write_text("a cat\n")
    with pytest.raises(DataError, match="text file"):
        read(tmp_path / "a.txt")
    with tarfile.open(tmp_path / "link.tar", "w") as archive:
        link = tarfile.TarInfo("7.jpg_0")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(DataError, match="is a link"):
        read(tmp_path / "link.tar")


def test_pictures_are_decoded_whole_only_when_used(tmp_path: Path) -> None:
    members = {**GOOD, "7.jpg_0": encode(np.random.default_rng(0).random((64, 64, 3)), "JPEG")[:900]}
    path = tar(tmp_path / "a.tar", {**members, "8.jpg_0": JPEG, "8.jpg_1": PNG, "8.txt": "ok", "8.label": "0/1"})
    pair = read(path)[0]
    with pytest.raises(DataError, match=r"a\.tar: 7 has a picture that cannot be read"):
        pictures(pair)
    data = PreferenceDataset(
        str(path),
        prepare=Preprocessing(32).square,
        micro_batch_size=1,
        epochs=1,
        shuffle_buffer=0,
        on_bad_sample="skip",
    )
    assert [batch["prompts"] for batch in data] == [["ok"]]
    assert data.index.left_out["samples"] == 1


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_compressed_shards_give_the_same_pairs(tmp_path: Path, policy: str) -> None:
    batches = []
    for packed in (False, True):
        folder = tmp_path / str(packed)
        shards = write_preference_shards(blue_pairs(6), folder, samples_per_shard=4)
        for shard in shards.paths if packed else ():
            shard.with_suffix(".tar.gz").write_bytes(gzip.compress(shard.read_bytes()))
            shard.unlink()
        options: dict[str, Any] = {"micro_batch_size": 3, "epochs": 1, "on_bad_sample": policy}
        data = PreferenceDataset(
            str(folder), prepare=Preprocessing(32).square, index_folder=tmp_path / "index", **options
        )
        batches.append(list(data))
    for plain, unpacked in zip(*batches, strict=True):
        assert plain["prompts"] == unpacked["prompts"]
        assert torch.equal(plain["images"], unpacked["images"])
        assert torch.equal(plain["labels"], unpacked["labels"])


def test_huge_pictures_are_refused_by_their_header() -> None:
    for side, said in ((8_500, "8500 × 8500"), (20_000, "more than 67,108,864 pixels")):
        stream = io.BytesIO()
        Image.new("1", (side, side)).save(stream, "PNG")
        assert len(stream.getvalue()) < 100_000
        with pytest.raises(ValueError, match=said):
            decode_picture(stream.getvalue())


def test_transparency_becomes_white() -> None:
    stream = io.BytesIO()
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(stream, "PNG")
    assert decode_picture(stream.getvalue()).getpixel((0, 0)) == (255, 255, 255)


def test_photographs_are_turned_and_deep_ones_scaled() -> None:
    """The orientation is in EXIF; Pillow's own conversion of 16-bit grey clips it, which made everything white."""
    for way, size, corner in ((1, (16, 8), (0, 0)), (3, (16, 8), (15, 7)), (6, (8, 16), (7, 0)), (8, (8, 16), (0, 15))):
        stream, exif, photograph = io.BytesIO(), Image.Exif(), Image.new("RGB", (16, 8))
        photograph.paste((255, 255, 255), (0, 0, 4, 4))
        exif[0x112] = way
        photograph.save(stream, "PNG", exif=exif)
        upright = decode_picture(stream.getvalue())
        assert upright.size == size
        assert upright.getpixel(corner) == (255, 255, 255)
    for value, expected in ((0, 0), (257, 1), (32768, 128), (65535, 255)):
        stream = io.BytesIO()
        Image.fromarray(np.full((2, 2), value, "uint16")).save(stream, "PNG")
        assert decode_picture(stream.getvalue()).getpixel((0, 0)) == (expected,) * 3


def test_labels() -> None:
    assert format_label((1.0, 0.0)) == "1/0"
    assert read_label(*format_label((1 / 3, 2 / 3)).split("/")) == (1 / 3, 2 / 3)
    assert read_label(0.25) == read_label("0.25", None) == (0.25, 0.75)


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    bad = PreferencePair((PNG, b"no picture"), "x", (1.0, 0.0), "row 9")
    with pytest.raises(DataError, match="row 9 has a picture"):
        write_preference_shards([*blue_pairs(3), bad], tmp_path / "s", samples_per_shard=1)
    assert not (tmp_path / "s").exists()
    write_preference_shards(blue_pairs(3), tmp_path / "s", samples_per_shard=1)
    with pytest.raises(OutputError, match=r"holds 3 shard\(s\)"):
        write_preference_shards(blue_pairs(1), tmp_path / "s")
    with pytest.raises(DataError, match="no pair to write"):
        write_preference_shards([], tmp_path / "t")


def stream(folder: Path, **options: object) -> list[int]:
    """Which pairs come, by the order of their first pictures' bytes."""
    settings: dict[str, object] = {
        "prepare": Preprocessing(32).square,
        "micro_batch_size": 4,
        "shuffle_buffer": 10,
        "epochs": 1,
    }
    data = PreferenceDataset(str(folder), **(settings | options))  # type: ignore[arg-type]
    return [int(1e6 * image.sum()) for batch in data for image in batch["images"][:, 0]]


def test_order_follows_seed_and_no_layout(tmp_path: Path) -> None:
    folder = blue_shards(tmp_path, 24, samples_per_shard=7)
    once = stream(folder, seed=3)
    assert len(set(once)) == 24
    assert stream(folder, seed=3) == once != stream(folder, seed=4)
    ranks = [stream(folder, seed=3, rank=rank, world_size=2) for rank in (0, 1)]
    mixed = [image for step in range(3) for rank in ranks for image in rank[4 * step : 4 * step + 4]]
    assert mixed == once
    assert stream(folder, seed=3, start_sample=8) == once[8:]


def test_batches(tmp_path: Path) -> None:
    pairs = [*blue_pairs(2, size=(40, 64)), *blue_pairs(1, size=(20, 20))]
    write_preference_shards(pairs, tmp_path)
    data = PreferenceDataset(
        str(tmp_path),
        prepare=Preprocessing(32).square,
        micro_batch_size=2,
        epochs=1,
        shuffle_buffer=0,
        incomplete="wrap",
    )
    first, second = list(data)
    assert first["images"].shape == (2, 2, 3, 32, 32)
    assert first["images"].dtype == torch.float32
    assert first["labels"].tolist() == [list(pair.label) for pair in pairs[:2]]
    assert (first["counts"].tolist(), second["counts"].tolist()) == ([True, True], [True, False])
    assert second["prompts"][1] == pairs[0].prompt


def test_data_module_resumes_where_it_was(tmp_path: Path) -> None:
    blue_shards(tmp_path / "t", 20)
    data = PreferenceDataModule(
        str(tmp_path / "t"), prepare=Preprocessing(32).square, micro_batch_size=4, start_sample=8
    )
    data.setup("fit")
    whole = PreferenceDataModule(str(tmp_path / "t"), prepare=Preprocessing(32).square, micro_batch_size=4)
    stream = iter(whole.train_dataloader())
    batches = [next(stream) for _ in range(3)]
    assert torch.equal(next(iter(data.train_dataloader()))["images"], batches[2]["images"])


def test_names_with_a_further_dot_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dotted = {f"cat no. {name}": content for name, content in GOOD.items()}
    path = tar(tmp_path / "a.tar", {**GOOD, **dotted})
    data = PreferenceDataset(
        str(path), prepare=Preprocessing(32).square, micro_batch_size=1, epochs=1, shuffle_buffer=0
    )
    assert [batch["prompts"] for batch in data] == [["a cat"]]
    assert "4 members were passed over, 'cat no. 7." in caplog.text


def test_what_is_passed_over_in_a_sample_is_passed_over_again_when_its_turn_comes(tmp_path: Path) -> None:
    """The index had left out a member of the sample; reading the sample stopped the run."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in [*GOOD.items(), ("7.txt", "a dog")]:
            data = content.encode() if isinstance(content, str) else content
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    options: dict[str, Any] = {"prepare": Preprocessing(32).square, "micro_batch_size": 1, "epochs": 1}
    with pytest.raises(DataError, match="is there twice"):
        PreferenceDataset(str(path), **options)
    data = PreferenceDataset(str(path), on_bad_sample="skip", **options)
    assert [batch["prompts"] for batch in data] == [["a cat"]]
    assert data.index.left_out["samples"] == 1


def test_latents_are_no_pictures(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {"7.moments.safetensors": b"x", "7.txt": "a cat", "7.label": "1/0"})
    data = PreferenceDataset(str(path), prepare=Preprocessing(32).square, micro_batch_size=1, epochs=1)
    with pytest.raises(DataError, match=r"a\.tar: sample '7' has latents in place of its pictures"):
        list(data)
