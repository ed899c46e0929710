"""A small diffusion transformer that has learnt something: what cache hooks change of random weights means nothing.

A FLUX.1 of 1.5 million parameters with the embedded model's text tower and VAE, trained on that model's own pictures
(guided ones: it needs no guidance of its own). ``benchmarks/rollout_switches.py --model FOLDER`` reads what it writes.

    OMP_NUM_THREADS=1 python -m benchmarks.small_dit /tmp/small_dit
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.embedded_assets import embedded_model_path, embedded_reward_path
from nemo_aligner_diffusion.rewards import restore_reward

PROMPTS = embedded_model_path().parent / "prompts_train.txt"
TOKENS, SIDE = 24, 16  # of a prompt; of the latents


def with_transformer(transformer: Any) -> DiffusionModel:
    """A FLUX.1 pipeline of the embedded model's other parts."""
    pipe = load_model().pipe
    pipe.vae.register_to_config(shift_factor=0.0)
    text = {"text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder,
            "tokenizer": pipe.tokenizer, "tokenizer_2": pipe.tokenizer}  # fmt: skip
    flux = FluxPipeline(FlowMatchEulerDiscreteScheduler(), pipe.vae, transformer=transformer, **text)
    return DiffusionModel(flux, arguments={"max_sequence_length": TOKENS})


def small_dit(folder: str | Path) -> DiffusionModel:
    """What :func:`main` has written to ``folder``."""
    return with_transformer(FluxTransformer2DModel.from_pretrained(folder))


@torch.no_grad()
def pictures(prompts: list[str], seeds: int, steps: int) -> torch.Tensor:
    """The embedded model's scaled latents ``(len(prompts) · seeds, 4, 16, 16)``, prompt by prompt."""
    pipe = load_model().pipe
    pipe.set_progress_bar_config(disable=True)
    found = []
    for start in range(0, len(prompts), 16):
        part = prompts[start : start + 16]
        given = [torch.Generator().manual_seed(start * seeds + j) for j in range(len(part) * seeds)]
        found.append(pipe(part, num_inference_steps=steps, guidance_scale=2.0, num_images_per_prompt=seeds,
                          generator=given, output_type="latent").images)  # fmt: skip
    return torch.cat(found)


def train(steps: int, seeds: int, batch: int = 32, rate: float = 2e-3) -> Any:
    """Flow matching, ``v = n − x`` at ``(1 − σ) x + σ n`` with ``σ`` logit-normal (SD3, arXiv 2403.03206)."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=6, attention_head_dim=32, num_attention_heads=3,
        joint_attention_dim=160, pooled_projection_dim=160, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    model = with_transformer(transformer)
    prompts = PROMPTS.read_text("utf-8").splitlines()
    latents = FluxPipeline._pack_latents(x := pictures(prompts, seeds, 12), len(x), 4, SIDE, SIDE)
    with torch.no_grad():
        states, pooled, _ = model.pipe.encode_prompt(prompts, None, max_sequence_length=TOKENS)
    image_ids = FluxPipeline._prepare_latent_image_ids(1, SIDE // 2, SIDE // 2, "cpu", torch.float32)
    transformer.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(transformer.parameters(), rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05)
    for step in range(steps):
        chosen = torch.randint(len(latents), (batch,))
        clean, noise, sigma = latents[chosen], torch.randn(batch, *latents.shape[1:]), torch.randn(batch).sigmoid()
        noisy = torch.lerp(clean, noise, sigma[:, None, None])
        predicted = transformer(noisy, states[chosen // seeds], pooled[chosen // seeds], sigma, image_ids,
                                torch.zeros(TOKENS, 3), return_dict=False)[0]  # fmt: skip
        loss = (predicted - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"{step + 1}: {loss.item():.4f}", flush=True)
    return transformer


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=2, help="pictures of each prompt that it learns from")
    given = parser.parse_args()
    with torch.enable_grad():
        train(given.steps, given.seeds).save_pretrained(given.folder)
    small = small_dit(given.folder)
    reward, prompts = restore_reward(embedded_reward_path()), PROMPTS.read_text("utf-8").splitlines()[:64]
    for name, model in (("embedded", load_model()), ("small DiT", small)):
        seeds = [torch.Generator().manual_seed(j) for j in range(len(prompts))]
        images = model.pipe(**model.inputs(prompts, 20, 2.0, 64, 64), generator=seeds, output_type="pt").images
        print(f"{name}: mean reward of {len(prompts)} pictures {reward.scores(images, prompts)[0].mean():.2f}")


if __name__ == "__main__":
    main()
