"""Train the embedded autoencoder: 64x64 pictures to 16x16 latents of 4 channels and back."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from common import AveragedWeights, Log, Training, to_unit, warm_up_and_cosine
from data import DataSet
from diffusers import AutoencoderKL

BATCH = 16
WARMUP_STEPS = 100
KL_WEIGHT = 2e-3  # on the mean KL of a latent element; keeps latents coarse enough for a small denoiser to hit
SHIFT = 3  # largest random translation, pixels


def build_vae() -> AutoencoderKL:
    """A freshly initialised autoencoder of 0.95 million parameters."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=64,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )


def shift(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Translate uint8 pictures by up to ``SHIFT`` pixels each way, white coming in at the border."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (SHIFT,) * 4, value=255)
    offsets = torch.randint(0, 2 * SHIFT + 1, (len(images), 2), generator=generator).tolist()
    return torch.stack([p[:, y : y + height, x : x + width] for p, (y, x) in zip(padded, offsets, strict=True)])


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean absolute and squared error plus the error of pixel differences at three scales, which keeps edges crisp."""
    error = output - target
    loss = error.abs().mean() + 2.0 * error.square().mean()
    for _ in range(3):
        loss = loss + 0.5 * (
            (error[..., 1:, :] - error[..., :-1, :]).abs().mean() + (error[..., 1:] - error[..., :-1]).abs().mean()
        )
        error = F.avg_pool2d(error, 2)
    return loss


@torch.no_grad()
def encode_mean(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Posterior means ``(N, 4, 16, 16)`` float32 of uint8 pictures, not yet scaled."""
    return torch.cat([vae.encode(to_unit(batch)).latent_dist.mean for batch in images.split(64)])


@torch.no_grad()
def quality(vae: AutoencoderKL, images: torch.Tensor) -> dict[str, float]:
    """Reconstruction from the posterior mean: mean absolute error in [-1, 1] and peak signal-to-noise ratio in dB."""
    absolute = squared = 0.0
    for batch in images.split(64):
        target = to_unit(batch)
        error = vae.decode(vae.encode(target).latent_dist.mean).sample.clamp(-1, 1) - target
        absolute += error.abs().mean((1, 2, 3)).sum().item()
        squared += error.square().mean((1, 2, 3)).sum().item()
    return {"mae": absolute / len(images), "psnr": 10 * math.log10(4 * len(images) / squared)}


def train_vae(data: DataSet, work_dir: Path, steps: int, learning_rate: float = 2e-3, seed: int = 1) -> Path:
    """Train for ``steps`` (resuming if interrupted); returns the ``save_pretrained`` folder of the averaged weights."""
    folder = work_dir / "vae"
    checkpoint = work_dir / "vae_checkpoint.pt"
    log = Log(work_dir / "vae.jsonl")
    torch.manual_seed(seed)
    vae = build_vae().train()
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=1e-4)
    average = AveragedWeights(vae, decay=0.998)
    training = Training(vae, optimizer, average, checkpoint, log, steps=steps, save_every=200, clip=0.5)
    weights = data.weights(flag_weight=0.6)
    for step, generator in training.generators(seed):
        rate = learning_rate * warm_up_and_cosine(step, steps, WARMUP_STEPS, floor=0.01)
        chosen = torch.multinomial(weights, BATCH, replacement=False, generator=generator)
        target = to_unit(shift(data.images[chosen], generator))
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(target).latent_dist
            output = vae.decode(posterior.sample(generator=generator)).sample
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = reconstruction_loss(output.float(), target)
        training.update(step, rate, loss, penalty=KL_WEIGHT * kl)
        training.record(
            step,
            kl=kl.item(),
            mean_std=mean.std().item(),
            posterior_std=(0.5 * logvar).exp().mean().item(),
            lr=rate,
        )
    result = build_vae()
    result.load_state_dict(average.values)
    result.eval()
    latents = encode_mean(result, data.images)
    result.register_to_config(scaling_factor=round(1 / latents.std().item(), 5), shift_factor=None)
    log(**quality(result, data.images[::8]), latent_mean=latents.mean().item(), latent_std=latents.std().item())
    result.save_pretrained(folder)
    return folder
