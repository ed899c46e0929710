"""Checkpoints: resuming is exact, only what was trained is saved, damage is survived."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny.training import Toy, fit

from nemo_aligner_diffusion.errors import CheckpointError
from nemo_aligner_diffusion.runtime.signals import Interruption
from nemo_aligner_diffusion.training.callbacks.ema import EMACallback
from nemo_aligner_diffusion.training.callbacks.interruption import InterruptionCallback
from nemo_aligner_diffusion.training.callbacks.settings import EMASettings
from nemo_aligner_diffusion.training.checkpoints.resume import check_fits, find_resume_point


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _state(module: Toy, trainer: Any, ema: EMACallback | None = None) -> dict[str, torch.Tensor]:
    tensors = {f"weights.{name}": p.detach().clone() for name, p in module.named_parameters()}
    for index, slots in trainer.optimizers[0].state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value).clone() for key, value in slots.items()}
    if ema is not None:
        tensors |= {f"ema.{name}": value.clone() for name, value in ema.state_dict()["average"].items()}
    return tensors


DETERMINISTIC = ("step", "reward", "loss", "grad_norm", "lr")  # the rest are times and memory


@pytest.mark.parametrize(("accumulate", "val_every"), [(1, None), (3, None), (1, 2), (2, 4)])
def test_resuming_equals_never_having_stopped(tmp_path: Path, accumulate: int, val_every: int | None) -> None:
    options: dict[str, Any] = {"accumulate": accumulate, "val_every": val_every, "save_interval": 4}
    whole, whole_ema = Toy(), EMACallback(EMASettings(decay=0.9))
    trainer = fit(tmp_path / "whole", whole, 10, callbacks=[whole_ema], **options)
    expected = _state(whole, trainer, whole_ema)

    fit(tmp_path / "parts", Toy(), 4, callbacks=[EMACallback(EMASettings(decay=0.9))], **options)
    resume = find_resume_point(tmp_path / "parts" / "checkpoints")
    assert resume is not None
    assert resume.step == 4
    again, again_ema = Toy(), EMACallback(EMASettings(decay=0.9))
    # another seed: the random state must come from the checkpoint
    trainer = fit(tmp_path / "parts", again, 10, callbacks=[again_ema], resume=resume, seed=99, **options)
    actual = _state(again, trainer, again_ema)

    assert trainer.global_step == 10
    assert expected.keys() == actual.keys()
    for name in expected:
        assert torch.equal(expected[name], actual[name]), name
    for left, right in zip(
        _rows(tmp_path / "whole" / "metrics.csv"), _rows(tmp_path / "parts" / "metrics.csv"), strict=True
    ):
        assert {key: left[key] for key in DETERMINISTIC} == {key: right[key] for key in DETERMINISTIC}
    if val_every:
        validations = [_rows(tmp_path / run / "validation.csv") for run in ("whole", "parts")]
        assert validations[0] == validations[1]


@pytest.mark.parametrize("lost", ["no row", "half a row", "nothing"])
def test_a_validation_that_the_first_run_did_not_live_to_see_is_made_up_for(tmp_path: Path, lost: str) -> None:
    options: dict[str, Any] = {"save_interval": 4, "val_every": 2, "accumulate": 2}
    fit(tmp_path / "whole", Toy(), 8, callbacks=[EMACallback(EMASettings(decay=0.9))], **options)
    run = tmp_path / "parts"
    fit(run, Toy(), 4, callbacks=[EMACallback(EMASettings(decay=0.9))], **options)
    table = run / "validation.csv"
    lines = table.read_text().splitlines(keepends=True)  # header, step 2, step 4
    if lost != "nothing":  # killed between the checkpoint of step 4 and its validation; or in the middle of a write
        table.write_text("".join(lines[:-1]) + (lines[-1][:8] if lost == "half a row" else ""))
    module = Toy()
    ema = EMACallback(EMASettings(decay=0.9))
    fit(run, module, 8, callbacks=[ema], resume=find_resume_point(run / "checkpoints"), seed=3, **options)
    assert table.read_bytes() == (tmp_path / "whole" / "validation.csv").read_bytes()
    assert len(module.validated_with) == (2 if lost == "nothing" else 3)
    for left, right in zip(_rows(tmp_path / "whole" / "metrics.csv"), _rows(run / "metrics.csv"), strict=True):
        assert {key: left[key] for key in DETERMINISTIC} == {key: right[key] for key in DETERMINISTIC}


def test_a_checkpoint_holds_what_was_trained_and_loads_safely(tmp_path: Path) -> None:
    module = Toy()
    fit(tmp_path, module, 3, callbacks=[EMACallback(EMASettings(decay=0.999))])
    path = tmp_path / "checkpoints" / "step_000003"
    assert sorted(file.name for file in path.iterdir()) == [
        "manifest.json",
        "state.json",
        "tensors-00000.safetensors",
    ]
    tensors = load_file(path / "tensors-00000.safetensors")
    assert {name for name in tensors if "/" not in name} == {"adapter.weight", "adapter.bias"}
    assert torch.equal(tensors["adapter.weight"], module.adapter.weight)
    assert tensors["optimizer_states/0/state/adapter.weight/exp_avg"].shape == module.adapter.weight.shape
    assert "callbacks/EMACallback/average/adapter.bias" in tensors
    state = json.loads((path / "state.json").read_text())
    assert state["tree"]["global_step"] == 3
    assert (tmp_path / "checkpoints" / "last").read_text() == "step_000003\n"
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")] == []


def test_the_newest_are_kept_and_the_best(tmp_path: Path) -> None:
    fit(tmp_path / "all", Toy(), 8, save_interval=2, checkpoint={"keep_last_n": None})
    assert _names(tmp_path / "all") == [2, 4, 6, 8]
    fit(tmp_path / "two", Toy(), 8, save_interval=2, checkpoint={"keep_last_n": 2})
    assert _names(tmp_path / "two") == [6, 8]

    class Falling(Toy):  # the earlier, the better
        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            self.last_validation = {"reward": -float(self.global_step), "base_reward": 0.0}

    fit(tmp_path / "best", Falling(), 8, save_interval=2, val_every=2, checkpoint={"keep_last_n": 1, "save_top_k": 1})
    assert _names(tmp_path / "best") == [2, 8]


def test_a_score_that_came_after_a_restart_counts(tmp_path: Path) -> None:
    """The best step is validated by the run that resumes from it."""

    class Second(Toy):  # is the best
        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            self.last_validation = {"reward": -abs(self.global_step - 2.0), "base_reward": 0.0}

    keep = {"keep_last_n": 1, "save_top_k": 1}
    fit(tmp_path, Second(), 2, save_interval=2, checkpoint=keep)  # ended between the checkpoint and the validation
    resume = find_resume_point(tmp_path / "checkpoints")
    fit(tmp_path, Second(), 6, save_interval=2, val_every=2, checkpoint=keep, resume=resume, seed=None)
    assert _names(tmp_path) == [2, 6]


def _names(run_dir: Path) -> list[int]:
    return sorted(int(path.name.split("_")[1]) for path in (run_dir / "checkpoints").glob("step_??????"))


def _damage(folder: Path, kind: str) -> None:
    tensors, state = folder / "tensors-00000.safetensors", folder / "state.json"
    content = tensors.read_bytes()
    if kind == "truncated":
        tensors.write_bytes(content[: len(content) // 2])
    elif kind == "altered":  # one bit of the last number
        tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif kind == "altered state":
        state.write_bytes(state.read_bytes().replace(b'"global_step": 6', b'"global_step": 7'))
    elif kind == "lost file":
        tensors.unlink()
    elif kind == "no manifest":
        (folder / "manifest.json").unlink()
    elif kind == "half a manifest":
        manifest = (folder / "manifest.json").read_bytes()
        (folder / "manifest.json").write_bytes(manifest[: len(manifest) // 2])
    elif kind == "empty":
        for file in folder.iterdir():
            file.write_bytes(b"")
    else:
        (folder / "manifest.json").write_text('{"format": 3, "files": {}}')


@pytest.mark.parametrize(
    "kind",
    ["truncated", "altered", "altered state", "lost file", "no manifest", "half a manifest", "empty", "of the future"],
)
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    fit(tmp_path / "whole", whole := Toy(), 8)
    run = tmp_path / "run"
    fit(run, Toy(), 6, save_interval=3)
    _damage(run / "checkpoints" / "step_000006", kind)

    with caplog.at_level(logging.WARNING):
        resume = find_resume_point(run / "checkpoints")
    assert resume is not None
    assert resume.step == 3
    assert "step_000006 cannot be read (it" in caplog.text
    assert "resuming from step_000003 instead" in caplog.text
    again = Toy()
    fit(run, again, 8, resume=resume, save_interval=3)
    assert torch.equal(again.adapter.weight, whole.adapter.weight)
    assert [row["step"] for row in _rows(run / "metrics.csv")] == [str(step) for step in range(1, 9)]
    assert _names(run) == [6, 8]  # step 6 was written anew; the damaged one stands aside
    assert (run / "checkpoints" / "step_000006.unused").exists()


def test_no_readable_checkpoint(tmp_path: Path) -> None:
    assert find_resume_point(tmp_path / "nowhere") is None
    for step in (1, 2):
        (tmp_path / f"step_00000{step}").mkdir()
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints .*step_000002: it has no manifest.*again"):
        find_resume_point(tmp_path)


def test_a_checkpoint_of_another_configuration_is_refused_by_tensor(tmp_path: Path) -> None:
    fit(tmp_path, Toy(), 2)
    resume = find_resume_point(tmp_path / "checkpoints")
    assert resume is not None
    wider = Toy()
    wider.adapter = torch.nn.Linear(8, 2)
    with pytest.raises(CheckpointError, match=r"adapter\.weight is \[1, 8\] there and \[2, 8\] here"):
        check_fits(resume, wider)
    more = Toy()
    more.base.requires_grad_(True)
    with pytest.raises(CheckpointError, match=r"2 not in it: base\.bias, base\.weight"):
        check_fits(resume, more)


def test_resuming_a_complete_run_changes_nothing(tmp_path: Path) -> None:
    fit(tmp_path, module := Toy(), 4)
    before = (tmp_path / "metrics.csv").read_bytes()
    again = Toy()
    trainer = fit(tmp_path, again, 4, resume=find_resume_point(tmp_path / "checkpoints"))
    assert trainer.global_step == 4
    assert torch.equal(again.adapter.weight, module.adapter.weight)
    assert (tmp_path / "metrics.csv").read_bytes() == before


def test_a_longer_run_follows_the_new_schedule(tmp_path: Path) -> None:
    """NeMo's WarmupHoldPolicy falls to min_lr = 0 past max_steps; a resumed state must not bring the old end along."""
    fit(tmp_path, Toy(max_steps=4), 4)
    trainer = fit(tmp_path, Toy(max_steps=9), 9, resume=find_resume_point(tmp_path / "checkpoints"))
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.05
    assert [float(row["lr"]) for row in _rows(tmp_path / "metrics.csv")][-4:] == [0.05] * 4


def test_the_time_limit_saves_and_the_next_run_continues(tmp_path: Path) -> None:
    fit(tmp_path / "whole", whole := Toy(), 6, accumulate=2)
    timer = InterruptionCallback(Interruption(), "00:00:00:00")  # over at once: each run gets one optimizer step
    run = tmp_path / "run"
    module = Toy()
    trainer = fit(run, module, 6, accumulate=2, callbacks=[timer], val_every=1)
    assert timer.out_of_time
    assert trainer.global_step == 1
    assert not (run / "validation.csv").exists()  # a time limit leaves no time for a last validation
    assert trainer.limit_val_batches == 1
    for step in range(1, 6):
        resume = find_resume_point(run / "checkpoints")
        assert resume is not None
        assert resume.step == step
        module = Toy()
        timer = InterruptionCallback(Interruption(), "00:00:00:00")
        fit(run, module, 6, accumulate=2, callbacks=[timer], resume=resume, seed=step)
    assert torch.equal(module.adapter.weight, whole.adapter.weight)
