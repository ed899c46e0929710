"""The benchmark of data throughput at a small size: its own checks (each once, the same order), and its report."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.data_throughput import main


def test_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--prompts", "2048", "--shards", "16", "--ranks", "2", "--workers", "2", "--folder", str(tmp_path)]
    result = main([*sizes, "--compared", "500"])
    assert result.times_seen == (1, 1)
    assert result.same_order >= 500
    assert [passage.prompts for passage in result.ranks] == [1024, 1024]
    assert all(len(passage.memory) == 2 for passage in result.ranks)
    assert all(0 < own <= proportional < 1 << 30 for passage in result.ranks for proportional, own in passage.memory)
    assert list(tmp_path.iterdir()) == []
    text = capsys.readouterr().out
    assert "2,048 prompts in 16 shards" in text
    assert "each prompt seen 1 to 1 times an epoch" in text
