"""Shards from prompts: whole or not there, equal for equal input, and the same prompts when read back."""

from __future__ import annotations

import hashlib
import resource
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny.prompts import ODD_PROMPTS

from nemo_aligner_diffusion.cli.prompts_to_shards import main
from nemo_aligner_diffusion.data.prompts import read_prompts
from nemo_aligner_diffusion.data.shards import shard_names, write_prompt_shards
from nemo_aligner_diffusion.errors import DataError, OutputError

SCRIPT = Path(__file__).parents[1] / "examples/mm/stable_diffusion/prompts_to_shards.py"


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("gzip", [False, True])
def test_round_trip(tmp_path: Path, gzip: bool) -> None:
    written = write_prompt_shards(iter(ODD_PROMPTS), tmp_path / "out", samples_per_shard=3, gzip=gzip)
    suffix = ".tar.gz" if gzip else ".tar"
    assert [path.name for path in written.paths] == [f"prompts-000{n}{suffix}" for n in range(4)]
    assert listing(tmp_path / "out") == [path.name for path in written.paths]
    assert written.samples == len(ODD_PROMPTS)
    assert written.bytes == sum(path.stat().st_size for path in written.paths)
    assert read_prompts(tmp_path / "out") == ODD_PROMPTS
    with tarfile.open(written.paths[1]) as archive:  # the standard library and so every other reader agrees
        assert archive.getnames() == ["000000003.txt", "000000004.txt", "000000005.txt"]
        member = archive.extractfile("000000004.txt")
        assert member is not None
        assert member.read().decode() == ODD_PROMPTS[4]


def test_webdataset_reads_them(tmp_path: Path) -> None:
    import webdataset as wds

    write_prompt_shards(ODD_PROMPTS, tmp_path, samples_per_shard=4)
    samples = wds.WebDataset(f"{tmp_path}/prompts-{{0000..0002}}.tar", shardshuffle=False).decode()
    assert [sample["txt"] for sample in samples] == ODD_PROMPTS


@pytest.mark.parametrize("gzip", [False, True])
def test_equal_prompts_give_equal_bytes(tmp_path: Path, gzip: bool) -> None:
    write_prompt_shards(ODD_PROMPTS, tmp_path / "a", samples_per_shard=4, gzip=gzip)
    time.sleep(1.1)  # time stamps in tar and gzip count whole seconds
    write_prompt_shards(ODD_PROMPTS, tmp_path / "b", samples_per_shard=4, gzip=gzip)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_line_breaks_at_the_end_do_not_belong_to_a_prompt(tmp_path: Path) -> None:
    write_prompt_shards(["a\n", "b\r\n", "c \n\n", "d\ne"], tmp_path)
    assert read_prompts(tmp_path) == ["a", "b", "c ", "d\ne"]


@pytest.mark.parametrize("limit", [10_240, 20_480, 51_200])
def test_bytes_per_shard(tmp_path: Path, limit: int) -> None:
    prompts = ["x" * 600] * 100  # 3 blocks each
    written = write_prompt_shards(prompts, tmp_path, bytes_per_shard=limit)
    sizes = [path.stat().st_size for path in written.paths]
    assert max(sizes) == limit
    assert len(sizes) == -(-100 // ((limit - 1024) // 1536))
    assert read_prompts(tmp_path) == prompts


def test_a_prompt_beyond_the_limit_has_a_shard_of_its_own(tmp_path: Path) -> None:
    written = write_prompt_shards(["a", "x" * 30_000, "b"], tmp_path, bytes_per_shard=1)
    assert len(written.paths) == 3


def test_names_sort_as_numbers() -> None:
    assert shard_names(2, "p", False) == ["p-0000.tar", "p-0001.tar"]
    many = shard_names(10_001, "p", True)
    assert many == sorted(many)
    assert many[-1] == "p-10000.tar.gz"


def test_existing_shards_are_refused_or_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "prompts-notes.txt").write_text("keep")
    write_prompt_shards(["a", "b", "c"], tmp_path, samples_per_shard=1)
    before = digests(tmp_path)
    with pytest.raises(OutputError, match=r"holds 3 shard\(s\) named prompts-\*, prompts-0000.tar first"):
        write_prompt_shards(["d"], tmp_path)
    assert digests(tmp_path) == before
    write_prompt_shards(["e"], tmp_path, prefix="other")
    write_prompt_shards(["d"], tmp_path, gzip=True, overwrite=True)
    assert listing(tmp_path) == ["other-0000.tar", "prompts-0000.tar.gz", "prompts-notes.txt"]
    assert sorted(read_prompts(tmp_path)) == ["d", "e"]


class Stop(Exception):
    pass


@pytest.mark.parametrize("existing", [False, True])
def test_an_error_under_way_leaves_everything_as_it_was(tmp_path: Path, existing: bool) -> None:
    if existing:
        write_prompt_shards(["old"], tmp_path / "out")
    before = digests(tmp_path / "out") if existing else None

    def failing() -> Iterator[str]:
        yield from ["a", "b", "c"]
        raise Stop

    with pytest.raises(Stop):
        write_prompt_shards(failing(), tmp_path / "out", samples_per_shard=1, overwrite=True)
    assert (digests(tmp_path / "out") if existing else (tmp_path / "out").exists()) == (before if existing else False)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "there is no prompt to write"),
        (["a", " "], "prompt 1 is an empty prompt"),
        (["a", "b", 3], r"prompt 2 is 3 \(int\); expected a string"),
        ([b"a"], r"prompt 0 is b'a' \(bytes\)"),
        (["\ud800"], "prompt 0 is not valid Unicode"),
        (["x" * 70_000], "prompt 0 is a prompt of 70,000 bytes"),
    ],
)
def test_unusable_prompts(tmp_path: Path, prompts: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_prompt_shards(prompts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unusable_arguments(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file; expected a folder"):
        write_prompt_shards(["a"], tmp_path / "file")
    with pytest.raises(OutputError, match="cannot be written"):
        write_prompt_shards(["a"], tmp_path / "file" / "out")
    with pytest.raises(DataError, match="expected one of them"):
        write_prompt_shards(["a"], tmp_path, samples_per_shard=1, bytes_per_shard=1)
    with pytest.raises(DataError, match="samples_per_shard is 0"):
        write_prompt_shards(["a"], tmp_path, samples_per_shard=0)
    with pytest.raises(DataError, match=r"prefix is '\.\./x'"):
        write_prompt_shards(["a"], tmp_path, prefix="../x")


def test_a_write_that_the_system_refuses(tmp_path: Path) -> None:
    """A limit on file sizes fails in write(2), as a full disk does."""
    write_prompt_shards(["old"], tmp_path / "out")
    before = digests(tmp_path / "out")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OutputError, match="failed: File too large; free space and retry"):
            write_prompt_shards(["new"] * 100, tmp_path / "out", overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert digests(tmp_path / "out") == before


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "p.txt"
    source.write_bytes(b"\xef\xbb\xbfone\n\ntwo\r\ncaf\xe9\none\nthree")
    out = str(tmp_path / "out")
    assert main([str(source), out]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {source}: line 4 is not UTF-8: byte 0xe9")
    assert not (tmp_path / "out").exists()

    assert main([str(source), out, "--skip-bad-lines", "--drop-duplicates", "--samples-per-shard", "2"]) == 0
    report = capsys.readouterr().out
    assert "prompts written    3 in" in report
    assert "shards             2 (prompts-0000.tar … prompts-0001.tar" in report
    assert "empty lines        1 left out" in report
    assert "duplicates         1 dropped" in report
    assert "unusable lines     1 left out" in report
    assert "line 4 is not UTF-8" in report
    assert read_prompts(out) == ["one", "two", "three"]

    assert main([str(source), out, "--skip-bad-lines"]) == 2
    assert "holds 2 shard(s)" in capsys.readouterr().err
    assert main([str(source), out, "--skip-bad-lines", "--overwrite", "--gzip", "--bytes-per-shard", "1M"]) == 0
    assert listing(tmp_path / "out") == ["prompts-0000.tar.gz"]
    assert read_prompts(out) == ["one", "two", "one", "three"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("missing.txt", "missing.txt does not exist"), ("s.tar", "is no .txt file"), ("empty.txt", "is empty (0 bytes)")],
)
def test_command_on_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str) -> None:
    (tmp_path / "s.tar").write_bytes(b"x")
    (tmp_path / "empty.txt").touch()
    assert main([str(tmp_path / name), str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5M", "5X"])
def test_command_on_bad_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str) -> None:
    for option in ("--samples-per-shard", "--bytes-per-shard"):
        assert main(["p.txt", str(tmp_path), f"{option}={value}"]) == 2
        assert f"argument {option}" in capsys.readouterr().err


def test_help_needs_no_heavy_imports() -> None:
    code = (
        "import sys, runpy; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'webdataset', 'pytorch_lightning'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=SCRIPT.parents[3]
    )
    assert done.returncode == 0, done.stderr
    assert "--samples-per-shard" in done.stdout
