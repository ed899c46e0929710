"""Spoilt shards, LoRA files, model folders and checkpoints through their readers; see tests/fuzz/inputs.py."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.inputs import TARGETS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the guard reads Linux's /proc")
ROOT = Path(__file__).resolve().parents[1]


def _campaign(target: str, cases: int, seed: int) -> None:
    words = [target, "--cases", str(cases), "--seed", str(seed)]
    command = [sys.executable, "-m", "tests.fuzz.inputs", *words]  # of its own: the guard's limits cannot be taken back
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert not result["broken"], "\n".join(result["broken"][:20])
    assert sum(result["outcomes"].values()) == cases
    assert result["outcomes"]["refused"]
    assert result["outcomes"]["accepted"]  # or it tests the first byte only


@pytest.mark.parametrize(
    ("target", "cases"), [("shards", 1500), ("lora", 300), ("latents", 500), ("checkpoints", 200), ("folders", 25)]
)
def test_spoilt_inputs_are_refused_or_harmless(target: str, cases: int) -> None:
    _campaign(target, cases, seed=1)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("target", "cases"),
    [("shards", 10_000), ("lora", 5_000), ("latents", 10_000), ("checkpoints", 5_000), ("folders", 500)],
)
def test_many_spoilt_inputs_are_refused_or_harmless(target: str, cases: int) -> None:
    _campaign(target, cases, seed=0)


@pytest.mark.parametrize("target", ["shards", "lora"])
def test_a_series_is_the_same_each_time(target: str, tmp_path: Path) -> None:
    contents = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        contents.append(TARGETS[target][0](random.Random("0 7"), tmp_path / name).read_bytes())
    assert contents[0] == contents[1]
