"""Optimizers and schedules by NeMo's names."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import nn

from nemo_aligner_diffusion.config.load import load_settings
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.training.optimizers import OptimizerSettings, build_optimizer
from nemo_aligner_diffusion.training.schedules import ScheduleSettings, build_schedule


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 1))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fused_adam", torch.optim.AdamW),
        ("adamw", torch.optim.AdamW),
        ("adam", torch.optim.Adam),
        ("sgd", torch.optim.SGD),
    ],
)
def test_names(name: str, expected: type, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        optimizer = build_optimizer(_network().named_parameters(), OptimizerSettings(name=name, lr=1e-3))
    assert type(optimizer) is expected
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert ("fused_adam: torch.optim.AdamW" in caplog.text) == (name == "fused_adam")


def test_fused_adam_is_decoupled_adamw() -> None:
    """AdamW written out (Loshchilov & Hutter, algorithm 2), on matrices with decay and vectors without."""
    settings: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.3, "betas": [0.8, 0.95], "eps": 1e-6}
    network = _network()
    reference = {name: p.detach().clone().double() for name, p in network.named_parameters()}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in reference.items()}
    optimizer = build_optimizer(network.named_parameters(), OptimizerSettings(name="fused_adam", **settings))
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 6):
        optimizer.zero_grad()
        network(torch.randn(4, 3, generator=generator)).square().mean().backward()
        for name, p in network.named_parameters():
            first, second = moments[name]
            gradient = p.grad.double()
            first.lerp_(gradient, 0.2)
            second.lerp_(gradient**2, 0.05)
            if p.ndim > 1:
                reference[name] *= 1 - 0.01 * 0.3
            reference[name] -= 0.01 * (first / (1 - 0.8**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-6)
        optimizer.step()
    for name, p in network.named_parameters():
        torch.testing.assert_close(p.detach().double(), reference[name], rtol=1e-4, atol=1e-6)


@pytest.mark.extras("torchao")
def test_moments_in_8_bits_follow_adamw() -> None:
    """As torch's AdamW but for their rounding; of small parameters there is none."""
    results = []
    for name in ("adamw", "adamw_8bit"):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 3))
        start = [parameter.detach().clone() for parameter in network.parameters()]
        settings = OptimizerSettings(name=name, lr=0.01, weight_decay=0.1)
        optimizer = build_optimizer(network.named_parameters(), settings)
        for seed in range(20):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(seed)
            network(torch.randn(4, 64, generator=generator)).square().mean().backward()
            optimizer.step()
        moved = [parameter.detach() - before for parameter, before in zip(network.parameters(), start, strict=True)]
        results.append(moved)
        kept = [sum(_bytes(value) for value in slots.values() if value.ndim) for slots in optimizer.state.values()]
        assert kept == [settings.state_bytes(parameter) for parameter in optimizer.state], "what the planner counts"
    assert results[0][0].numel() == 4096
    for plain, rounded in zip(*results, strict=True):
        assert 0 < float((plain - rounded).norm() / plain.norm()) < 0.05


def _bytes(value: torch.Tensor) -> int:
    parts = [value.codes, value.scale, value.qmap] if hasattr(value, "codes") else [value]
    return sum(part.nbytes for part in parts)


def test_what_8_bits_need_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigurationError, match=r"needs torchao.*pip install 'nemo-aligner-diffusion\[quantization\]'"
    ):
        build_optimizer(_network().named_parameters(), OptimizerSettings(name="adamw_8bit"))


@pytest.mark.parametrize("words", [["model.fsdp=true"], ["model.tensor_model_parallel_size=2"]])
def test_8_bits_are_of_whole_parameters(words: list[str]) -> None:
    given = ["optim=adamw_8bit", "trainer.devices=2", "trainer.accelerator=cpu"]
    assert load_settings("draftp_sd", given).model.optim.name == "adamw_8bit"
    with pytest.raises(ConfigurationError, match=r"model\.optim\.name = adamw_8bit with .*expected replicas"):
        load_settings("draftp_sd", [*given, *words])


def test_weight_decay_spares_vectors() -> None:
    optimizer = build_optimizer(_network().named_parameters(), OptimizerSettings(name="adamw", lr=1, weight_decay=0.1))
    assert [(g["weight_decay"], len(g["params"])) for g in optimizer.param_groups] == [(0.1, 2), (0.0, 4)]
    without = build_optimizer(_network().named_parameters(), OptimizerSettings(name="adamw", lr=1))
    assert [(g["weight_decay"], len(g["params"])) for g in without.param_groups] == [(0.0, 6)]


def test_frozen_parameters_are_left_out() -> None:
    network = _network()
    network[0].requires_grad_(False)
    optimizer = build_optimizer(network.named_parameters(), OptimizerSettings(name="sgd", lr=0.1, momentum=0.9))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4
    network.requires_grad_(False)
    with pytest.raises(ConfigurationError, match="nothing to train"):
        build_optimizer(network.named_parameters(), OptimizerSettings(name="sgd", lr=0.1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "fused_adm"}, r"name = 'fused_adm': expected one of fused_adam, adamw, adamw_8bit, adam, sgd"),
        ({"lr": "fast"}, r"lr = 'fast': expected a number > 0"),
        ({"lr": -1}, r"lr = -1: expected a number > 0"),
        ({"betas": [0.9]}, r"betas = \[0\.9\]: expected a list of 2 numbers"),
        ({"betas": [0.9, 1.0]}, "< 1"),
        ({"name": "sgd", "nesterov": True}, "momentum above 0"),
        ({"lr": 0.1, "sched": ScheduleSettings(min_lr=1.0)}, "is above"),
    ],
)
def test_bad_optimizer_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        OptimizerSettings(**settings)


def _rates(sched: dict[str, Any], max_steps: int, steps: int, lr: float = 0.1) -> list[float]:
    """The rate used at each optimizer step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = build_schedule(optimizer, ScheduleSettings(**sched), max_steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_warmup_hold() -> None:
    rates = _rates({"name": "WarmupHoldPolicy", "warmup_steps": 4, "hold_steps": 10_000_000_000_000}, 10, 12)
    assert rates[:5] == pytest.approx([0.1 * (step + 1) / 5 for step in range(5)])
    assert rates[5:11] == [0.1] * 6
    assert rates[11:] == [0.0]  # NeMo: past max_steps, min_lr
    assert _rates({"name": "WarmupHoldPolicy", "hold_steps": 2}, 6, 6) == [0.1] * 6  # no decay after the hold, either
    assert _rates({"name": "WarmupHoldPolicy", "warmup_ratio": 0.5}, 6, 6) == pytest.approx(
        [0.025, 0.05, 0.075, 0.1, 0.1, 0.1]
    )


def test_cosine() -> None:
    """NeMo's ``_cosine_annealing`` after its warmup."""
    rates = _rates({"name": "CosineAnnealing", "warmup_steps": 2, "min_lr": 0.01}, 10, 12)
    expected = [0.1 * 1 / 3, 0.1 * 2 / 3, 0.1]
    expected += [0.09 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 8)) + 0.01 for step in range(3, 10)]
    assert rates == pytest.approx([*expected, 0.01, 0.01])


def test_cosine_with_constant_end() -> None:
    """With constant_steps NeMo uses Megatron-LM's form: warmup from 0, the cosine ends earlier."""
    rates = _rates({"name": "CosineAnnealing", "warmup_steps": 2, "constant_steps": 3, "min_lr": 0.02}, 10, 11)
    expected = [0.0, 0.05, 0.1] + [0.02 + 0.08 * 0.5 * (1 + math.cos(math.pi * (s - 2) / 5)) for s in range(3, 7)]
    assert rates == pytest.approx([*expected, 0.02, 0.02, 0.02, 0.02])


def test_cosine_with_hold() -> None:
    rates = _rates({"name": "CosineAnnealing", "hold_steps": 4}, 8, 8)
    assert rates == pytest.approx([0.1] * 5 + [0.05 * (1 + math.cos(math.pi * s / 4)) for s in (1, 2, 3)])
    forever = _rates({"name": "CosineAnnealing", "hold_steps": 10_000_000_000_000}, 8, 8)
    assert forever == _rates({"name": "CosineAnnealing"}, 8, 8)


def test_constant() -> None:
    assert _rates({"name": "constant"}, 10, 3) == [0.1] * 3
    assert _rates({"name": "constant", "warmup_steps": 1}, 10, 3) == pytest.approx([0.05, 0.1, 0.1])


def test_each_group_keeps_its_own_peak() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.5)]
    optimizer = torch.optim.SGD(groups)
    build_schedule(optimizer, ScheduleSettings(name="WarmupHoldPolicy", warmup_steps=1, min_lr=0.1), 10)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]


def test_the_state_of_a_schedule_holds_no_settings() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    old = build_schedule(torch.optim.SGD([parameter], lr=0.1), ScheduleSettings(name="CosineAnnealing"), 4)
    new = build_schedule(torch.optim.SGD([parameter], lr=0.1), ScheduleSettings(name="CosineAnnealing"), 40)
    for _ in range(3):
        old.optimizer.step()
        old.step()
    new.load_state_dict(old.state_dict())
    new.optimizer.step()
    new.step()
    assert new.get_last_lr() == pytest.approx([0.05 * (1 + math.cos(math.pi * 4 / 40))])


@pytest.mark.parametrize(
    ("sched", "max_steps", "message"),
    [
        ({"name": "WarmupHold"}, 10, "expected one of WarmupHoldPolicy"),
        ({"name": "CosineAnnealing", "warmup_steps": 10}, 10, "leave no step"),
        ({"name": "WarmupHoldPolicy", "warmup_steps": 1, "warmup_ratio": 0.1}, 10, "not both"),
        ({"name": "WarmupHoldPolicy", "warmup_steps": -1}, 10, "an integer >= 0"),
        ({"name": "WarmupHoldPolicy", "warmup_ratio": 1.5}, 10, "<= 1"),
    ],
)
def test_bad_schedules(sched: dict[str, Any], max_steps: int, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        _rates(sched, max_steps, 1)
