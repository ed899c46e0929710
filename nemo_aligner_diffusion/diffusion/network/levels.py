"""Noise levels that a denoiser was trained at, in the variable that it is handed, whatever solver samples with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo_aligner_diffusion.diffusion.schedule import predicted, prediction_type
from nemo_aligner_diffusion.errors import ConfigurationError

_VARIANCE_PRESERVING = ("epsilon", "v_prediction", "sample")


class TrainingLevels:
    """A scheduler's training noise levels ``t = 0 … size − 1`` by growing noise: ``z_t = alphas[t] x + sigmas[t] n``.

    A scheduler with ``alphas_cumprod`` ᾱ (Ho et al., 2020): ``α = √ᾱ_t``, ``σ = √(1 − ᾱ_t)``; solvers that count in
    another variable (Euler's is ``x + (σ/α) n``) scale it back to this one for the network. A flow: ``α = 1 − σ``, σ
    the scheduler's own training levels with its fixed shift; a shift by the picture's size belongs to sampling.

    Attributes:
        size: how many levels.
        flow: of a flow, ``d = (v − v_θ)²``, else of a diffusion, ``d = (ε − ε_θ)²``.
        alphas, sigmas: ``(size,)`` float64.
        timesteps: ``(size,)`` float64, by which scheduler and pipeline know these levels.
        scale: what a network that is told ``t / scale`` divides by.

    Raises:
        ConfigurationError: the scheduler does not say at which levels its model was trained; by name.
    """

    def __init__(self, scheduler: Any) -> None:
        name, kind = type(scheduler).__name__, prediction_type(scheduler)
        continuous = scheduler.config.get("timestep_type") == "continuous"  # EDM's, by another name
        diffusion = hasattr(scheduler, "alphas_cumprod") and kind in _VARIANCE_PRESERVING and not continuous
        self.flow = kind == "flow_prediction"
        if not self.flow and not diffusion:
            raise ConfigurationError(
                f"{name} (prediction_type {kind!r}{', continuous timesteps' if continuous else ''}): the noise levels "
                f"its model was trained at are not known here; known: schedulers with alphas_cumprod that predict "
                f"{', '.join(_VARIANCE_PRESERVING)}, and flow matching; train this model with a reward instead"
            )
        if self.flow:
            self.sigmas = _flow_sigmas(scheduler)
            self.alphas = 1 - self.sigmas
            share = self.alphas if scheduler.config.get("invert_sigmas") else self.sigmas
            self.timesteps = share * scheduler.config.num_train_timesteps
        else:
            cumulative = torch.as_tensor(scheduler.alphas_cumprod).detach().cpu().double()
            self.alphas, self.sigmas = cumulative.sqrt(), (1 - cumulative).sqrt()
            self.timesteps = torch.arange(len(cumulative), dtype=torch.float64)
        self.size = len(self.alphas)
        self.scale = float(scheduler.config.num_train_timesteps)
        levels = list(zip(self.alphas.tolist(), self.sigmas.tolist(), strict=True))
        targets = [predicted(scheduler, alpha, sigma) for alpha, sigma in levels]
        # of a difference of predictions to one of ε (of a flow, v); exact where α = 0, for ε there is no other
        gains = [
            1.0 if kind == "epsilon" else (alpha + sigma if self.flow else alpha) / (alpha * b - sigma * a)
            for (alpha, sigma), (a, b) in zip(levels, targets, strict=True)
        ]
        self._targets = torch.tensor(targets, dtype=torch.float64)
        self._gains = torch.tensor(gains, dtype=torch.float64)

    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``z_t`` ``(B, …)`` of latents ``x`` and ``noise`` ``(B, …)`` at the levels ``t`` ``(B,)`` int64."""
        return _of_rows(self.alphas, t, x) * x + _of_rows(self.sigmas, t, x) * noise

    def error(self, x: Tensor, noise: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """``d_θ`` ``(B,)``: mean over elements of ``(ε − ε_θ)²``, of a flow ``(v − v_θ)²`` with ``v = n − x``.

        Args:
            x, noise: latents and what was added to them, ``(B, …)``.
            prediction: the network's at ``z_t``, in its scheduler's ``prediction_type``; v and clean samples are turned
                into ε, in which they are the same difference times a number.
            t: levels, ``(B,)`` int64.
        """
        a, b = (_of_rows(column, t, x) for column in self._targets.unbind(1))
        distance = (a * x + b * noise - prediction.to(x)) * _of_rows(self._gains, t, x)
        return distance.square().flatten(1).mean(1)


def _flow_sigmas(scheduler: Any) -> Tensor:
    """Training levels of a flow by growing noise, ``(size,)`` float64."""
    config = scheduler.config
    if type(scheduler).__name__.startswith("FlowMatch"):  # as built: sampling sets others in their place
        return type(scheduler).from_config(config).sigmas[: config.num_train_timesteps].flip(0).double()
    size, shift = config.num_train_timesteps, config.get("flow_shift", 1.0)
    sigmas = torch.arange(1, size + 1, dtype=torch.float64) / size
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _of_rows(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    return table.to(t.device)[t].to(like).reshape(-1, *[1] * (like.ndim - 1))
