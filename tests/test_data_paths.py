"""Where the prompts are: every way of naming files, and what is said about names that lead nowhere."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from tiny.prompts import tar

from nemo_aligner_diffusion.data.paths import expand_paths
from nemo_aligner_diffusion.errors import DataError


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """prompts-0000.tar … prompts-0003.tar, sub/more.tar.gz, a hidden half-written shard and a readme."""
    for number in range(4):
        tar(tmp_path / f"prompts-{number:04d}.tar", {"0.txt": f"p{number}"})
    (tmp_path / "sub").mkdir()
    tar(tmp_path / "sub" / "more.tar.gz", {"0.txt": "m"}, "w:gz")
    (tmp_path / ".prompts-x.partial").mkdir()
    tar(tmp_path / ".prompts-x.partial" / "0.tar", {"0.txt": "half"})
    (tmp_path / "README.txt").write_text("not a prompt\n")
    return tmp_path


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


FOUR = [f"prompts-{number:04d}.tar" for number in range(4)]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("prompts-0001.tar", ["prompts-0001.tar"]),
        ("", [*FOUR, "more.tar.gz"]),  # the folder itself
        ("prompts-*.tar", FOUR),
        ("**/*.tar.gz", ["more.tar.gz"]),
        ("prompts-{0000..0003}.tar", FOUR),
        ("prompts-{0003..0000}.tar", FOUR[::-1]),
        ("prompts-000{1,3}.tar", [FOUR[1], FOUR[3]]),
        ("{prompts-000[01],sub/mo*}.tar*", [FOUR[0], FOUR[1], "more.tar.gz"]),
        ("README.txt", ["README.txt"]),
    ],
)
def test_one_string(shards: Path, spec: str, expected: list[str]) -> None:
    assert names(expand_paths(f"{shards}/{spec}")) == expected


def test_lists_and_commas(shards: Path) -> None:
    both = [f"{shards}/sub", shards / "prompts-0002.tar"]
    assert names(expand_paths(both)) == ["more.tar.gz", "prompts-0002.tar"]
    assert names(expand_paths(f"{shards}/sub , {shards}/prompts-000{{2,3}}.tar")) == ["more.tar.gz", *FOUR[2:]]


def test_configuration_lists_are_lists(shards: Path) -> None:
    from omegaconf import OmegaConf

    config = OmegaConf.create({"paths": [f"{shards}/prompts-0000.tar", f"{shards}/sub"]})
    assert names(expand_paths(config.paths)) == ["prompts-0000.tar", "more.tar.gz"]


@pytest.mark.parametrize("name", ["with, comma.tar", "with {1..3} braces.tar", "with [brackets].tar", "it's 100%.tar"])
def test_an_existing_name_is_no_pattern(tmp_path: Path, name: str) -> None:
    file = tar(tmp_path / name, {"0.txt": "p"})
    assert expand_paths(str(file)) == [file]


def test_a_folder_of_text_files(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("b\n")
    (tmp_path / "a.txt").write_text("a\n")
    assert names(expand_paths(tmp_path)) == ["a.txt", "b.txt"]


def test_named_twice_is_read_once(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert names(expand_paths([f"{shards}/prompts-*.tar", f"{shards}/prompts-0001.tar"])) == FOUR
    assert "prompts-0001.tar is named more than once" in caplog.text


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("{0}/nowhere/x.tar", ["nowhere/x.tar does not exist", "the folder {0} does exist"]),
        ("{0}/*.tgz", ["*.tgz matches nothing"]),
        ("{0}/prompts-{{0000..0007}}.tar", ["names 8 files, of which 4 do not exist", "prompts-0004.tar", "…"]),
        ("{0}/prompts-{{0..3.tar", ["unbalanced braces"]),
        ("{0}/prompts-{{0..99999999999}}.tar", ["more than 1,000,000 files"]),
        ("https://example.org/x.tar", ["not a local path"]),
        ("pipe:cat {0}/prompts-0000.tar", ["not a local path"]),
        ("", ["no prompt path was given"]),
        ("  ", ["no prompt path was given"]),
        (None, ["no prompt path was given"]),
        ([], ["no prompt path was given"]),
        (7, ["7 (int)", "expected a path or a list"]),
        (["{0}", 7], ["7 (int)"]),
        (["{0}", ""], ["empty path"]),
        ({"path": "x"}, ["(dict)"]),
    ],
)
def test_what_cannot_be_found(shards: Path, spec: object, parts: list[str]) -> None:
    if isinstance(spec, str):
        spec = spec.format(shards)
    elif isinstance(spec, list):
        spec = [item.format(shards) if isinstance(item, str) else item for item in spec]
    with pytest.raises(DataError) as caught:
        expand_paths(spec)  # type: ignore[arg-type]
    for part in parts:
        assert part.format(shards) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_empty_file_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no prompt file; expected \.tar"):
        expand_paths(tmp_path)
    (tmp_path / "a.tar").touch()
    with pytest.raises(DataError, match=r"a.tar is empty \(0 bytes\)"):
        expand_paths(tmp_path)


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        expand_paths(tmp_path / "a.tar")
