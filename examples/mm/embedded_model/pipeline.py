"""Assemble the trained parts into a ``StableDiffusionPipeline``."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from tokenizer import MAX_TOKENS
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

#: Sampling settings the model is shipped and evaluated with.
GUIDANCE_SCALE = 2.0
INFERENCE_STEPS = 20


def build_scheduler() -> DDIMScheduler:
    """The shipped scheduler: v-prediction, scaled-linear betas, timesteps counted back from the noisiest."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.016,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def text_tower(clip: CLIPModel) -> CLIPTextModel:
    """The text half of ``clip`` as a model of its own, with the same weights."""
    tower = CLIPTextModel(clip.config.text_config)
    wanted = tower.state_dict().keys()
    full = clip.state_dict()
    prefix = "" if all(name in full for name in wanted) else "text_model."
    tower.load_state_dict({name: full[prefix + name] for name in wanted})
    return tower.eval()


def build_pipeline(clip_folder: Path, vae_folder: Path, unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """The whole text-to-image model in float32."""
    clip = CLIPModel.from_pretrained(clip_folder)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(vae_folder),
        text_encoder=text_tower(clip),
        tokenizer=CLIPTokenizer.from_pretrained(clip_folder, model_max_length=MAX_TOKENS),
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def generate(
    pipeline: StableDiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    guidance_scale: float = GUIDANCE_SCALE,
    steps: int = INFERENCE_STEPS,
    batch: int = 64,
) -> torch.Tensor:
    """Sample every prompt with every seed: ``(len(prompts) * len(seeds), 3, 64, 64)`` uint8, prompt by prompt.

    The starting noise depends on the seed alone, so it is the same for every prompt and every batch size.
    """
    size = pipeline.unet.config.sample_size
    channels = pipeline.unet.config.in_channels
    noise = {s: torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(s)) for s in seeds}
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    pictures = []
    for start in range(0, len(jobs), batch):
        part = jobs[start : start + batch]
        images = pipeline(
            [prompt for prompt, _ in part],
            latents=torch.cat([noise[seed] for _, seed in part]),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            output_type="pt",
        ).images
        pictures.append((images * 255).round().to(torch.uint8))
    return torch.cat(pictures)


def labelled_grid(images: torch.Tensor, labels: list[str], columns: int, scale: int = 1) -> Image.Image:
    """Pictures ``(N, 3, H, W)`` uint8 in rows of ``columns``, each row's first picture labelled above its cell.

    ``labels`` has one text a picture, or one for every ``columns`` pictures.
    """
    size = images.shape[-1] * scale
    gap, text = 4, 12
    rows = -(-len(images) // columns)
    every = 1 if len(labels) == len(images) else columns
    canvas = Image.new("RGB", (columns * (size + gap) + gap, rows * (size + gap + text) + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for i, image in enumerate(images):
        x, y = gap + (i % columns) * (size + gap), gap + (i // columns) * (size + gap + text)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        canvas.paste(picture.resize((size, size), Image.Resampling.NEAREST), (x, y + text))
        if i % every == 0:
            limit = (size + gap) * every // 6  # the default font is about 6 pixels wide
            draw.text((x, y), labels[i // every][:limit], fill="black")
    return canvas
