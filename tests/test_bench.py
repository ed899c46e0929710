"""``make bench``: what it counts, times and divides; and a round of it without the peers' environment."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import turns
from benchmarks.bench import FLOOR, main, seconds_until, table_of_steps, table_of_times

ROOT = Path(__file__).resolve().parents[1]
KEYS = ["seconds", "phases", "peak", "processor"]


def test_a_step_is_the_sum_of_its_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[dict[str, Any]] = []
    worker = turns.Worker(["validate\n", "step\n", "validate\n"], answers.append)
    decoder = nn.Conv2d(4, 3, 1)
    worker.watch(decoder)
    decoder(torch.zeros(1, 4, 8, 8))  # outside of a step
    assert worker.next_step(lambda: {"reward": 1.0}) is False
    moments = itertools.count(1.0)
    monkeypatch.setattr(turns.time, "perf_counter", lambda: next(moments) ** 2)
    worker._since = 0.0
    latents = torch.zeros(1, 4, 8, 8, requires_grad=True)  # rollout until 1
    reward = decoder(latents * 2).mean()  # decoding from 1 on
    reward.backward()  # the decoder's part until 4
    worker.enter("optimizer")  # from 9 on
    with pytest.raises(SystemExit):
        worker.next_step(lambda: {"reward": 2.0})
    assert answers[0] == {"reward": 1.0}
    assert answers[2] == {"reward": 2.0}
    assert list(answers[1]) == KEYS
    assert answers[1]["phases"] == {"rollout": 1.0, "decode + reward": 3.0, "backward": 5.0, "optimizer": 7.0}
    assert answers[1]["seconds"] == 16.0
    assert answers[1]["peak"] > 1e7


def test_operations_of_known_layers() -> None:
    answers: list[dict[str, Any]] = []
    worker = turns.Worker(["count", "step"], answers.append)
    assert worker.next_step(dict) is True
    nn.Linear(5, 7)(torch.randn(3, 5, requires_grad=True)).sum().backward()
    nn.Conv2d(2, 4, 3, padding=1)(torch.randn(1, 2, 8, 8))
    scaled_dot_product_attention(*torch.randn(3, 1, 2, 8, 16))
    assert worker.next_step(dict) is False
    linear, convolution, attention = 2 * 3 * 5 * 7, 2 * 4 * 2 * 3 * 3 * 8 * 8, 2 * 2 * 2 * 8 * 8 * 16
    assert answers[0]["operations"] == 3 * linear + convolution + attention
    torch.ones(4, 4) @ torch.ones(4, 4)  # not counted any more
    with pytest.raises(SystemExit):
        worker.next_step(dict)
    assert list(answers[1]) == KEYS


def test_a_worker_needs_no_other_library_than_torch() -> None:
    code = "import benchmarks.turns, sys; print({'diffusers', 'transformers', 'pytorch_lightning'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT) == "set()\n"


def test_ratios_are_of_one_round() -> None:
    def answer(seconds: float) -> dict[str, Any]:
        return {
            "seconds": seconds,
            "phases": dict.fromkeys(turns.PHASES, seconds / 4),
            "peak": 5e8,
            "processor": seconds + 1,
        }

    busy = (1.0, 10.0, 2.0)  # how much slower the machine is in a round: no ratio may show it
    rounds = [
        {"peak": 4e9 / b, "DRaFT-1": answer(2 * b), "TRL AlignProp, K = 1": answer(4 * b), FLOOR: answer(1 * b)}
        for b in busy
    ]
    columns, rows = table_of_steps({"rounds": rounds, "operations": dict.fromkeys(list(rounds[0])[1:], 4e9)})
    ours = dict(zip(columns, rows[0], strict=True))
    assert ours["pictures/s"] == "2.00"  # the median round takes 4 s
    assert ours["of matmul peak"] == "50 %"
    assert ours["step / TRL's of this K"] == "0.50 (0.50–0.50)"
    assert ours["in processor time"] == "0.56 (0.51–0.60)"  # 3/5, 21/41, 5/9
    assert ours["rollout / plain call's"] == "2.00 (2.00–2.00)"
    assert [row[-1] for row in rows] == ["2.00 (2.00–2.00)", "4.00 (4.00–4.00)", ""]


def test_time_to_a_reward() -> None:
    points = [(0.0, 13.0), (10.0, 13.5), (20.0, 14.5), (30.0, 14.0)]
    assert seconds_until(points, 14.0) == 15.0
    assert seconds_until(points, 15.0) == math.inf
    runs = [
        {"rate": rate, "seed": seed, "points": {"DRaFT-1": [(0, 13), (10 * rate * seed, 15)], "other": [(0, 13), late]}}
        for rate, late in ((1, (60, 15)), (2, (40, 15)), (3, (1, 13.5)))
        for seed in (1, 2, 3)
    ]
    columns, rows = table_of_times(runs, 14.0)
    assert columns[-1] == "seconds / those of other"
    assert rows[0] == ["DRaFT-1", "1", "10.00 (5.00–15.00)", "0.50 (0.25–0.75)"]
    assert rows[1] == ["other", "2", "20.00 (20.00–20.00)", "1.00 (1.00–1.00)"]
    never = [{**run, "points": {**run["points"], "other": [(0, 13), (9, 13)]}} for run in runs]
    assert [row[2:] for row in table_of_times(never, 14.0)[1]] == [["10.00 (5.00–15.00)", ""], ["inf (inf–inf)", ""]]


@pytest.mark.slow
def test_a_round_without_peers(tmp_path: Path) -> None:
    main(["--programs", "DRaFT-1", FLOOR, "--pairs", "1", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "bench.json").read_text("utf-8"))["measured"]
    (one,), operations = written["rounds"], written["operations"]
    for name in ("DRaFT-1", FLOOR):
        assert sum(one[name]["phases"].values()) == pytest.approx(one[name]["seconds"])
        assert one[name]["phases"]["rollout"] == max(one[name]["phases"].values())
    assert one["DRaFT-1"]["phases"]["backward"] > 0 == one[FLOOR]["phases"]["backward"]
    assert 1.05 * operations[FLOOR] < operations["DRaFT-1"] < 1.3 * operations[FLOOR]
    assert "| DRaFT-1 |" in (tmp_path / "bench.md").read_text("utf-8")
