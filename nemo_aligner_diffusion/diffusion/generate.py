"""Pictures from prompts and seeds, without gradient: for validation, for ``generate.py`` and for the figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.trajectory import sample


@dataclass(frozen=True)
class Sampling:
    """How pictures are sampled, in training and out of it; the solver is the pipeline's.

    Attributes:
        steps: ``num_inference_steps``, at least 1; ``None``: the pipeline's default.
        guidance_scale: classifier-free guidance in the pipeline's own argument; ``None``: its default.
        height, width: pixels; ``None``: the pipeline's default.
        eta: DDIM's η in [0, 1].
    """

    steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    eta: float = 0.0


def generate(
    model: DiffusionModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
    batch_size: int = 16,
    decode_batch_size: int | None = None,
    tuned_weights: Callable[[int], Sequence[float]] | None = None,
) -> Tensor:
    """One picture for each (prompt, seed) pair.

    Args:
        prompts, seeds: of equal length; a seed fixes the picture's noise whatever else is in the batch: the picture is
            that of ``pipeline(prompt, generator=torch.Generator().manual_seed(seed))``.
        batch_size: pictures at a time.
        decode_batch_size: of these, decoded at a time; ``None``: all.
        tuned_weights: annealed importance guidance: see :func:`.trajectory.sample`. ``None``: the model as it stands.

    Returns:
        ``(N, 3, H, W)`` float32 in [0, 1] on the CPU, in the order of ``prompts``; of a video pipeline
        ``(N, F, 3, H, W)``.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"one seed for each prompt: got {len(prompts)} prompts and {len(seeds)} seeds")
    was_training = model.denoiser.training
    model.eval()
    images = []
    try:
        for start in range(0, len(prompts), batch_size):
            rows = slice(start, start + batch_size)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[rows]]
            inputs = model.inputs(prompts[rows], **vars(sampling))
            images.append(sample(model, generators, inputs, tuned_weights, decode_batch_size).float().cpu())
    finally:
        model.denoiser.train(was_training)
    return torch.cat(images)


def picture_size(model: DiffusionModel, sampling: Sampling) -> tuple[int, int]:
    """(height, width) in pixels of the pictures that ``sampling`` makes; where nothing says it, one is made to see."""
    if sampling.height is not None and sampling.width is not None:
        return sampling.height, sampling.width
    said = own_size(model) if sampling.height is sampling.width else None  # neither is given
    height, width = said or generate(model, [""], [0], replace(sampling, steps=2)).shape[-2:]
    return height, width


def own_size(model: DiffusionModel) -> tuple[int, int] | None:
    """(height, width) in pixels of the pipeline's pictures, where it can be read off it, as its own call does."""
    pipe = model.pipe
    side, factor = getattr(pipe, "default_sample_size", None), getattr(pipe, "vae_scale_factor", None)
    if model.trained == "unet" and side is None:
        side = model.denoiser.config.get("sample_size")
    if not isinstance(side, int) or not isinstance(factor, int) or "default_sample_size" in pipe.config:
        return None  # the last is PRX's, in pixels and to be binned
    return side * factor, side * factor
