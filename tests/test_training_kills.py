"""Real runs, killed by SIGKILL at random moments and resumed: the benchmark's 20 and more, a few of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kills", "seed"), [(1, 5, 100), (2, 2, 101)])
def test_killed_runs_end_as_undisturbed_ones(tmp_path: Path, processes: int, kills: int, seed: int) -> None:
    command = [sys.executable, "-m", "benchmarks.kills", "--kills", str(kills), "--processes", str(processes)]
    command += ["--seed", str(seed), "--folder", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{kills} killed, {kills} equal to the undisturbed run" in result.stdout
