"""Spoilt ``.nemo`` files through the whole way from file to reward; see tests/fuzz and docs/security.md."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nemo_aligner_diffusion.rewards import restore_reward
from tests.fuzz.campaign import broken_properties, run_campaign
from tests.fuzz.cases import all_categories, make_case
from tests.fuzz.seeds import seeds

# Peak memory is read from /proc, and audit events are only as complete as on CPython.
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the guard reads Linux's /proc")


def _campaign(count: int, seed: int) -> None:
    results = run_campaign(count, seed)
    broken = broken_properties(results)
    assert not broken, "\n".join(broken[:20])
    assert [result["number"] for result in results] == list(range(count))
    assert {result["category"] for result in results} == {category.name for category in all_categories()}
    # A fuzzer whose every case is refused at the first byte tests that byte only.
    messages = {result["message"].partition("archive")[2][:120] for result in results if result["outcome"] == "refused"}
    assert len(messages) > 40
    assert 0.02 < sum(result["outcome"] == "accepted" for result in results) / count < 0.3


def test_spoilt_archives_are_refused_or_harmless() -> None:
    _campaign(400, seed=1)


@pytest.mark.nightly
def test_ten_thousand_spoilt_archives_are_refused_or_harmless() -> None:
    _campaign(10_000, seed=0)


def test_the_series_is_the_same_each_time_and_its_seeds_are_good(tmp_path: Path) -> None:
    for number in (0, 17, 123):
        assert make_case(number, seed=3).content == make_case(number, seed=3).content
    assert make_case(123, seed=3).content != make_case(123, seed=4).content
    for name, seed in seeds().items():
        (tmp_path / f"{name}.nemo").write_bytes(seed.pack())
        restore_reward(tmp_path / f"{name}.nemo")
