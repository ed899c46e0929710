"""Scalars of ``model_config.yaml`` mean what they mean to OmegaConf, with which NeMo writes and reads it."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from nemo_aligner_diffusion.evaluation.run_files import read_run
from nemo_aligner_diffusion.formats.nemo.config import parse_config
from nemo_aligner_diffusion.formats.yaml_reader import parse_yaml

_SPELLINGS = """0 1 -1 +3 007 0o17 08 0x1F -0x1f 0b101 0x 0_ 0_0 00 -0 +0 1_000 1__0 1. .5 1.5 1e5 1e-5 1E+5 -1.5e3 1.e3
.5e3 .5e-3 1_0.5 1e5_0 .inf -.inf +.INF .Inf .nan .NaN NaN nan NAN inf yes No ON off oFF TRUE true True y n ~ null Null
NULL nUll 2020-01-01 + . .. -. +. e5 1e 1e+ 0.0 -0.0 1-2 12abc 0x1G 123456789012345678901234567890 __1 _1 1_ 0_x 1e400
0_8 09 0.1.2 +1e3 ??? None -e5 'yes' '1' "0x1F" "" a:b"""
SPELLINGS = _SPELLINGS.split()

PLAIN: Any = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**15), 10**15)
    | st.floats(allow_nan=False)
    | st.text("aZ09 éß漢😀\n\t:#-{}[]'\"!&*?|>%@,~_.+ex", max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc_", min_size=1), inner, max_size=3),
    max_leaves=12,
)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, float) and isinstance(right, float) and math.isnan(left) and math.isnan(right):
        return True
    return type(left) is type(right) and left == right


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_plain_scalars(spelling: str) -> None:
    theirs = OmegaConf.to_container(OmegaConf.create(f"a: {spelling}"), resolve=False)
    ours = parse_config(f"a: {spelling}".encode())
    assert isinstance(theirs, dict)
    assert same(ours["a"], theirs["a"]), (ours, theirs)


@given(st.dictionaries(st.text("abc_", min_size=1), PLAIN, max_size=5))
def test_whatever_omegaconf_writes(values: dict[str, Any]) -> None:
    text = OmegaConf.to_yaml(OmegaConf.create(values))
    if text.strip() in ("", "{}"):
        return
    assert parse_config(text.encode()) == OmegaConf.to_container(OmegaConf.create(text), resolve=False)


@pytest.mark.parametrize("spelling", ["1:30", "190:20:30", "1:30.5", "1" + ":1" * 100_000, "9" * 100_000])
def test_numbers_that_take_time_stay_text(spelling: str) -> None:
    """Base 60 is YAML 1.1's, and takes time in the square of its length; nobody writes a configuration in it."""
    assert parse_config(f"a: {spelling}".encode()) == {"a": spelling}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "duplicate key 'a'"),
        ("a: {1: x, 1: y}\n", "duplicate key '1'"),
        ("a: {2305843009213693951: x}\n", "no short string or number"),
        ("a: {[1]: x}\n", "no short string or number"),
        ("a: {true: x}\n", "no short string or number"),
        ("<<: {a: 1}\n", "merges mappings"),
        ("a: 1\n---\nb: 2\n", "second document"),
        ("a: &x 1\n", "anchor"),
        ("a: !!int 1\n", "tag"),
        ("1: a\n", "strings for keys"),
    ],
)
def test_what_no_archive_needs(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config(text.encode())


def test_aliases_count_as_what_they_stand_for() -> None:
    """A run's YAML may use them; eight lines of ten aliases each would be 10^9 values."""
    text = "base: &b {lr: 1e-4, steps: [1, 2]}\none: {<<: *b, lr: 2}\ntwo: *b\n"
    assert parse_yaml(text.encode()) == OmegaConf.to_container(OmegaConf.create(text))
    parsed = parse_yaml(text.encode())
    assert parsed["base"]["steps"] is not parsed["two"]["steps"]
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]" for n in range(8)]
    started = time.process_time()
    with pytest.raises(ValueError, match="counting what its aliases stand for"):
        parse_yaml("\n".join(lines).encode())
    with pytest.raises(ValueError, match="not yet complete"):
        parse_yaml(b"a: &a [*a]")
    assert time.process_time() - started < 1


def test_a_strangers_run_is_read_in_bounds(tmp_path: Path) -> None:
    """generate.py --lora STRANGER/export reads the config.yaml beside the export."""
    bomb = ["a0: &a0 [" + ", ".join(["x"] * 10) + "]"]
    bomb += [f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]" for n in range(8)]
    (tmp_path / "config.yaml").write_text("\n".join(bomb))
    os.mkfifo(tmp_path / "run.json")
    (tmp_path / "startup.json").write_text("[" * 100_000)
    run = read_run(tmp_path)
    assert run.config == run.run == run.startup == {}
    assert [problem.split()[0] for problem in run.problems] == ["config.yaml", "startup.json"]
    assert all(problem.isprintable() for problem in run.problems)
