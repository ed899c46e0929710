"""Pictures from prompts and seeds, without gradient: for validation, for ``generate.py`` and for the figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nemo_aligner_diffusion.diffusion.families.stable_diffusion import StableDiffusion
from nemo_aligner_diffusion.diffusion.guidance import Predictor, guided_predictor
from nemo_aligner_diffusion.diffusion.noise import gaussian, sample_generator
from nemo_aligner_diffusion.diffusion.sampler import Sampler


def sample(sampler: Sampler, predict: Predictor, noise: Iterator[Tensor]) -> Tensor:
    """The whole trajectory without gradient: ``noise`` yields ``z_0 / initial_scale``, then the solver's own."""
    latents = [sampler.initial_scale * next(noise)]
    predictions: list[Tensor] = []
    for i, timestep in enumerate(sampler.timesteps):
        predictions.append(predict(sampler.network_input(i, latents[i]), timestep))
        latents.append(sampler.step(i, latents, predictions, next(noise) if sampler.steps[i].noise else None))
    return latents[-1]


@torch.no_grad()
def generate(
    model: StableDiffusion,
    sampler: Sampler,
    prompts: Sequence[str],
    seeds: Sequence[int],
    guidance_scale: float,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 16,
    decode_batch_size: int | None = None,
    tuned_weights: Sequence[float] | None = None,
) -> Tensor:
    """One picture for each (prompt, seed) pair.

    Args:
        prompts, seeds: of equal length; a seed fixes the picture's noise whatever else is in the batch.
        guidance_scale: classifier-free guidance; 1 makes no unconditional pass.
        height, width: pixels; the model's own size by default.
        batch_size: pictures at a time.
        decode_batch_size: of these, decoded at a time; ``None``: all.
        tuned_weights: annealed importance guidance (design notes 3.4): ``w_i`` for each network call, the prediction
            is ``w_i·e^tuned + (1−w_i)·e^base``. ``None``: the model as it stands.

    Returns:
        ``(N, 3, H, W)`` float32 in [0, 1] on the CPU, in the order of ``prompts``.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"one seed for each prompt: got {len(prompts)} prompts and {len(seeds)} seeds")
    if tuned_weights is not None and len(tuned_weights) != len(sampler):
        raise ValueError(f"{len(tuned_weights)} weights for {len(sampler)} sampling steps")
    was_training = model.denoiser.training
    model.denoiser.eval()
    shape = model.latent_shape(height, width)
    images = []
    try:
        for start in range(0, len(prompts), batch_size):
            rows = slice(start, start + batch_size)
            conditioning = model.encode_prompts(prompts[rows])
            predict = guided_predictor(model, conditioning, guidance_scale)
            if tuned_weights is not None:
                predict = _annealed(model, predict, tuned_weights)
            noise = seeded_noise(seeds[rows], shape, like=model.latent_like)
            latents = sample(sampler, predict, noise)
            images += [model.decode(some).float().cpu() for some in latents.split(decode_batch_size or len(latents))]
    finally:
        model.denoiser.train(was_training)
    return torch.cat(images)


def seeded_noise(seeds: Sequence[int], shape: tuple[int, int, int], like: Tensor) -> Iterator[Tensor]:
    """Endless standard normal ``(len(seeds), *shape)``, each row from its own seed alone."""
    generators = [sample_generator(seed, 0, 0) for seed in seeds]
    while True:
        yield gaussian(generators, shape, like)


def _annealed(model: StableDiffusion, tuned: Predictor, weights: Sequence[float]) -> Predictor:
    remaining = iter(weights)  # one call a step, in order

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        weight = next(remaining)
        if weight == 1.0:
            return tuned(latents, timestep)
        with model.reference():
            base = tuned(latents, timestep)
        return base if weight == 0.0 else torch.lerp(base, tuned(latents, timestep), weight)

    return predict
