"""The .nemo reader and writer: round trips, and every kind of archive a stranger could hand over."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_aligner_diffusion.errors import ArchiveError
from nemo_aligner_diffusion.formats.nemo import Limits, load_nemo, save_nemo

CONFIG = {"target": "some.where.Reward", "eps": 1e-5, "tokenizer": {"vocab_file": "nemo:vocab.json"}}
STATE = {"a": torch.arange(6.0).reshape(2, 3), "half": torch.tensor([1.5], dtype=torch.float16), "n": torch.tensor(3)}
VOCAB = b'{"x": 0}'


def weights_bytes(value: Any = None) -> bytes:
    stream = io.BytesIO()
    torch.save(STATE if value is None else value, stream)
    return stream.getvalue()


def write_tar(path: Path, members: dict[str, bytes], prepare: Callable[[tarfile.TarInfo], None] | None = None) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if prepare:
                prepare(info)
            tar.addfile(info, io.BytesIO(content))
    return path


def good_members(**changed: bytes) -> dict[str, bytes]:
    return {"model_config.yaml": b"target: a.B\n", "model_weights.ckpt": weights_bytes(), **changed}


def assert_same_state(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert list(left) == list(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert torch.equal(tensor, right[name])


@pytest.mark.parametrize("packed", [False, True])
def test_round_trip(tmp_path: Path, packed: bool) -> None:
    archive = load_nemo(save_nemo(tmp_path / "sub" / "x.nemo", CONFIG, STATE, {"vocab.json": VOCAB}, gzip=packed))
    assert archive.target == "some.where.Reward"
    assert archive.config["eps"] == 1e-5
    assert archive.artifact(archive.config["tokenizer"]["vocab_file"]) == VOCAB
    assert_same_state(archive.state_dict(), STATE)
    assert os.listdir(tmp_path / "sub") == ["x.nemo"]


def test_same_input_gives_same_bytes_and_a_copy_of_views_only(tmp_path: Path) -> None:
    big = torch.zeros(100_000)
    first = save_nemo(tmp_path / "1.nemo", {"target": "t"}, {"view": big[:4]})
    second = save_nemo(tmp_path / "2.nemo", {"target": "t"}, {"view": torch.zeros(4)})
    assert first.read_bytes() == second.read_bytes()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = save_nemo(tmp_path / "x.nemo", CONFIG, STATE, {"vocab.json": VOCAB})
    before = path.read_bytes()
    with pytest.raises(ArchiveError, match=r"vocab.json"):
        save_nemo(path, CONFIG, STATE, {})
    with pytest.raises(AttributeError):
        save_nemo(path, {"target": "t"}, {"bad": None})  # type: ignore[dict-item]
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.nemo"]


def test_writer_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="target"):
        save_nemo(tmp_path / "x.nemo", {"name": "n"}, STATE)
    with pytest.raises(ArchiveError, match=r"unused.txt"):
        save_nemo(tmp_path / "x.nemo", {"target": "t"}, STATE, {"unused.txt": b""})
    with pytest.raises(ArchiveError, match="plain file name"):
        save_nemo(tmp_path / "x.nemo", {"target": "t"}, STATE, {"../up": b""})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_reads_what_nemo_writes(tmp_path: Path, mode: str) -> None:
    """NeMo adds a folder as "." and older versions gzip; model-parallel ones nest the weights of the one rank."""
    source = tmp_path / "source"
    (source / "mp_rank_00").mkdir(parents=True)
    (source / "model_config.yaml").write_text(
        "target: nemo.X\noutput_dim: 20\nnarrow: 1e-5\nvision:\n  output_dim: ${model.output_dim}\n  seq: 77\n"
        "  positions: ${.seq}\n  home: ${oc.env:HOME}\n  nothing: ${no.such}\n"
    )
    (source / "mp_rank_00" / "model_weights.ckpt").write_bytes(weights_bytes())
    (source / "0123_vocab.json").write_bytes(VOCAB)
    with tarfile.open(tmp_path / "x.nemo", mode) as tar:
        tar.add(source, arcname=".")
    archive = load_nemo(tmp_path / "x.nemo")
    vision = archive.config["vision"]
    assert (vision["output_dim"], vision["positions"], archive.config["narrow"]) == (20, 77, 1e-5)
    assert vision["home"] == "${oc.env:HOME}", "a resolver must not run"
    assert vision["nothing"] == "${no.such}"
    assert archive.artifact("nemo:0123_vocab.json") == VOCAB
    assert_same_state(archive.state_dict(), STATE)


def test_system_tar_reads_what_we_write(tmp_path: Path) -> None:
    path = save_nemo(tmp_path / "x.nemo", CONFIG, STATE, {"vocab.json": VOCAB}, gzip=True)
    listed = subprocess.run(["tar", "-tzf", str(path)], capture_output=True, text=True, check=True, timeout=60).stdout
    assert "./model_config.yaml" in listed.splitlines()
    assert "./model_weights.ckpt" in listed.splitlines()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"this is no tar" * 100, "no tar"),
        (b"\x1f\x8b not gzip either", "no tar"),
        (gzip.compress(b"x" * 2000, mtime=0), "no tar"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 34\n",
            "but a Git LFS pointer, .* git lfs pull",
        ),
        (b"<!DOCTYPE html><html>Sign in</html>", "but a web page; download the file itself"),
    ],
)
def test_no_tar(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.nemo").write_bytes(content)
    with pytest.raises(ArchiveError, match=message) as caught:
        load_nemo(tmp_path / "x.nemo")
    assert "x.nemo" in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="does not exist"):
        load_nemo(tmp_path / "none.nemo")
    with pytest.raises(ArchiveError, match="cannot be read"):
        load_nemo(tmp_path)


@pytest.mark.parametrize("lacking", ["model_config.yaml", "model_weights.ckpt"])
def test_lacking_member(tmp_path: Path, lacking: str) -> None:
    members = good_members()
    del members[lacking]
    with pytest.raises(ArchiveError, match=f"lacks {lacking}"):
        load_nemo(write_tar(tmp_path / "x.nemo", members))


def test_damaged_artifact(tmp_path: Path) -> None:
    path = save_nemo(tmp_path / "x.nemo", CONFIG, STATE, {"vocab.json": VOCAB})
    path.write_bytes(path.read_bytes().replace(VOCAB, VOCAB.replace(b"0", b"1")))
    archive = load_nemo(path)
    with pytest.raises(ArchiveError, match="digest"):
        archive.artifact(archive.config["tokenizer"]["vocab_file"])


def test_lacking_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"abc_vocab.json"):
        load_nemo(write_tar(tmp_path / "x.nemo", good_members())).artifact("nemo:abc_vocab.json")


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/etc/evil", "C:/evil", "a\\..\\evil", "nul\x01name"])
def test_members_that_climb_out(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArchiveError, match="climbs out"):
        load_nemo(write_tar(tmp_path / "x.nemo", good_members(**{name: b"x"})))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (tarfile.SYMTYPE, "link"),
        (tarfile.LNKTYPE, "link"),
        (tarfile.CHRTYPE, "device"),
        (tarfile.FIFOTYPE, "device"),
    ],
)
def test_links_and_devices(tmp_path: Path, kind: bytes, message: str) -> None:
    def prepare(info: tarfile.TarInfo) -> None:
        if info.name == "special":
            info.type, info.linkname, info.size = kind, "/etc/passwd", 0

    with pytest.raises(ArchiveError, match=message):
        load_nemo(write_tar(tmp_path / "x.nemo", good_members(special=b""), prepare))


def test_duplicate_members(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="twice"):
        load_nemo(write_tar(tmp_path / "x.nemo", good_members(**{"./model_config.yaml": b"target: other\n"})))


def test_split_and_distributed_weights_say_what_to_do(tmp_path: Path) -> None:
    config = {"model_config.yaml": b"target: a.B\n"}
    ranks = {f"mp_rank_0{rank}/model_weights.ckpt": weights_bytes() for rank in range(2)}
    archive = load_nemo(write_tar(tmp_path / "x.nemo", config | ranks))
    assert [set(shard) for shard in archive.shards()] == [set(STATE)] * 2
    with pytest.raises(ArchiveError, match=r"2 tensor-parallel ranks.*Merge"):
        archive.state_dict()
    with pytest.raises(ArchiveError, match=r"distributed checkpoint.*save_nemo"):
        load_nemo(write_tar(tmp_path / "y.nemo", config | {"./model_weights/__0_0.distcp": b"x"}))
    for names in (
        ("mp_rank_01",),
        ("mp_rank_00", "mp_rank_02"),
        ("mp_rank_00", "mp_rank_000"),
        ("tp_rank_00_pp_rank_000", "tp_rank_00_pp_rank_001"),
    ):
        members = {f"./{name}/model_weights.ckpt": weights_bytes() for name in names}
        with pytest.raises(ArchiveError, match=f"split as '{names[0]}/.*without a gap.*Merge"):
            load_nemo(write_tar(tmp_path / "z.nemo", config | members))


@pytest.mark.parametrize("packed", [False, True])
def test_truncated(tmp_path: Path, packed: bool) -> None:
    path = save_nemo(tmp_path / "x.nemo", CONFIG, STATE, {"vocab.json": VOCAB}, gzip=packed)
    content = path.read_bytes()
    # Plain: inside the configuration, the artifact and the weights (the rest is padding); gzipped: anywhere.
    for kept in (len(content) // 3, len(content) * 7 // 8, len(content) - 4) if packed else (600, 1600, 3000):
        path.write_bytes(content[:kept])
        with pytest.raises(ArchiveError, match=r"truncated|damaged|lacks"):
            load_nemo(path)


def test_gzip_bomb_and_long_name_bomb_and_many_members(tmp_path: Path) -> None:
    limits = Limits(gzip_floor_bytes=1 << 20)
    (tmp_path / "bomb.nemo").write_bytes(gzip.compress(bytes(20 << 20)))
    with pytest.raises(ArchiveError, match="gzip bomb"):
        load_nemo(tmp_path / "bomb.nemo", limits)
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 3 << 20
    (tmp_path / "name.nemo").write_bytes(name.tobuf(tarfile.GNU_FORMAT) + bytes(4 << 20))
    with pytest.raises(ArchiveError, match=r"extension header of 3,145,728 bytes"):
        load_nemo(tmp_path / "name.nemo")
    write_tar(tmp_path / "many.nemo", {f"f{index}": b"" for index in range(12)})
    with pytest.raises(ArchiveError, match="more than 10 members"):
        load_nemo(tmp_path / "many.nemo", Limits(members=10))


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        (b"\xff\xfe", "UTF-8"),
        (b"target: [1, 2", "unusable"),
        (b"- a\n- b\n", "mapping"),
        (b"target: !!python/object/apply:os.system ['true']\n", "tag"),
        (b"a: &a [1, 2]\nb: [*a, *a]\n", "anchor or alias"),
        (b"a: " + b"[" * 60 + b"]" * 60, "nested"),
        (b"[" * 100_000, "nested"),
        (b"target: a\ntarget: b\n", "duplicate"),
        (b"x: " + b"y" * (2 << 20), "bytes"),
    ],
)
def test_bad_yaml(tmp_path: Path, yaml: bytes, message: str) -> None:
    with pytest.raises(ArchiveError, match=message):
        load_nemo(write_tar(tmp_path / "x.nemo", good_members(**{"model_config.yaml": yaml})))


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("code-was-run",)


def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_tar(tmp_path / "x.nemo", good_members(**{"model_weights.ckpt": weights_bytes({"a": Payload()})}))
    with pytest.raises(ArchiveError, match=r"asks for '(posix|nt|os)\.mkdir'.*code"):
        load_nemo(path).state_dict()
    assert not (tmp_path / "code-was-run").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], "holds a list"),
        ({"a": 3}, "is a int"),
        ({1: torch.zeros(1)}, "'1'"),
        ({"a": torch.zeros(1).expand(10**9)}, "not dense"),
        ({"a": torch.zeros(3, 3).to_sparse()}, "not dense"),
    ],
)
def test_weights_that_are_no_state_dict(tmp_path: Path, value: Any, message: str) -> None:
    path = write_tar(tmp_path / "x.nemo", good_members(**{"model_weights.ckpt": weights_bytes(value)}))
    with pytest.raises(ArchiveError, match=message):
        load_nemo(path).state_dict()


def test_damaged_weights(tmp_path: Path) -> None:
    content = bytearray(weights_bytes())
    numbers = STATE["a"].numpy().tobytes()
    content[content.index(numbers) + 5] ^= 1  # torch.load itself would return a wrong number here
    for bad, message in (
        (bytes(content), "checksum"),
        (b"not a zip file at all", "no torch.save file"),
        (weights_bytes()[:-300], "cannot be loaded"),
    ):
        path = write_tar(tmp_path / "x.nemo", good_members(**{"model_weights.ckpt": bad}))
        with pytest.raises(ArchiveError, match=message):
            load_nemo(path).state_dict()


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(weights_bytes())) as old, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    path = write_tar(tmp_path / "x.nemo", good_members(**{"model_weights.ckpt": stream.getvalue()}))
    with pytest.raises(ArchiveError, match="compressed"):
        load_nemo(path).state_dict()


def test_extra_state_and_wrapped_state_dicts(tmp_path: Path) -> None:
    value = {"state_dict": {**STATE, "layer._extra_state": torch.zeros(2)}}
    path = write_tar(tmp_path / "x.nemo", good_members(**{"model_weights.ckpt": weights_bytes(value)}))
    assert_same_state(load_nemo(path).state_dict(), STATE)


def test_a_record_that_pytorch_takes_for_a_folder(tmp_path: Path) -> None:
    """One bit in the zip's table of contents, and torch.load returns a tensor of whatever was in memory before."""
    content = bytearray(weights_bytes())
    place = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 1)
    while content[place + 46 :].split(b"PK", 1)[0].find(b"data/0") < 0:
        place = content.index(b"PK\x01\x02", place + 1)
    content[place + 38] |= 0x10
    path = write_tar(tmp_path / "x.nemo", good_members(**{"model_weights.ckpt": bytes(content)}))
    with pytest.raises(ArchiveError, match=r"which torch\.save never writes"):
        load_nemo(path).state_dict()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (bytearray, r"asks for '(builtins|__builtin__)\.bytearray'"),
        (torch.FloatTensor, r"asks for 'torch\.FloatTensor'"),
        (torch.Tensor, r"asks for 'torch\.Tensor'"),
    ],
)
def test_constructors_that_would_take_memory_are_not_called(tmp_path: Path, value: Any, message: str) -> None:
    """torch.load(weights_only=True) calls each of these with the number that the file gives."""

    class Big:
        def __reduce__(self) -> tuple[Any, ...]:
            return value, (1 << 40,)

    path = write_tar(tmp_path / "x.nemo", good_members(**{"model_weights.ckpt": weights_bytes({"a": Big()})}))
    with pytest.raises(ArchiveError, match=message):
        load_nemo(path).state_dict()


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.nemo")
    with pytest.raises(ArchiveError, match="no regular file"):
        load_nemo(tmp_path / "x.nemo")


@pytest.mark.parametrize("other", ["archive/DATA.PKL", "archive/Data/0", "archive/data/0\0x", "archive/data.pkl\0"])
@pytest.mark.parametrize("first", [True, False])
def test_names_that_two_readers_tell_apart_are_refused(tmp_path: Path, other: str, first: bool) -> None:
    """torch ignores case and ends a name at a NUL: it would read another record than was checked."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(weights_bytes())) as good, zipfile.ZipFile(stream, "w") as bad:
        records = [(entry.filename, good.read(entry)) for entry in good.infolist()]
        for name, content in [(other, b"\x80\x02}."), *records] if first else [*records, (other, b"\x80\x02}.")]:
            bad.writestr(zipfile.ZipInfo(name.replace("\0", "N")), content)
    content = stream.getvalue().replace(other.replace("\0", "N").encode(), other.encode())
    path = write_tar(tmp_path / "x.nemo", good_members(**{"model_weights.ckpt": content}))
    with pytest.raises(ArchiveError, match=r"which torch\.save never writes"):
        load_nemo(path).state_dict()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int16, torch.bool, torch.complex64])
def test_what_torch_reads_is_what_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    """Views, strides, tied and empty tensors, parameters, scalars, nested dictionaries."""
    base = torch.arange(24).reshape(4, 6).to(dtype)
    state = {
        "whole": base,
        "view": base[1:, ::2],
        "turned": base.T,
        "empty": base[:0],
        "scalar": base[2, 3],
        "parameter": torch.nn.Parameter(base, requires_grad=False),
        "channels_last": torch.zeros(2, 3, 4, 5, dtype=dtype).contiguous(memory_format=torch.channels_last),
    }
    content = weights_bytes({"state_dict": state})
    path = write_tar(tmp_path / "x.nemo", good_members(**{"model_weights.ckpt": content}))
    found = load_nemo(path).state_dict()
    expected = torch.load(io.BytesIO(content), weights_only=True)["state_dict"]
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)
        assert (found[name].dtype, found[name].stride()) == (tensor.dtype, tensor.stride())
    assert found["view"].untyped_storage().data_ptr() == found["whole"].untyped_storage().data_ptr()
