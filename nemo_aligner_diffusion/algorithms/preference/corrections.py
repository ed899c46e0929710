"""DDE's table: what the steps above a noise level are estimated to add, without a call of a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_aligner_diffusion.errors import CheckpointError


class Corrections:
    """``c[t]`` of winners and of losers: a moving average of ``v_t·Δ(z, t)``, and its sums over all ``s > t``.

    In float64 on the CPU, equal on every process, and the same whatever the layout: it is filled in the order of the
    samples.

    Args:
        weights: ``v_t`` of each level.
        rate: what a new value counts.

    Attributes:
        table: ``(T_train, 2)``; 0 where no pair has been yet: a model that has not moved has ``Δ = 0``.
    """

    def __init__(self, weights: Sequence[float], rate: float) -> None:
        self.weights, self.rate = list(weights), rate
        self.table = torch.zeros(len(self.weights), 2, dtype=torch.float64)
        self._above = torch.zeros_like(self.table)

    def above(self, t: Tensor) -> Tensor:
        """``Σ_{s>t} (c_s^w − c_s^l)`` for ``t`` ``(B,)``, float64 on its device."""
        gap = self._above[:, 0] - self._above[:, 1]
        return gap.to(t.device)[t]

    def learn(self, rows: Iterable[tuple[int, float, float]]) -> None:
        """Take in an iteration's ``(t, Δ^w, Δ^l)``, in the order of its samples; for use from the next one on."""
        for t, *errors in rows:
            new = self.weights[t] * torch.tensor(errors, dtype=torch.float64)
            self.table[t] += self.rate * (new - self.table[t])
        self._sum()

    def _sum(self) -> None:
        self._above[:-1] = self.table.flip(0).cumsum(0).flip(0)[1:]

    def state_dict(self) -> dict[str, Any]:
        return {"table": self.table.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises :class:`CheckpointError` for a table of another model."""
        table = state["table"]
        if not isinstance(table, Tensor) or table.shape != self.table.shape:
            raise CheckpointError(
                f"the checkpoint's table of corrections is not {tuple(self.table.shape)}, as this model's "
                f"{len(self.weights)} noise levels want; start a new run directory (exp_manager.explicit_log_dir)"
            )
        self.table = table.to("cpu", torch.float64)
        self._sum()
