"""Judge the shipped embedded model: does a name give the named thing, and a broad word different things?

Example::

    python examples/mm/embedded_model/evaluate_embedded.py --work-dir ~/embedded_work --output docs/images
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from captions import article
from data import DataSet, prepare
from diffusers import StableDiffusionPipeline
from pipeline import GUIDANCE_SCALE, INFERENCE_STEPS, generate, labelled_grid
from prompts import BROAD_WORDS, SPECIFIC, VALIDATION, picture_of

from nemo_aligner_diffusion.embedded_assets import embedded_model_path, embedded_reward_path
from nemo_aligner_diffusion.rewards import restore_reward
from nemo_aligner_diffusion.rewards.clip.reward import CLIPReward


@torch.no_grad()
def embed(reward: CLIPReward, images: torch.Tensor) -> torch.Tensor:
    """Unit vectors ``(N, D)`` of uint8 pictures ``(N, 3, 64, 64)``."""
    return torch.cat([reward.embed_images(batch.float() / 255) for batch in images.split(128)])


def mean_pairwise_distance(vectors: torch.Tensor) -> float:
    """Mean cosine distance over all pairs of different rows."""
    count = len(vectors)
    return ((count**2 - (vectors @ vectors.T).sum()) / (count * (count - 1))).item()


def naming(
    pipeline: StableDiffusionPipeline,
    reward: CLIPReward,
    real: torch.Tensor,
    data: DataSet,
    guidance: float,
    steps: int,
) -> tuple[dict[str, float], torch.Tensor, dict[str, float]]:
    """Figures for 64 specific prompts and 4 seeds, the pictures, and the share of right ones by prompt.

    ``nearest`` is the share of generated pictures whose nearest real picture, of all, is the named one;
    ``captioned`` the share for which the nearest one at least carries the prompt as one of its captions or keywords;
    ``mean_reward`` the reward of the prompts, ``mean_reward_real`` that of the real pictures.
    """
    images = generate(pipeline, list(SPECIFIC), [0, 1, 2, 3], guidance, steps)
    nearest = (embed(reward, images) @ real.T).argmax(1)
    named = torch.tensor([picture_of(prompt, data) for prompt in SPECIFIC]).repeat_interleave(4)
    fits = data.captions.fits()
    asked = torch.tensor([data.captions.texts.index(prompt) for prompt in SPECIFIC]).repeat_interleave(4)
    right = (nearest == named).float()
    with torch.no_grad():
        prompts = [prompt for prompt in SPECIFIC for _ in range(4)]
        generated = torch.cat(
            [reward(i.float() / 255, prompts[k * 64 : k * 64 + 64]) for k, i in enumerate(images.split(64))]
        )
        genuine = reward(data.images[named[::4]].float() / 255, list(SPECIFIC))
    figures = {
        "nearest": right.mean().item(),
        "captioned": fits[nearest, asked].float().mean().item(),
        "mean_reward": generated.mean().item(),
        "mean_reward_real": genuine.mean().item(),
    }
    by_prompt = dict(zip(SPECIFIC, right.view(-1, 4).mean(1).tolist(), strict=True))
    return figures, images, by_prompt


def diversity(
    pipeline: StableDiffusionPipeline,
    reward: CLIPReward,
    real: torch.Tensor,
    data: DataSet,
    guidance: float,
    steps: int,
) -> tuple[dict[str, dict[str, float]], torch.Tensor]:
    """For each broad word the mean pairwise distance of 16 seeds and of the real pictures, and the pictures."""
    prompts = [article(word) for word in BROAD_WORDS]
    images = generate(pipeline, prompts, list(range(16)), guidance, steps)
    vectors = embed(reward, images).view(len(prompts), 16, -1)
    fits = data.captions.fits()
    base = torch.tensor([not picture.is_variant for picture in data.pictures])
    figures = {}
    for word, prompt, own in zip(BROAD_WORDS, prompts, vectors, strict=True):
        members = fits[:, data.captions.texts.index(prompt)] & base
        distance, reference = mean_pairwise_distance(own), mean_pairwise_distance(real[members])
        inside = members[(own @ real.T).argmax(1)].float().mean().item()
        figures[word] = {"seeds": distance, "real": reference, "ratio": distance / reference, "in_category": inside}
    return figures, images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="folder of the rebuild, for the real pictures")
    parser.add_argument("--output", type=Path, help="folder for embedded_samples.png and embedded_broad.png")
    parser.add_argument("--guidance", type=float, default=GUIDANCE_SCALE)
    parser.add_argument("--steps", type=int, default=INFERENCE_STEPS)
    parser.add_argument("--model", type=Path, default=None, help="diffusers folder instead of the shipped one")
    arguments = parser.parse_args()

    data = prepare(arguments.work_dir)
    pipeline = StableDiffusionPipeline.from_pretrained(arguments.model or embedded_model_path(), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    reward = restore_reward(embedded_reward_path())
    real = embed(reward, data.images)
    named, images, by_prompt = naming(pipeline, reward, real, data, arguments.guidance, arguments.steps)
    spread, broad_images = diversity(pipeline, reward, real, data, arguments.guidance, arguments.steps)
    ratio = sum(row["ratio"] for row in spread.values()) / len(spread)
    result = {"naming": named, "diversity_ratio": ratio, "diversity": spread, "by_prompt": by_prompt}
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        picked = images.view(64, 4, 3, 64, 64)[:, 0]
        labelled_grid(picked, list(SPECIFIC), columns=8, scale=2).save(arguments.output / "embedded_samples.png")
        labelled_grid(broad_images, [article(word) for word in BROAD_WORDS], columns=16).save(
            arguments.output / "embedded_broad.png"
        )
        chosen = generate(pipeline, list(VALIDATION), [0, 1, 2, 3], arguments.guidance, arguments.steps)
        labelled_grid(chosen, list(VALIDATION), columns=4).save(arguments.output / "embedded_validation.png")


if __name__ == "__main__":
    main()
