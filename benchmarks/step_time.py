"""Where a training step's time goes, and the sampler's speed beside a plain ``diffusers`` pipeline call.

All figures come from one run, interleaved, as medians: on a noisy machine only ratios within a run mean anything.

    python benchmarks/step_time.py --repeats 5
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from nemo_aligner_diffusion.diffusion.families.stable_diffusion import StableDiffusion
from nemo_aligner_diffusion.diffusion.generate import sample, seeded_noise
from nemo_aligner_diffusion.diffusion.guidance import guided_predictor
from nemo_aligner_diffusion.diffusion.lora import add_lora
from nemo_aligner_diffusion.diffusion.sampler import Sampler
from nemo_aligner_diffusion.diffusion.trajectory import Plan, run_trajectory
from nemo_aligner_diffusion.embedded_assets import embedded_model_path, embedded_reward_path
from nemo_aligner_diffusion.rewards import restore_reward

PROMPTS = ["red apple", "dog", "rocket", "pizza", "cat face", "sunflower", "castle", "bicycle"]


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--active", type=int, default=1, help="active steps, from the last (default 1)")
    arguments = parser.parse_args()

    pipeline = StableDiffusionPipeline.from_pretrained(embedded_model_path(), safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    model = StableDiffusion.from_pretrained(embedded_model_path())
    reward = restore_reward(embedded_reward_path())
    sampler = Sampler(model.scheduler_config, "ddim", arguments.steps)
    seeds = list(range(len(PROMPTS)))
    noise = next(seeded_noise(seeds, model.latent_shape(), torch.zeros(1)))

    def theirs() -> torch.Tensor:
        return pipeline(
            PROMPTS, latents=noise, num_inference_steps=arguments.steps, guidance_scale=arguments.guidance,
            output_type="latent",
        ).images  # fmt: skip

    @torch.no_grad()
    def ours() -> torch.Tensor:
        predict = guided_predictor(model, model.encode_prompts(PROMPTS), arguments.guidance)
        return sample(sampler, predict, iter([noise]))

    difference = float((theirs() - ours()).abs().max())
    pairs = [(seconds(theirs), seconds(ours)) for _ in range(arguments.repeats)]
    ratio = statistics.median(ours_s / theirs_s for theirs_s, ours_s in pairs)
    print(f"grad-free trajectory: {ratio:.2f} x the time of a plain diffusers pipeline call "
          f"(median of {arguments.repeats}, same latents to {difference:.1e})")  # fmt: skip

    add_lora(model.denoiser, rank=8)
    parameters = [p for p in model.denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    plan = Plan(active=tuple(range(arguments.steps - arguments.active, arguments.steps)))
    phases: dict[str, list[float]] = {}

    def timed(phase: str, call: Callable[[], object]) -> object:
        result: list[object] = []
        phases.setdefault(phase, []).append(seconds(lambda: result.append(call())))
        return result[0]

    for _ in range(arguments.repeats):
        predict = guided_predictor(model, model.encode_prompts(PROMPTS), arguments.guidance)
        trajectory = timed("rollout", lambda p=predict: run_trajectory(p, sampler, plan, lambda: noise))
        leaf = trajectory.reads[0].detach().requires_grad_()  # type: ignore[attr-defined]
        images = timed("decode", lambda x=leaf: model.decode(x))
        loss = timed("reward", lambda x=images: -reward(x, PROMPTS).mean())
        gradient = timed("reward + decode backward", lambda x=leaf, y=loss: torch.autograd.grad(y, x)[0])
        timed("replay (recompute + backward)", lambda t=trajectory, g=gradient: (t.reads[0] * g).sum().backward())
        timed("optimizer", lambda: (optimizer.step(), optimizer.zero_grad()))
    total = sum(statistics.median(times) for times in phases.values())
    print(
        f"training step of {len(PROMPTS)} pictures, {arguments.steps} steps, {arguments.active} active: {total:.2f} s"
    )
    for phase, times in phases.items():
        median = statistics.median(times)
        print(f"  {phase:<30} {median:7.3f} s  {100 * median / total:5.1f} %")


if __name__ == "__main__":
    main()
