"""Gradient norm of full DRaFT and of DRTune against the number of sampling steps (design notes, oracle 5).

python -m benchmarks.gradient_norm_vs_steps --docs docs
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch

from benchmarks.judge import table
from nemo_aligner_diffusion.algorithms.draft import LastSteps
from nemo_aligner_diffusion.algorithms.drtune import SpacedSteps
from nemo_aligner_diffusion.diffusion.families.stable_diffusion import StableDiffusion
from nemo_aligner_diffusion.diffusion.guidance import guided_predictor
from nemo_aligner_diffusion.diffusion.lora import add_lora
from nemo_aligner_diffusion.diffusion.noise import gaussian, sample_generator
from nemo_aligner_diffusion.diffusion.sampler import Sampler
from nemo_aligner_diffusion.diffusion.trajectory import reward_gradient, run_trajectory
from nemo_aligner_diffusion.embedded_assets import embedded_model_path
from nemo_aligner_diffusion.evaluation.curves import Curve, save_curve_plot
from nemo_aligner_diffusion.rewards.symmetry import MirrorSymmetry


def gradient_norm(model: StableDiffusion, steps: int, method: str, guidance_scale: float) -> float:
    """Norm of the LoRA gradient of the mean symmetry of four pictures; every step supervised by both methods."""
    sampler = Sampler(model.scheduler_config, "ddim", steps)
    prompts = ["dog", "red apple", "rocket", "castle"]
    predict = guided_predictor(model, model.encode_prompts(prompts), guidance_scale)
    rule = LastSteps() if method == "DRaFT" else SpacedSteps(train_steps=steps, early_stop_steps=0)
    generators = [sample_generator(0, 0, i) for i in range(len(prompts))]
    noise = gaussian(generators, model.latent_shape())
    reward = MirrorSymmetry()
    trajectory = run_trajectory(predict, sampler, rule(steps, random.Random(0)), lambda: noise)
    gradients = reward_gradient(trajectory.reads, model.decode, lambda x, rows: -reward(x, prompts[rows]).mean())
    parameters = [p for p in model.denoiser.parameters() if p.requires_grad]
    model.denoiser.zero_grad()
    (trajectory.reads[0] * gradients[0]).sum().backward()
    return float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 5, 10, 20, 40])
    parser.add_argument("--guidance", type=float, default=4.0)
    arguments = parser.parse_args()
    model = StableDiffusion.from_pretrained(embedded_model_path())
    torch.manual_seed(0)
    add_lora(model.denoiser, rank=8)
    rows = []
    for steps in arguments.steps:
        norms = [gradient_norm(model, steps, method, arguments.guidance) for method in ("DRaFT", "DRTune")]
        rows.append((steps, *norms, norms[0] / norms[1]))
    text = table(["sampling steps", "full DRaFT", "DRTune, all steps", "ratio"], rows)
    print(text)
    (arguments.docs / "gradient_norm_table.md").write_text(text, encoding="utf-8")
    curves = [
        Curve("full DRaFT", arguments.steps, [row[1] for row in rows], colour="base", markers=True),
        Curve("DRTune", arguments.steps, [row[2] for row in rows], colour="tuned", markers=True),
    ]
    save_curve_plot(
        arguments.docs / "images" / "gradient_norm_vs_steps.png", curves, title="Gradient norm of mean symmetry",
        y_label="L2 norm of the LoRA gradient", x_label="sampling steps, all supervised", log=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
