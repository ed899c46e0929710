"""The weights of the best validation, kept for the export; they travel in the checkpoints, so resuming keeps them."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch


class BestWeights(pl.Callback):
    """A copy on the CPU of what is trained, taken whenever validation is better than ever before.

    Args:
        metric: key of ``module.last_validation``; the smallest ``loss`` is best, the largest of anything else.

    Attributes:
        step: the optimizer step of the copy; -1 while there is none.
        value: the metric there.
    """

    def __init__(self, metric: str = "loss") -> None:
        self.metric = metric
        self.step = -1
        self.value = math.nan
        self._weights: dict[str, torch.Tensor] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        value: float = pl_module.last_validation[self.metric]  # type: ignore[assignment, index]
        better = value < self.value if self.metric == "loss" else value > self.value
        if better or (self.step < 0 and not math.isnan(value)):
            self.step, self.value = trainer.global_step, value
            self._weights = {
                name: parameter.detach().to("cpu", copy=True)
                for name, parameter in pl_module.named_parameters()
                if parameter.requires_grad
            }

    @torch.no_grad()
    def restore(self, module: pl.LightningModule) -> bool:
        """Put the best weights into the module; False where there was no validation."""
        if self.step < 0:
            return False
        for name, parameter in module.named_parameters():
            if name in self._weights:
                parameter.copy_(self._weights[name])
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"metric": self.metric, "step": self.step, "value": self.value, "weights": self._weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["metric"] == self.metric:  # else what counts was changed: the best so far is unknown
            self.step, self.value = int(state_dict["step"]), float(state_dict["value"])
            self._weights = dict(state_dict["weights"])
