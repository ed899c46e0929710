"""Loader workers that stop, die or are slow: real processes, real signals."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from tiny.prompts import LONGER, prompts_of, uneven_shards

from nemo_aligner_diffusion.data.prompts import build_prompt_loader
from nemo_aligner_diffusion.errors import DataError


def gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # the second: it went between opening and reading
        return True


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.alone
def test_a_stopped_worker_is_an_error_that_names_it(tmp_path: Path) -> None:
    uneven_shards(tmp_path, LONGER)
    loader = build_prompt_loader(
        tmp_path, micro_batch_size=1, num_workers=2, rank=2, world_size=4, worker_timeout_seconds=5
    )
    stream = iter(loader)
    for _ in range(4):
        next(stream)
    first, second = loader.worker_processes
    os.kill(second, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(DataError) as caught:
        list(islice(stream, 20))
    assert time.monotonic() - started > 4
    message = str(caught.value)
    assert (
        f"data worker 1 (process {second}) of data rank 2 did not give its next batch within 5 s and was killed"
        in message
    )
    assert re.search(r"it was to read samples (\d+) to \1 of the run, from .*s\d\.tar", message)
    assert "model.data.worker_timeout_seconds" in message
    wait_for(lambda: gone(first) and gone(second))


@pytest.mark.alone
def test_a_slow_worker_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    uneven_shards(tmp_path, LONGER)
    options: dict[str, Any] = {"micro_batch_size": 2, "epochs": 1}
    loader = build_prompt_loader(tmp_path, num_workers=1, worker_timeout_seconds=30, **options)
    stream = iter(loader)
    seen = list(next(stream)["prompts"])
    (pid,) = loader.worker_processes
    lines: list[str] = []

    def go_on_once_it_is_said() -> None:
        def said() -> list[str]:
            return [text for record in caplog.records if "has waited" in (text := record.getMessage())]

        wait_for(lambda: bool(said()))
        time.sleep(1.6)  # two more looks of the watch: it says it once
        lines.extend(said())
        os.kill(pid, signal.SIGCONT)

    os.kill(pid, signal.SIGSTOP)
    threading.Thread(target=go_on_once_it_is_said).start()
    with caplog.at_level(logging.WARNING):
        seen += prompts_of(stream)
    assert seen == prompts_of(build_prompt_loader(tmp_path, **options))
    (line,) = lines
    assert re.match(
        rf"data rank 0 has waited 3.0 s for a batch of data worker 0 \(process {pid}\): samples \d+ to .*tar", line
    )


@pytest.mark.alone
def test_a_killed_worker_is_an_error_that_names_it(tmp_path: Path) -> None:
    uneven_shards(tmp_path, LONGER)
    loader = build_prompt_loader(tmp_path, micro_batch_size=1, num_workers=2, worker_timeout_seconds=20)
    stream = iter(loader)
    next(stream)
    victim = loader.worker_processes[1]
    with contextlib.suppress(RuntimeError):  # torch reports a death wherever the program stands, so perhaps here
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: gone(victim))
        time.sleep(0.5)
    with pytest.raises(DataError, match=rf"data worker of data rank 0 is gone: \(pid(\(s\))? {victim}\)"):
        list(islice(stream, 100))


@pytest.mark.alone
def test_the_wall_clock_may_jump(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An hour back and a day forward at every look at it: nothing is late, and the order is the same."""
    uneven_shards(tmp_path, LONGER)
    options: dict[str, Any] = {"micro_batch_size": 2, "epochs": 1}
    expected = prompts_of(build_prompt_loader(tmp_path, **options))
    real, jumps = time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: real() + (86_400 if next(jumps) % 2 else -3_600))
    with caplog.at_level(logging.WARNING):
        assert (
            prompts_of(build_prompt_loader(tmp_path, num_workers=2, worker_timeout_seconds=30, **options)) == expected
        )
    assert "has waited" not in caplog.text


def test_timeouts_that_do_not_fit(tmp_path: Path) -> None:
    uneven_shards(tmp_path, LONGER)
    for value in (-1.0, float("nan")):
        with pytest.raises(DataError, match="worker_timeout_seconds is"):
            build_prompt_loader(tmp_path, micro_batch_size=1, worker_timeout_seconds=value)
