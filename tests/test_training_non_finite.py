"""NaN and infinity never reach the weights."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import pytest
import torch
from training_toy import Toy, fit

from nemo_aligner_diffusion.errors import ConfigurationError, NumericalError
from nemo_aligner_diffusion.training.non_finite import NonFinitePolicy


@pytest.mark.parametrize("name", ["fused_adam", "adamw", "adam", "sgd"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_update_leaves_no_trace(tmp_path: Path, name: str, accumulate: int) -> None:
    """Weights and optimizer state before and after the poisoned step are the same bits, decay included."""
    optim = {"name": name, "lr": 0.05, "weight_decay": 0.1, "momentum": 0.9}
    module = Toy(optim=optim)
    module.poison = lambda step: step == 3
    snapshots: list[dict[str, torch.Tensor]] = []

    def snapshot(step: int) -> None:  # called when the gradients of `step` are there and not yet used
        state = module.trainer.optimizers[0].state_dict()["state"]
        tensors = {n: p.detach().clone() for n, p in module.named_parameters()}
        for index, slots in state.items():
            tensors |= {f"{index}.{key}": v.clone() for key, v in slots.items() if isinstance(v, torch.Tensor)}
        snapshots.append(tensors)

    module.at_step = snapshot
    fit(tmp_path, module, 5, accumulate=accumulate)
    assert module.policy.skipped == 1
    before, after = snapshots[2], snapshots[3]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not torch.equal(snapshots[1]["adapter.weight"], before["adapter.weight"])
    assert not torch.equal(after["adapter.weight"], snapshots[4]["adapter.weight"])
    assert torch.isfinite(module.adapter.weight).all()
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["reward"] == "nan" for row in rows] == [False, False, True, False, False]


def test_too_many_in_a_row_stop_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = Toy(max_consecutive=2)
    module.poison = lambda step: step >= 3
    weights: list[torch.Tensor] = []
    module.at_step = lambda step: weights.append(module.adapter.weight.detach().clone())
    with caplog.at_level(logging.WARNING), pytest.raises(NumericalError) as caught:
        fit(tmp_path, module, 10)
    assert caught.value.exit_code == 3
    message = str(caught.value)
    assert message.startswith(
        "step 5: reward and grad_norm are not finite for prompt 'a red apple'; that is 3 in a row"
    )
    assert "max_consecutive=2" in message
    assert "step 3: reward and grad_norm are not finite" in caplog.text
    assert torch.equal(module.adapter.weight, weights[2])
    assert torch.isfinite(module.adapter.weight).all()


def test_scattered_ones_do_not_add_up(tmp_path: Path) -> None:
    module = Toy(max_consecutive=1)
    module.poison = lambda step: step % 2 == 0
    assert fit(tmp_path, module, 8).global_step == 8
    assert module.policy.skipped == 4


def test_the_prompt_at_fault_is_named() -> None:
    policy = NonFinitePolicy(max_consecutive=5)
    prompts = ["a cat", "a dog", "a horse"]
    assert not policy.check(1, prompts, reward=torch.tensor([1.0, 2.0, 3.0]), grad_norm=0.5)
    assert policy.check(2, prompts, reward=torch.tensor([1.0, float("inf"), 3.0]), grad_norm=float("nan"))
    assert policy.events == [{"step": 2, "what": "reward and grad_norm", "prompts": ["a dog"]}]
    assert policy.check(3, prompts, reward=[1.0, 2.0, 3.0], grad_norm=float("nan"))
    assert policy.events[1]["prompts"] == prompts
    assert policy.consecutive == 2
    assert not policy.check(4, prompts, reward=[1.0, 2.0, 3.0], grad_norm=1.0)
    assert policy.consecutive == 0


def test_ranks_decide_together() -> None:
    healthy = NonFinitePolicy(5, any_rank=lambda bad: True)  # another rank has found something
    assert healthy.check(1, ["a cat"], reward=1.0)
    assert healthy.events[0]["what"] == "a value on another process"


def test_limits() -> None:
    with pytest.raises(NumericalError, match="1 in a row"):
        NonFinitePolicy(0).check(1, ["a cat"], reward=float("nan"))
    with pytest.raises(ConfigurationError, match="max_consecutive"):
        NonFinitePolicy(-1)
