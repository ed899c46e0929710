"""A small real LightningModule with everything the training callbacks rely on; shared by the tests of training/."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from nemo_aligner_diffusion.algorithms.reward_tuning import RewardTuning
from nemo_aligner_diffusion.evaluation.metrics.base import training_columns
from nemo_aligner_diffusion.parallel.non_finite import NonFinitePolicy
from nemo_aligner_diffusion.training.callbacks.metrics import MetricsCSV
from nemo_aligner_diffusion.training.callbacks.missed_validation import MissedValidation
from nemo_aligner_diffusion.training.checkpoints.callback import TrainingCheckpoint
from nemo_aligner_diffusion.training.checkpoints.resume import ResumePoint
from nemo_aligner_diffusion.training.optimizers import OptimizerSettings, build_optimizer
from nemo_aligner_diffusion.training.schedules import ScheduleSettings, build_schedule

MICRO_BATCH = 2


class Numbers(IterableDataset):
    """Sample i is a function of i alone, as prompts are; the stream can start anywhere."""

    def __init__(self, start_sample: int) -> None:
        self.start_sample = start_sample

    def __iter__(self) -> Iterator[torch.Tensor]:
        index = self.start_sample
        while True:
            yield torch.randn(4, generator=torch.Generator().manual_seed(index))
            index += 1


class Toy(pl.LightningModule):
    """A frozen base and a trained adapter with dropout (which draws from torch's global generator)."""

    def __init__(self, max_steps: int = 10, optim: dict[str, Any] | None = None, max_consecutive: int = 2) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.base = nn.Linear(4, 8)
        self.adapter = nn.Linear(8, 1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.base.requires_grad_(False)
        self.dropout = nn.Dropout(0.5)
        self.max_steps = max_steps
        self.optim = optim or {"name": "adamw", "lr": 0.05, "weight_decay": 0.1}
        self.policy = NonFinitePolicy(max_consecutive)
        self.last_metrics: dict[str, float] = {}
        self.last_validation: dict[str, float] = {}
        self.poison: Callable[[int], bool] = lambda step: False
        self.at_step: Callable[[int], None] = lambda step: None
        self.validated_with: list[float] = []
        self._rewards: list[float] = []
        self._started = time.monotonic()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.adapter(self.dropout(self.base(x)))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        reward = -(self(batch) ** 2).mean()
        if self.poison(self.trainer.global_step + 1):
            reward = reward * float("nan")
        self._rewards.append(float(reward.detach()))
        return -reward

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        step = self.trainer.global_step + 1
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        reward = sum(self._rewards) / len(self._rewards)
        self._rewards = []
        now = time.monotonic()
        self.last_metrics = {
            "reward": reward,
            "kl_penalty": 0.0,
            "loss": -reward,
            "grad_norm": float(norm),
            "images": MICRO_BATCH * self.trainer.accumulate_grad_batches,
            "seconds": now - self._started,
        }
        self._started = now
        self.at_step(step)
        if self.policy.check(step, ["a red apple"], reward=reward, grad_norm=norm):
            optimizer.zero_grad(set_to_none=True)
            return
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        torch.rand(7)  # validation that draws random numbers must not change training
        self.last_validation = {"reward": -float((self(batch) ** 2).mean()), "base_reward": -1.5}
        self.validated_with.append(float(self.adapter.weight.detach().sum()))

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.named_parameters(), OptimizerSettings(**self.optim))
        sched = ScheduleSettings(name="WarmupHoldPolicy", warmup_steps=3)
        schedule = build_schedule(optimizer, sched, self.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(
    run_dir: Path,
    module: Toy,
    max_steps: int,
    *,
    accumulate: int = 1,
    save_interval: int | None = None,
    val_every: int | None = None,
    callbacks: list[pl.Callback] | None = None,
    resume: ResumePoint | None = None,
    checkpoint: dict[str, Any] | None = None,
    progress: pl.Callback | None = None,
    seed: int | None = 7,
    **trainer_arguments: Any,
) -> pl.Trainer:
    """Train the toy as training/run.py trains the real one; the data starts where the checkpoint ends."""
    if seed is not None:
        torch.manual_seed(seed)
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    save = TrainingCheckpoint(run_dir / "checkpoints", save_interval, resume=resume, **(checkpoint or {}))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=trainer_arguments.pop("devices", 1),
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
        limit_val_batches=1 if val_every else 0,
        val_check_interval=val_every * accumulate if val_every else None,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[
            save,
            MetricsCSV(run_dir, training_columns(RewardTuning.reports)),
            *(callbacks or []),
            *([progress] if progress else []),
            MissedValidation(run_dir, val_every or 0),
        ],
        enable_progress_bar=progress is not None,
        enable_model_summary=False,
        logger=trainer_arguments.pop("logger", False),
        **trainer_arguments,
    )
    done = resume.step * accumulate * MICRO_BATCH if resume else 0
    train = DataLoader(Numbers(done), batch_size=MICRO_BATCH)
    validation = DataLoader(Numbers(10_000), batch_size=MICRO_BATCH)
    trainer.fit(module, train, validation, ckpt_path=str(resume.path) if resume else None)
    return trainer
