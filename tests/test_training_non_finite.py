"""NaN and infinity never reach the weights."""

from __future__ import annotations

import csv
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from tiny.training import Toy, fit

from nemo_aligner_diffusion.errors import NumericalError
from nemo_aligner_diffusion.parallel.module import ParallelModule
from nemo_aligner_diffusion.parallel.non_finite import NonFinitePolicy


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


def blame(values: list[float]) -> list[dict[str, Any]]:
    import torch.distributed as dist

    policy = NonFinitePolicy()
    rank = dist.get_rank()
    prompts = [f"prompt {number} of rank {rank}" for number in range(2)]
    assert not policy.check(1, prompts, reward=[1.0, 2.0], grad_norm=1.0)
    assert policy.check(2, prompts, reward=[1.0, values[rank]], grad_norm=math.nan)
    return policy.events


def test_a_prompt_of_another_process_is_named_on_all(processes: Any) -> None:
    """The first process, whose events are written down, has met nothing but the common gradient."""
    (first, second) = processes.run(2, blame, [1.0, math.inf])
    assert first == second == [{"step": 2, "what": "reward and grad_norm", "prompts": ["prompt 1 of rank 1"]}]
    (first, _) = processes.run(2, blame, [1.0, 1.0])
    assert len(first[0]["prompts"]) == 4


class Silent(ParallelModule):
    def trainable_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return []

    def step_values(self) -> dict[str, Any]:
        return {}


def test_a_resumed_run_goes_on_counting() -> None:
    policy, again = NonFinitePolicy(1), NonFinitePolicy(1)
    policy.check(1, ["a cat"], grad_norm=math.nan)
    checkpoint: dict[str, Any] = {}
    Silent(lambda parameters: (torch.optim.SGD(parameters), None), policy).on_save_checkpoint(checkpoint)
    Silent(lambda parameters: (torch.optim.SGD(parameters), None), again).on_load_checkpoint(
        json.loads(json.dumps(checkpoint))
    )
    assert (again.skipped, again.events) == (1, policy.events)
    with pytest.raises(NumericalError, match="2 in a row"):
        again.check(2, ["a cat"], grad_norm=math.nan)


def test_limits() -> None:
    with pytest.raises(NumericalError, match="1 in a row"):
        NonFinitePolicy(0).check(1, ["a cat"], reward=float("nan"))


class Slope(Silent):
    """Steep, so that a loss scale takes the gradient beyond float32's 2^128; or with a kink that has no gradient."""

    def __init__(self, policy: NonFinitePolicy, poisoned: int = 0, kink: bool = False) -> None:
        super().__init__(lambda named: (torch.optim.SGD([p for _, p in named], lr=2.0**-40), None), policy)
        self.policy, self.poisoned, self.kink = policy, poisoned, kink
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.loss = math.nan

    def trainable_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [("weight", self.weight)]

    def step_values(self) -> dict[str, Any]:
        return {"loss": self.loss}

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.weight.norm().sqrt() if self.kink else 2.0**40 * self.weight.sum()
        loss = loss * math.nan if batch_idx + 1 == self.poisoned else loss
        self.loss = float(loss.detach())
        return loss


def with_loss_scale(module: Slope, scale: float, steps: int) -> torch.amp.GradScaler:
    """Train as trainer.precision=16 does on a GPU; each overflow lowers the scale to a millionth."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=2.0**-20, growth_interval=1000)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(steps), batch_size=1))
    return scaler


def test_a_loss_scale_that_is_too_large_at_first_is_no_fault_of_the_steps(caplog: pytest.LogCaptureFixture) -> None:
    module = Slope(NonFinitePolicy(0))
    with caplog.at_level(logging.INFO):
        scaler = with_loss_scale(module, 2.0**120, 5)
    assert scaler.get_scale() == 2.0**80  # two steps of five were left out
    assert module.weight.tolist() == [-3.0] * 3
    assert module.policy.skipped == 0
    assert caplog.text.count("the gradient overflowed at a loss scale of") == 2


def test_what_is_wrong_with_a_step_is_not_laid_to_the_loss_scale() -> None:
    module = Slope(NonFinitePolicy(5), poisoned=2)
    with_loss_scale(module, 2.0**10, 3)
    assert [(event["step"], event["what"]) for event in module.policy.events] == [(2, "loss")]
    assert module.weight.tolist() == [-2.0] * 3
    with pytest.raises(NumericalError, match="grad_norm is not finite"):  # a scale of 1 changes nothing
        with_loss_scale(Slope(NonFinitePolicy(0), kink=True), 1.0, 2)
