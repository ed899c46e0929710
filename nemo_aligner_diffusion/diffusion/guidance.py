"""Classifier-free guidance (Ho & Salimans, 2022): the guided prediction ``e_i`` from one batched network call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from nemo_aligner_diffusion.diffusion.conditioning import Conditioning

Predictor = Callable[[Tensor, Tensor], Tensor]  # (network input (B,C,h,w), timestep ()) -> prediction (B,C,h,w)


class Denoiser(Protocol):
    """The part of a model family that guidance needs."""

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor: ...

    def unconditional(self, batch_size: int) -> Conditioning: ...


def guided_predictor(model: Denoiser, conditioning: Conditioning, guidance_scale: float) -> Predictor:
    """``e = f(z,t,∅) + g·(f(z,t,c) − f(z,t,∅))``; at ``g = 1`` the unconditional pass is not made at all.

    Args:
        model: the model family.
        conditioning: prompts of the batch, ``(B, …)``.
        guidance_scale: ``g``; 1 means no guidance, 0 the unconditional model.
    """
    if guidance_scale == 1.0:
        return lambda latents, timestep: model.predict(latents, timestep, conditioning)
    both = Conditioning.cat([model.unconditional(conditioning.batch_size), conditioning])

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        unconditional, conditional = model.predict(torch.cat([latents, latents]), timestep, both).chunk(2)
        return torch.lerp(unconditional, conditional, guidance_scale)

    return predict
