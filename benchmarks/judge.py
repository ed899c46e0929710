"""Train a recipe on the embedded model and judge the result the same way every time: for the tables in ``docs/``."""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nemo_aligner_diffusion.algorithms import DRaFT
from nemo_aligner_diffusion.config.load import load_config
from nemo_aligner_diffusion.data.prompts import read_prompts
from nemo_aligner_diffusion.diffusion.generate import generate
from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.diffusion.lora import load_lora_weights
from nemo_aligner_diffusion.diffusion.noise import sample_generator
from nemo_aligner_diffusion.diffusion.trajectory import rollout
from nemo_aligner_diffusion.embedded_assets import embedded_model_path, embedded_prompts_path, embedded_reward_path
from nemo_aligner_diffusion.evaluation.diversity import diversity, embed_images, recognisability
from nemo_aligner_diffusion.rewards import build_reward, restore_reward
from nemo_aligner_diffusion.training.build import build_sampling
from nemo_aligner_diffusion.training.run import run_training

BROAD = ["an animal", "a fruit", "a vehicle", "a building", "a face", "a plant", "a tool", "a bird"]


@dataclass(frozen=True)
class Judgement:
    """Figures of one model on fixed prompts and seeds; ``top1``: share of pictures whose prompt CLIP finds first."""

    reward: float
    top1: float
    mean_reciprocal_rank: float
    diversity: float  # mean CLIP distance between seeds of a broad prompt
    divergence: float  # mean squared distance to the base model's predictions over whole trajectories
    images: Tensor


class Judge:
    """Pictures of the validation prompts (two seeds each) and of broad prompts (four seeds), scored.

    Args:
        rewards: the ``rm`` configuration of the reward that was trained on, as overrides. Everything else is as
            shipped.
    """

    def __init__(self, rewards: Sequence[str] = ()) -> None:
        self.config = load_config("draftp_sd", list(rewards))
        self.reward = build_reward(self.config.rm)
        self.clip = restore_reward(embedded_reward_path())
        self.prompts = [p for p in read_prompts(str(embedded_prompts_path("validation"))) if p not in BROAD]
        self.candidates = read_prompts(str(embedded_prompts_path("train")))

    @torch.no_grad()
    def __call__(self, lora: Path | None) -> Judgement:
        model = load_model(embedded_model_path())
        if lora is not None:
            load_lora_weights(model.denoiser, lora, "judged")
        infer = self.config.model.infer
        model.set_scheduler(infer.sampler_type, infer.eta)
        sampling = build_sampling(self.config)

        def pictures(prompts: Sequence[str], seeds: Sequence[int]) -> tuple[list[str], Tensor]:
            pairs = [(prompt, 100 + seed) for prompt in prompts for seed in seeds]
            names = [prompt for prompt, _ in pairs]
            return names, generate(model, names, [seed for _, seed in pairs], sampling)

        names, images = pictures(self.prompts, (0, 1))
        broad_names, broad = pictures(BROAD, (0, 1, 2, 3))
        divergence = 0.0
        if lora is not None:
            run = rollout(
                model,
                DRaFT().plan,  # every step
                [sample_generator(seed, 0, 0) for seed in range(8)],
                model.inputs(self.prompts[:8], **vars(sampling)),
                lambda images, rows, read: images.mean((1, 2, 3)),  # any: the divergence alone is asked for
                reference=True,
            )
            assert run.divergence is not None
            divergence = float(run.divergence)
        found = recognisability(self.clip, images, names, self.candidates)
        return Judgement(
            reward=float(self.reward(images, names).mean()),
            top1=found.top1,
            mean_reciprocal_rank=found.mean_reciprocal_rank,
            diversity=diversity(embed_images(self.clip, broad), broad_names),
            divergence=divergence,
            images=images,
        )


def train(recipe: str, directory: Path, *overrides: str) -> Path:
    """Run ``recipe`` anew into ``directory`` and return its exported LoRA."""
    shutil.rmtree(directory, ignore_errors=True)
    code = run_training(load_config(recipe, [*overrides, f"exp_manager.explicit_log_dir={directory}"]))
    if code:
        raise SystemExit(code)
    return directory / "export" / "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Job:
    """One training run to judge: ``rewards`` are the overrides that choose the reward, for training and judging."""

    recipe: str
    directory: Path
    rewards: tuple[str, ...]
    overrides: tuple[str, ...]


def _work(job: Job) -> Judgement:
    torch.set_num_threads(1)
    return Judge(job.rewards)(train(job.recipe, job.directory, *job.rewards, *job.overrides))


def run_jobs(jobs: Sequence[Job], workers: int) -> Iterator[Judgement]:
    """Train and judge, ``workers`` processes of one thread at a time; results in the order of ``jobs``."""
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_work, jobs)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; floats with four significant digits."""

    def cell(value: object) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(map(cell, row)) + " |" for row in rows)]) + "\n"


def main() -> None:
    """``python -m benchmarks.judge results/train_001/export``: base and tuned side by side."""
    parser = argparse.ArgumentParser(description="Judge an exported LoRA of the embedded model beside the base.")
    parser.add_argument("lora", type=Path, help="export folder or .safetensors file")
    parser.add_argument("--reward", nargs="*", default=[], help="overrides that choose the reward, such as rm=symmetry")
    arguments = parser.parse_args()
    judge = Judge(arguments.reward)
    base, tuned = judge(None), judge(arguments.lora)
    columns = ["model", "reward", "KL", "CLIP top-1", "CLIP MRR", "diversity", "of the base's"]
    rows = [
        (name, m.reward, m.divergence, m.top1, m.mean_reciprocal_rank, m.diversity, m.diversity / base.diversity)
        for name, m in (("base", base), ("tuned", tuned))
    ]
    print(table(columns, rows))


if __name__ == "__main__":
    main()
