"""What the Slurm test says where two runs differ (tests/slurm/compare.py)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from slurm.compare import differences

PARTS = ["metrics.csv", "validation.csv", "export", "last checkpoint"]


def make_run(folder: Path, order: str = "ab", seconds: float = 1.0) -> Path:
    checkpoint = folder / "checkpoints" / "step_000020"
    for place in (checkpoint, folder / "export"):
        place.mkdir(parents=True)
    (folder / "metrics.csv").write_text(f"step,reward,seconds\n1,0.25,{seconds}\n2,0.5,{seconds}\n")
    (folder / "validation.csv").write_text("step,reward\n8,0.75\n")
    save_file(
        {"lora.A": torch.ones(2, 3), "lora.n": torch.tensor(7)}, folder / "export" / "w.safetensors", {"k": order}
    )
    save_file({"adam": torch.tensor([[0.0, float("nan")], [1.5, 2.0]])}, checkpoint / "tensors-00000.safetensors")
    state = {"tree": {"loops": [{"batches": 8}, {}], "name": "x" * 200}, "tensors": {}}
    (checkpoint / "state.json").write_text(json.dumps(state))
    return folder


def test_runs_that_are_the_same(tmp_path: Path) -> None:
    """Times, and what the exported file says beside its tensors, may differ."""
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other", order="ba", seconds=2.0)
    assert differences(one, other, 20) == {part: [] for part in PARTS}


def _edit(file: str, old: str, new: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        text = (run / file).read_text()
        assert old in text
        (run / file).write_text(text.replace(old, new))

    return change


def _tensor(file: str, **tensors: torch.Tensor) -> Callable[[Path], None]:
    return lambda run: save_file({name.replace("_", "."): value for name, value in tensors.items()}, run / file)


STATE, ADAM = "checkpoints/step_000020/state.json", "checkpoints/step_000020/tensors-00000.safetensors"


@pytest.mark.parametrize(
    ("part", "change", "told"),
    [
        ("metrics.csv", _edit("metrics.csv", "2,0.5,", "2,0.5000001,"), ["row 2, reward: '0.5000001', expected '0.5'"]),
        ("metrics.csv", lambda run: (run / "metrics.csv").unlink(), ["metrics.csv: not in {run}"]),
        (
            "validation.csv",
            _edit("validation.csv", "8,0.75\n", ""),
            ["row 1, step: not there, expected '8'", "row 1, reward: not there, expected '0.75'"],
        ),
        (
            "validation.csv",
            _edit("validation.csv", "reward", "score"),
            ["row 1, reward: not there, expected '0.75'", "row 1, score: '0.75', expected not to be there"],
        ),
        ("last checkpoint", _edit(STATE, '"batches": 8', '"batches": 9'), ["tree.loops.0.batches: 9, expected 8"]),
        ("last checkpoint", _edit(STATE, "x" * 200, "x" * 199), [f"tree.name: '{'x' * 39}…{'x' * 17}', expected"]),
        ("last checkpoint", _edit(STATE, ", ", ",  "), ["every value is the same, but not every byte"]),
        ("last checkpoint", lambda run: (run / STATE).unlink(), [f"{STATE}: not in {{run}}"]),
        (
            "last checkpoint",
            _tensor(ADAM, adam=torch.tensor([[-0.0, float("nan")], [1.5, 3.0]])),
            ["adam [2, 2]: 2 of 4 values, the first at 0: -0.0, expected 0.0"],
        ),
        (
            "export",
            _tensor("export/w.safetensors", lora_A=torch.ones(3, 2), lora_n=torch.tensor(8), lora_B=torch.ones(1)),
            [
                "lora.B: 'a tensor', expected not to be there",
                "lora.A: F32 [3, 2], expected F32 [2, 3]",
                "lora.n []: 1 of 1 values, the first at 0: 8, expected 7",
            ],
        ),
    ],
)
def test_a_difference_is_told_with_its_place_and_both_values(
    tmp_path: Path, part: str, change: Callable[[Path], None], told: list[str]
) -> None:
    run, reference = make_run(tmp_path / "run"), make_run(tmp_path / "reference")
    change(run)
    found = differences(run, reference, 20)
    assert [name for name, lines in found.items() if lines] == [part]
    assert len(found[part]) == len(told)
    for line, words in zip(found[part], told, strict=True):
        assert words.format(run=run / Path(STATE).parent if "state" in words else run) in line


def test_many_differences_are_counted_and_nothing_to_compare_is_one(tmp_path: Path) -> None:
    run, reference = make_run(tmp_path / "run"), make_run(tmp_path / "reference")
    rows = "".join(f"{step},0.1\n" for step in range(100))
    (run / "validation.csv").write_text("step,reward\n" + rows)
    lines = differences(run, reference, 20)["validation.csv"]
    assert len(lines) == 9
    assert lines[-1] == "validation.csv: and 192 more"
    assert differences(run, reference, 21)["last checkpoint"] == ["no such file in either run"]
