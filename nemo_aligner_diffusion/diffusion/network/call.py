"""A pipeline's denoiser called at ``(z_t, t)`` of our choice, on what the pipeline itself makes of prompts.

Nothing is declared for a family: the pipeline's own loop runs for a few steps, and what its network and its scheduler
are handed says which argument is the latents, which the timestep and by what map, and what of the output is the
prediction. The finding is tried before it is used: each row of one call at mixed levels must be the loop's own.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_aligner_diffusion.diffusion.generate import Sampling
from nemo_aligner_diffusion.diffusion.network.dry_run import (
    PROMPTS,
    STEPS,
    Arguments,
    Stop,
    first_call,
    followed,
    same,
    stop,
    without_guidance,
)
from nemo_aligner_diffusion.diffusion.network.levels import TrainingLevels
from nemo_aligner_diffusion.diffusion.taps import called_in_mode, no_autocast_cache
from nemo_aligner_diffusion.errors import AlignerError, ConfigurationError, first_line

if TYPE_CHECKING:
    from nemo_aligner_diffusion.diffusion.model import DiffusionModel


@dataclass(frozen=True)
class Conditioning:
    """What a denoiser is called with beside latents and timestep, for a batch of prompts.

    Attributes:
        arguments: of the call that the pipeline would make first.
        rows: how many prompts.
    """

    arguments: Arguments
    rows: int


class DirectCalls:
    """A pipeline's trained network as ``f(z_t, t, prompts)``.

    Args:
        model: in its precision and placement; every process of its group must make one, at the same time.
        sampling: size of the pictures, and a guidance scale that is an input of the network (FLUX.1's); guidance by a
            second prediction is off.

    Attributes:
        levels: at which it was trained.
        latent_shape: of one sample, as the network is handed it (packed, where the pipeline packs).

    Raises:
        ConfigurationError: it cannot be called so; names the pipeline and what was not found.
    """

    def __init__(self, model: DiffusionModel, sampling: Sampling) -> None:
        self.model = model
        self.levels = TrainingLevels(model.pipe.scheduler)
        self._height, self._width = sampling.height, sampling.width
        was_training = model.denoiser.training
        model.denoiser.eval()
        try:
            with torch.no_grad():
                self._find(sampling.guidance_scale)
        except (AlignerError, torch.OutOfMemoryError):
            raise
        except (Stop, Exception) as end:  # networks fail in many ways with a row of their own for each prompt
            reason = end.reason if isinstance(end, Stop) else f"it fails with {type(end).__name__}: {first_line(end)}"
            raise ConfigurationError(
                f"{type(model.pipe).__name__}: its {model.trained} cannot be called at a noise level of our choice, "
                f"which training on given pictures needs: {reason}; train this model with a reward instead"
            ) from (None if isinstance(end, Stop) else end)
        finally:
            model.denoiser.train(was_training)

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """The pipeline's own call for these prompts, up to its first call of the network; no gradient."""
        inputs = {**self._inputs(prompts), **self._guidance}
        return Conditioning(first_call(self.model, prompts, inputs), len(prompts))

    def predict(self, conditioning: Conditioning, z: Tensor, t: Tensor) -> Tensor:
        """The network's prediction, in its scheduler's ``prediction_type``; gradient as autograd's present mode.

        Args:
            z: latents ``(B, *latent_shape)``, ``B`` the prompts' number or a multiple of it: row ``j`` is of prompt
                ``j`` modulo their number. The network gets them in the dtype of the pipeline's own.
            t: levels ``(B,)`` int64.

        Returns:
            ``(B, *latent_shape)``, in the network's dtype.
        """
        return self._called(conditioning, z, self.levels.timesteps.to(t.device)[t])

    def _called(self, conditioning: Conditioning, z: Tensor, timesteps: Tensor) -> Tensor:
        times, rest = divmod(len(z), conditioning.rows)
        if rest or len(timesteps) != len(z):
            raise ValueError(f"{len(z)} latents and {len(timesteps)} levels for {conditioning.rows} prompts")
        given = {name: _repeated(x, self._rows[name], times) for name, x in conditioning.arguments.items()}
        slope, shift = self._map
        latents, own, told = given[self._latents], given[self._timestep], timesteps * slope + shift
        kind = own.dtype if isinstance(own, Tensor) else torch.tensor(own).dtype  # a number for all rows
        if self._told_fractions and not kind.is_floating_point:  # a flow's solver rounds them
            kind = torch.float32
        given |= {self._latents: z.to(latents), self._timestep: told.to(latents.device, kind)}
        network: Any = self.model.network(self.model.trained)
        gradient, declared = torch.is_grad_enabled(), self.model.family.gradient_in_training
        call = functools.partial(called_in_mode, network, declared, gradient) if declared else network
        with no_autocast_cache() if gradient else contextlib.nullcontext():
            output = call(**given)
        return self._part.of(output)

    def _inputs(self, prompts: Sequence[str]) -> dict[str, Any]:
        return self.model.inputs(prompts, STEPS, height=self._height, width=self._width)

    def _find(self, guidance_scale: float | None) -> None:
        steps, self._guidance = without_guidance(self.model, self._inputs(PROMPTS), guidance_scale)
        first, last = steps[0], steps[-1]
        self.latent_shape = tuple(first.latents.shape[1:])
        self._latents = first.latents_name()
        self._timestep, self._map = followed(steps, self._latents, self.levels.scale)
        told = self.levels.timesteps * self._map[0] + self._map[1]
        self._told_fractions = bool((told != told.round()).any())
        parts = [part for part in first.parts() if all(part in step.parts() for step in steps)]
        self._part = parts[0] if parts else stop("what of its output is the prediction differs from step to step")
        more = self.conditioning([*PROMPTS, "a"]).arguments
        self._rows = {name: _rows(x, more.get(name)) for name, x in first.arguments.items()}
        fixed = Conditioning(first.arguments, len(PROMPTS))

        def far(rows: list[tuple[Any, int]], least: float = 0.01) -> tuple[bool, float]:
            """Whether a call of these rows gives other predictions than the loop, and by what share of the largest."""
            z, expected = (torch.stack([getattr(step, of)[j] for step, j in rows]) for of in ("latents", "prediction"))
            timesteps = torch.tensor([step.timestep for step, _ in rows], dtype=torch.float64)
            got = self._called(fixed, z, timesteps)
            share = float((got - expected).abs().max() / expected.abs().max())
            return not same(got, expected, least), share

        # twice the prompts, as pairs have them
        mixed = [(first, 0), (last, 1), (last, 0), (first, 1)]
        if far(mixed)[0]:
            # kernels, and so rounding, are chosen by the batch's size, and some networks multiply it
            rounding = max(far([(step, 0), (step, 1)] * 2)[1] for step in (first, last))
            if far(mixed, min(2 * rounding, 0.1))[0]:
                stop("with another timestep in each row it gives other predictions than in its loop")


def _rows(two: Any, three: Any) -> Any:
    """Where an argument has an entry for each prompt, by the same for two prompts and for three.

    Returns:
        The dimension of a tensor, 0 of a list; nested in lists and dictionaries; ``None``: it has none.
    """
    if isinstance(two, Tensor) and isinstance(three, Tensor):
        sizes = enumerate(zip(two.shape, three.shape, strict=False))
        return next((dimension for dimension, size in sizes if size == (2, 3)), None)
    if isinstance(two, dict) and isinstance(three, dict):
        return {name: _rows(x, three.get(name)) for name, x in two.items()}
    if isinstance(two, list | tuple) and isinstance(three, list | tuple):
        return 0 if (len(two), len(three)) == (2, 3) else [_rows(x, y) for x, y in zip(two, three, strict=False)]
    return None


def _repeated(x: Any, rows: Any, times: int) -> Any:
    if times == 1 or rows is None or x is None:  # a mask that hides nothing is left out
        return x
    if isinstance(rows, int):
        return torch.cat([x] * times, rows) if isinstance(x, Tensor) else x * times
    if isinstance(rows, dict):
        return {name: _repeated(value, rows[name], times) for name, value in x.items()}
    return type(x)(_repeated(value, part, times) for value, part in zip(x, rows, strict=True))
