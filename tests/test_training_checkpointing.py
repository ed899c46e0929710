"""Checkpoints: resuming is exact, only what was trained is saved, damage is survived."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from training_toy import Toy, fit

from nemo_aligner_diffusion.errors import CheckpointError
from nemo_aligner_diffusion.training.checkpointing import find_resume_point
from nemo_aligner_diffusion.training.ema import EMACallback
from nemo_aligner_diffusion.training.interruption import RunTimer


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
    whole, whole_ema = Toy(), EMACallback(decay=0.9)
    trainer = fit(tmp_path / "whole", whole, 10, callbacks=[whole_ema], **options)
    expected = _state(whole, trainer, whole_ema)

    fit(tmp_path / "parts", Toy(), 4, callbacks=[EMACallback(decay=0.9)], **options)
    resume = find_resume_point(tmp_path / "parts" / "checkpoints")
    assert resume is not None
    assert resume.step == 4
    again, again_ema = Toy(), EMACallback(decay=0.9)
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
