"""What a resumed run announces as changed holds: every setting that a checkpoint has a word of its own on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny.training import Toy, fit

from nemo_aligner_diffusion.errors import CheckpointError
from nemo_aligner_diffusion.reward_training.run import ConfiguredEarlyStopping
from nemo_aligner_diffusion.training.callbacks.ema import EMACallback
from nemo_aligner_diffusion.training.callbacks.settings import EMASettings
from nemo_aligner_diffusion.training.checkpoints.resume import check_moments, find_resume_point
from nemo_aligner_diffusion.training.optimizers import OptimizerSettings, build_optimizer
from nemo_aligner_diffusion.training.schedules import ScheduleSettings, build_schedule

STEPS, MORE = 3, 8
SCHED: dict[str, Any] = {"name": "CosineAnnealing", "warmup_steps": 1}
ADAM: dict[str, Any] = {"name": "adamw", "lr": 0.05}


class Configured(Toy):
    """Notes the learning rate of each optimizer step."""

    def __init__(self, optim: dict[str, Any], sched: dict[str, Any], max_steps: int = MORE) -> None:
        super().__init__(max_steps)
        self.settings = OptimizerSettings(**optim, sched=ScheduleSettings(**sched))
        self.rates: dict[int, float] = {}
        self.groups: list[dict[str, Any]] = []

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.named_parameters(), self.settings)
        schedule = build_schedule(optimizer, self.settings.sched, self.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.rates[self.trainer.global_step] = optimizer.param_groups[0]["lr"]
        self.groups = [dict(group) for group in optimizer.param_groups]


def resumed(folder: Path, before: tuple[Any, ...], after: tuple[Any, ...], steps: int = MORE) -> Configured:
    """Train ``before`` for three steps and ``after`` from there."""
    fit(folder, Configured(*before), STEPS, save_interval=1)
    module = Configured(*after)
    fit(folder, module, steps, resume=find_resume_point(folder / "checkpoints"))
    return module


@pytest.mark.parametrize(
    ("key", "value"),
    [("lr", 0.01), ("weight_decay", 0.7), ("betas", (0.5, 0.6)), ("eps", 0.1), ("momentum", 0.3), ("nesterov", True)],
)
def test_every_setting_of_the_optimizer(tmp_path: Path, key: str, value: Any) -> None:
    optim = {"name": "sgd", "lr": 0.05, "momentum": 0.9} if key in ("momentum", "nesterov") else ADAM
    now = {**optim, key: value}
    module = resumed(tmp_path, (optim, SCHED), (now, SCHED))
    fresh = Configured(now, SCHED)
    fit(tmp_path / "fresh", fresh, MORE)
    kept = ("lr", "weight_decay", "betas", "eps", "momentum", "nesterov", "initial_lr")
    assert [{name: group.get(name) for name in kept} for group in module.groups] == [
        {name: group.get(name) for name in kept} for group in fresh.groups
    ]
    assert module.rates == {step: rate for step, rate in fresh.rates.items() if step >= STEPS}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "WarmupHoldPolicy"), ("name", "constant"), ("warmup_steps", 6), ("warmup_ratio", 0.75),
        ("hold_steps", 4), ("hold_ratio", 0.5), ("constant_steps", 2), ("constant_ratio", 0.25), ("min_lr", 0.02),
    ],
)  # fmt: skip
def test_every_setting_of_the_schedule(tmp_path: Path, key: str, value: Any) -> None:
    now = {**SCHED, **({"warmup_steps": None} if key == "warmup_ratio" else {}), key: value}
    module = resumed(tmp_path, (ADAM, SCHED), (ADAM, now))
    fresh = Configured(ADAM, now)
    fit(tmp_path / "fresh", fresh, MORE)
    assert module.rates == {step: rate for step, rate in fresh.rates.items() if step >= STEPS}
    old = Configured(ADAM, SCHED)
    fit(tmp_path / "old", old, MORE)
    assert module.rates != {step: rate for step, rate in old.rates.items() if step >= STEPS}


def test_the_length_of_the_run(tmp_path: Path) -> None:
    module = resumed(tmp_path, (ADAM, SCHED, 5), (ADAM, SCHED, MORE))
    fresh = Configured(ADAM, SCHED, MORE)
    fit(tmp_path / "fresh", fresh, MORE)
    assert module.rates == {step: rate for step, rate in fresh.rates.items() if step >= STEPS}


@pytest.mark.parametrize(("before", "after"), [("fused_adam", "adamw"), ("adamw", "adam"), ("adam", "fused_adam")])
def test_an_optimizer_of_the_same_moments_goes_on(tmp_path: Path, before: str, after: str) -> None:
    module = resumed(tmp_path, ({**ADAM, "name": before}, SCHED), ({**ADAM, "name": after}, SCHED))
    assert type(module.trainer.optimizers[0]) is (torch.optim.Adam if after == "adam" else torch.optim.AdamW)
    moments = module.trainer.optimizers[0].state[module.adapter.weight]
    assert int(moments["step"]) == MORE


class Wide(Configured):
    """Its weight is large enough for moments in 8 bits, its bias is not."""

    def __init__(self, name: str) -> None:
        # under dropout gradients are zero now and then, and so may be what is left of a small second moment
        super().__init__({**ADAM, "name": name, "eps": 1e-3}, SCHED)
        torch.manual_seed(0)
        self.adapter = torch.nn.Linear(8, 1024)

    @property
    def moments(self) -> list[dict[str, Any]]:
        states = self.trainer.optimizers[0].state
        return [states[parameter] for parameter in (self.adapter.weight, self.adapter.bias)]


def wide(folder: Path, *names: str) -> Wide:
    """Three steps with each optimizer but the last, with which the run ends."""
    for number, name in enumerate(names, 1):
        module = Wide(name)
        steps = MORE if number == len(names) else STEPS * number
        fit(folder, module, steps, save_interval=1, resume=find_resume_point(folder / "checkpoints"))
    return module


@pytest.mark.extras("torchao")
def test_moments_in_8_bits_go_on_bit_for_bit(tmp_path: Path) -> None:
    unbroken, resumed = wide(tmp_path / "a", "adamw_8bit"), wide(tmp_path / "b", "adamw_8bit", "adamw_8bit")
    for parameter, other in zip(unbroken.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(parameter, other)
    (weight, bias), (weight_too, bias_too) = unbroken.moments, resumed.moments
    for slot in ("exp_avg", "exp_avg_sq"):
        assert weight[slot].codes.dtype == torch.uint8
        assert torch.equal(weight[slot].codes, weight_too[slot].codes)
        assert torch.equal(weight[slot].scale, weight_too[slot].scale)
        assert torch.equal(bias[slot], bias_too[slot])
    assert unbroken.rates.items() >= resumed.rates.items()
    stored = sum(path.stat().st_size for path in (tmp_path / "b/checkpoints/step_000008").glob("*.safetensors"))
    assert stored < 75_000, "in 32 bits the weight and its moments alone are 98,304"


@pytest.mark.extras("torchao")
def test_moments_in_8_bits_are_those_of_other_adams(tmp_path: Path) -> None:
    """There and back: the numbers are the same but for their rounding."""
    plain, there, back = (
        wide(tmp_path / "-".join(names), *names)
        for names in (("adamw",), ("adamw", "adamw_8bit"), ("adamw_8bit", "adamw"))
    )
    assert hasattr(there.moments[0]["exp_avg_sq"], "codes")
    assert type(back.moments[0]["exp_avg_sq"]) is torch.Tensor
    for module in (there, back):
        assert int(module.moments[0]["step"]) == MORE
        apart = module.adapter.weight.detach() - plain.adapter.weight.detach()
        moved = plain.adapter.weight.detach() - Wide("adamw").adapter.weight.detach()
        assert 0 < float(apart.norm() / moved.norm()) < 0.05


@pytest.mark.parametrize(("before", "after"), [("fused_adam", "sgd"), ("sgd", "adamw")])
def test_an_optimizer_of_other_moments_is_refused(tmp_path: Path, before: str, after: str) -> None:
    fit(tmp_path, Configured({**ADAM, "name": before}, SCHED), STEPS)
    point = find_resume_point(tmp_path / "checkpoints")
    assert point is not None
    with pytest.raises(CheckpointError, match=r"model\.optim\.name of its config\.yaml, or begin a run of its own"):
        check_moments(point.optimizer, after)
    check_moments(point.optimizer, before)


def test_weight_decay_that_splits_the_parameters_goes_on(tmp_path: Path) -> None:
    """Without decay all are in one group, with it biases are in one of their own."""
    module = resumed(tmp_path, (ADAM, SCHED), ({**ADAM, "weight_decay": 0.5}, SCHED))
    assert [group["weight_decay"] for group in module.groups] == [0.5, 0.0]
    states = module.trainer.optimizers[0].state
    assert {int(states[parameter]["step"]) for parameter in (module.adapter.weight, module.adapter.bias)} == {MORE}


def test_settings_of_the_moving_average(tmp_path: Path) -> None:
    fit(tmp_path, Toy(), STEPS, save_interval=1, callbacks=[EMACallback(EMASettings(decay=0.5))])
    module, ema = Toy(), EMACallback(EMASettings(decay=0.0))
    fit(tmp_path, module, MORE, callbacks=[ema], resume=find_resume_point(tmp_path / "checkpoints"))
    assert torch.equal(ema.state_dict()["average"]["adapter.weight"], module.adapter.weight.detach())


def test_early_stoppings_patience(tmp_path: Path) -> None:
    class Validated(Toy):
        def on_validation_epoch_end(self) -> None:
            super().on_validation_epoch_end()
            self.log("val_loss", 1.0)

    def stopping(patience: int) -> ConfiguredEarlyStopping:
        return ConfiguredEarlyStopping("val_loss", patience=patience, check_on_train_epoch_end=False)

    fit(tmp_path, Validated(), 2, save_interval=1, val_every=1, callbacks=[stopping(9)])
    trainer = fit(
        tmp_path,
        Validated(),
        MORE,
        val_every=1,
        callbacks=[stopping(3)],
        resume=find_resume_point(tmp_path / "checkpoints"),
    )
    assert trainer.global_step < MORE
