"""What a denoiser is told besides the latents and the timestep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Text conditioning of a batch of prompts.

    Attributes:
        encoder_hidden_states: ``(B, L, C)`` token states for the denoiser's cross-attention.
        extra: further per-sample tensors ``(B, ...)`` that a model family needs (SDXL's ``text_embeds`` and
            ``time_ids``); empty for Stable Diffusion 1.x and 2.x.
    """

    encoder_hidden_states: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)

    @property
    def batch_size(self) -> int:
        return self.encoder_hidden_states.shape[0]

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Concatenate along the batch; every part must have the same ``extra`` names."""
        return Conditioning(
            torch.cat([part.encoder_hidden_states for part in parts]),
            {name: torch.cat([part.extra[name] for part in parts]) for name in parts[0].extra},
        )

    def expand(self, batch_size: int) -> Conditioning:
        """Repeat a conditioning of batch size 1 for ``batch_size`` samples (no copy)."""
        return Conditioning(
            self.encoder_hidden_states.expand(batch_size, *self.encoder_hidden_states.shape[1:]),
            {name: value.expand(batch_size, *value.shape[1:]) for name, value in self.extra.items()},
        )
