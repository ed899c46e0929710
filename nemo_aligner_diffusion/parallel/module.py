"""The optimizer step of a Lightning module under any layout: gradients averaged, measured, looked at, clipped."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch.nn import Parameter

from nemo_aligner_diffusion.parallel.non_finite import NonFinitePolicy
from nemo_aligner_diffusion.parallel.parallelism import Parallelism

log = logging.getLogger(__name__)

_GUARD = "non_finite"  # in checkpoints
OptimizerFactory = Callable[[list[tuple[str, Parameter]]], tuple[torch.optim.Optimizer, Any]]


class ParallelModule(pl.LightningModule, ABC):
    """What modules that learn on several processes have in common.

    Whatever is not finite on one process must reach the gradient there (a loss times NaN does): averaging then takes it
    to all of them, and all decide alike.

    Args:
        optimizer_factory: named parameters → ``(optimizer, learning-rate schedule per optimizer step or None)``.
        guard: what becomes of NaN and infinite values and gradients; ``None``: the policy with its default.
        parallel: how the model is spread over processes; ``None``: one process.

    Attributes:
        validated_step: optimizer steps at the last validation.
        trained: the optimizer's parameters by name, once it has them.
    """

    validated_step = -1

    def __init__(
        self,
        optimizer_factory: OptimizerFactory,
        guard: NonFinitePolicy | None = None,
        parallel: Parallelism | None = None,
    ) -> None:
        super().__init__()
        self.optimizer_factory = optimizer_factory
        self.guard = guard or NonFinitePolicy()
        self.parallel = parallel or Parallelism()
        self.trained: list[tuple[str, Parameter]] = []
        self._prompts: list[str] = []  # of the running optimizer step
        self._grad_norm = float("nan")

    @abstractmethod
    def trainable_parameters(self) -> list[tuple[str, Parameter]]:
        """By their names in the module that :attr:`parallel` was applied to."""

    @abstractmethod
    def step_values(self) -> dict[str, Any]:
        """What the guard looks at beside the gradient norm, of the running optimizer step."""

    # Lightning's hooks, in the order in which an optimizer step runs them

    def configure_optimizers(self) -> Any:
        self.trained = self.trainable_parameters()
        optimizer, schedule = self.optimizer_factory(self.trained)
        if schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[_GUARD] = self.guard.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if _GUARD in checkpoint:  # not in those of earlier versions
            self.guard.load_state_dict(checkpoint[_GUARD])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """After all micro-batches, before clipping."""
        self.parallel.average_gradients(self.trained)
        self._grad_norm = self.parallel.gradient_norm(self.trained)
        skip, step = not math.isfinite(self._grad_norm), self.global_step + 1  # as metrics.csv counts
        looked_at = {**self.step_values(), "grad_norm": self._grad_norm}
        if skip and (scale := self._loss_scale()) > 1:
            # how float16's scaler finds its scale: nothing is wrong with the step as long as its values are finite
            log.info("step %d: the gradient overflowed at a loss scale of %g, which is lowered", step, scale)
            del looked_at["grad_norm"]
        skip = self.guard.check(step, self._prompts, **looked_at) or skip
        if skip:
            optimizer.zero_grad(set_to_none=True)  # a parameter without gradient is left alone, its moments too

    def _loss_scale(self) -> float:
        plugin = self.trainer.precision_plugin
        scaler = plugin.scaler if isinstance(plugin, MixedPrecision) else None
        return 1.0 if scaler is None else float(scaler.get_scale())

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """By the norm over all processes' pieces, which Lightning does not know."""
        if gradient_clip_val is not None and math.isfinite(self._grad_norm):
            self.parallel.clip_gradients(self.trained, self._grad_norm, gradient_clip_val)
