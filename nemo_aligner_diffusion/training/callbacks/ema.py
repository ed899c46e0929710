"""Exponential moving average of the trained weights (``exp_manager.ema``, NeMo's keys)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch

from nemo_aligner_diffusion.training.callbacks.settings import EMASettings


class EMACallback(pl.Callback):
    """Keeps ``average <- decay*average + (1-decay)*weights`` in float32, once per *optimizer* step.

    Only parameters that require gradients are averaged, so under LoRA it costs a second copy of the adapter and no
    more. Validation runs on the averages (unless ``validate_original_weights``); wrap the export in
    :meth:`averaged_weights` to write them. The averages travel in the checkpoint, in this callback's state.

    Args:
        settings: ``decay`` 0 follows the weights.
    """

    def __init__(self, settings: EMASettings) -> None:
        super().__init__()
        self.settings = settings
        self._average: dict[str, torch.Tensor] = {}
        self._kept: dict[str, torch.Tensor] | None = None  # the trained weights, while the averages stand in for them
        self._step = 0  # last optimizer step that was seen

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, parameter in _trained(pl_module).items():
            source = self._average.get(name, parameter.detach())
            device = torch.device("cpu") if self.settings.cpu_offload else parameter.device
            self._average[name] = source.to(device=device, dtype=torch.float32, copy=True)
        self._step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._step:  # still accumulating
            return
        self._step = step
        if step % self.settings.every_n_steps != 0:
            return
        for name, parameter in _trained(pl_module).items():
            average = self._average[name]
            average.lerp_(parameter.detach().to(device=average.device, dtype=torch.float32), 1.0 - self.settings.decay)

    @contextmanager
    def averaged_weights(self, pl_module: pl.LightningModule) -> Iterator[None]:
        """Inside, the module holds the averages; afterwards the trained weights again, bit for bit."""
        self._swap_in(pl_module)
        try:
            yield
        finally:
            self._swap_out(pl_module)

    def settle(self, pl_module: pl.LightningModule) -> None:
        """The module holds the averages from here on; training is over."""
        self._swap_in(pl_module)
        self._kept, self._average = None, {}

    @torch.no_grad()
    def _swap_in(self, pl_module: pl.LightningModule) -> None:
        if not self._average or self._kept is not None:
            return
        trained = _trained(pl_module)
        self._kept = {name: parameter.detach().clone() for name, parameter in trained.items()}
        for name, parameter in trained.items():
            parameter.copy_(self._average[name])

    @torch.no_grad()
    def _swap_out(self, pl_module: pl.LightningModule) -> None:
        if self._kept is None:
            return
        for name, parameter in _trained(pl_module).items():
            parameter.copy_(self._kept[name])
        self._kept = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.settings.validate_original_weights:
            self._swap_in(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.settings.validate_original_weights:
            self._swap_out(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._swap_out(pl_module)  # interrupted inside validation: what is exported next must be chosen knowingly

    def state_dict(self) -> dict[str, Any]:
        return {"average": {name: tensor.detach().cpu() for name, tensor in self._average.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._average = dict(state_dict["average"])


def _trained(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
