"""What a run shows: whole lines in a log file, one live line on a terminal."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from tiny.training import Toy, fit

from nemo_aligner_diffusion.training.callbacks import progress
from nemo_aligner_diffusion.training.callbacks.progress import TrainingProgress
from nemo_aligner_diffusion.training.checkpoints.resume import find_resume_point

LINE = re.compile(r"step \d+/\d+  reward -?[\d.]+  KL [\d.e+-]+  \d+\.\d\d images/s  (\d+:\d\d left|took .*)")


@pytest.mark.parametrize("reward", ["reward", "reward (only watches)"])
def test_a_log_file_gets_whole_lines(tmp_path: Path, reward: str) -> None:
    stream, module = io.StringIO(), Toy()
    module.reward_is = reward
    fit(tmp_path, module, 5, accumulate=2, val_every=4, progress=TrainingProgress(stream=stream))
    text = stream.getvalue()
    assert "\r" not in text
    assert "\x1b" not in text
    lines = text.splitlines()
    steps = [line for line in lines if line.startswith("step")]
    assert [line.split()[1] for line in steps] == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    assert all(LINE.fullmatch(line) for line in steps)
    assert "left" in steps[0]
    assert "took" in steps[-1]
    validation = [line for line in lines if line.startswith("validation")]
    assert len(validation) == 1
    line = rf"validation at step 4: {re.escape(reward)} -\d+\.\d{{4}}, base -1\.5000 \([+-]\d+\.\d{{4}}\)"
    assert re.fullmatch(line, validation[0])
    assert len(lines) == 6


def test_a_long_run_is_brief(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(progress, "SHORT_RUN", 10)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 3600.0)
    fit(tmp_path, Toy(), 30, progress=TrainingProgress(stream=stream))
    assert re.findall(r"^step +(\d+)/30 ", stream.getvalue(), re.MULTILINE) == ["1", "30"]
    assert len(stream.getvalue().splitlines()) == 2


def test_a_resumed_run_says_so_and_counts_on(tmp_path: Path) -> None:
    fit(tmp_path, Toy(), 3)
    stream = io.StringIO()
    resume = find_resume_point(tmp_path / "checkpoints")
    fit(tmp_path, Toy(), 5, resume=resume, progress=TrainingProgress(stream=stream))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "resuming at step 3 of 5"
    assert [line.split()[1] for line in lines[1:]] == ["4/5", "5/5"]


def test_a_terminal_gets_one_live_line(tmp_path: Path) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    fit(tmp_path, Toy(), 5, val_every=5, progress=TrainingProgress(stream=stream))
    text = stream.getvalue()
    assert "\r" in text
    redrawn = text.split("\r")
    assert any(re.search(r"training 5/5 \|.*reward -[\d.]+  KL 0  .*images/s \[", part) for part in redrawn)
    assert any("validation at step 5: reward" in part for part in redrawn)
    assert text.count("\n") <= 3  # the validation's line and the bar's end
