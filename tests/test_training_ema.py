"""The moving average of the trained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from tiny.training import Toy, fit

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.training.callbacks.ema import EMACallback
from nemo_aligner_diffusion.training.callbacks.settings import EMASettings


class Recorder(pl.Callback):
    """The weights after each optimizer step, noted before any other callback sees that step."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.weights.append(pl_module.adapter.weight.detach().clone())

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self.weights.append(pl_module.adapter.weight.detach().clone())


@pytest.mark.parametrize(("accumulate", "every"), [(1, 1), (3, 1), (1, 2)])
def test_average_over_optimizer_steps(tmp_path: Path, accumulate: int, every: int) -> None:
    recorder, ema = Recorder(), EMACallback(EMASettings(decay=0.8, every_n_steps=every))
    fit(tmp_path, Toy(), 6, accumulate=accumulate, callbacks=[recorder, ema])
    expected = recorder.weights[0]
    for step, weight in enumerate(recorder.weights[1:], start=1):
        if step % every == 0:
            expected = 0.8 * expected + 0.2 * weight
    assert len(recorder.weights) == 7
    average = ema.state_dict()["average"]
    assert set(average) == {"adapter.weight", "adapter.bias"}  # not the frozen base
    torch.testing.assert_close(average["adapter.weight"], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("original", [False, True])
def test_validation_uses_the_average_and_training_does_not_notice(tmp_path: Path, original: bool) -> None:
    fit(tmp_path / "plain", plain := Toy(), 4)
    ema = EMACallback(EMASettings(decay=0.5, validate_original_weights=original))
    module = Toy()
    fit(tmp_path / "ema", module, 4, val_every=4, callbacks=[ema])
    assert torch.equal(module.adapter.weight, plain.adapter.weight)
    average = ema.state_dict()["average"]["adapter.weight"]
    assert not torch.equal(average, module.adapter.weight)
    used = module.adapter.weight.detach() if original else average
    assert module.validated_with == [float(used.sum())]


def test_averaged_weights_for_the_export(tmp_path: Path) -> None:
    ema, module = EMACallback(EMASettings(decay=0.5)), Toy()
    fit(tmp_path, module, 3, callbacks=[ema])
    trained = module.adapter.weight.detach().clone()

    def export() -> None:
        with ema.averaged_weights(module):
            assert torch.equal(module.adapter.weight, ema.state_dict()["average"]["adapter.weight"])
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        export()
    assert torch.equal(module.adapter.weight, trained)


def test_half_precision_weights_are_averaged_in_float32() -> None:
    """In bfloat16 steps of (1 - decay) vanish; in float32 they add up."""
    module = Toy().bfloat16()
    with torch.no_grad():
        module.adapter.weight.fill_(1.0)
    ema = EMACallback(EMASettings(decay=0.999))
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, barebones=False, accelerator="cpu")
    ema.on_train_start(trainer, module)
    with torch.no_grad():
        module.adapter.weight.fill_(2.0)
    steps = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
    for _ in range(100):
        steps.completed += 1
        ema.on_train_batch_end(trainer, module, None, None, 0)
    average = ema.state_dict()["average"]["adapter.weight"]
    assert average.dtype == torch.float32
    torch.testing.assert_close(average, torch.full_like(average, 2 - 0.999**100), rtol=1e-5, atol=0)


def test_configuration() -> None:
    with pytest.raises(ConfigurationError, match="decay"):
        EMASettings(decay=1.5)
    with pytest.raises(ConfigurationError, match="every_n_steps"):
        EMASettings(every_n_steps=0)
