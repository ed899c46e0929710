"""Gradient norm of full DRaFT and of DRTune against the number of sampling steps (design notes, oracle 5).

python -m benchmarks.gradient_norm_vs_steps --docs docs
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch

from benchmarks.judge import table
from nemo_aligner_diffusion.algorithms.base import Method
from nemo_aligner_diffusion.algorithms.draft import DRaFT
from nemo_aligner_diffusion.algorithms.drtune import DRTune
from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.diffusion.lora import add_lora
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.noise import sample_generator
from nemo_aligner_diffusion.diffusion.trajectory import rollout
from nemo_aligner_diffusion.embedded_assets import embedded_model_path
from nemo_aligner_diffusion.evaluation.curves import Curve, curve_plot
from nemo_aligner_diffusion.rewards.rules import Symmetry
from nemo_aligner_diffusion.runtime.files import write_atomic


def gradient_norm(model: DiffusionModel, steps: int, method: Method, guidance_scale: float) -> float:
    """Norm of the LoRA gradient of the mean symmetry of four pictures."""
    prompts = ["dog", "red apple", "rocket", "castle"]
    reward = Symmetry().build()
    result = rollout(
        model,
        method.plan,
        [sample_generator(0, 0, i) for i in range(len(prompts))],
        model.inputs(prompts, steps, guidance_scale),
        lambda pictures, rows, read: -reward(pictures, prompts[rows]),
        rng=random.Random(0),
    )
    model.denoiser.zero_grad()
    result.surrogate().backward()
    gradients = [parameter.grad for _, parameter in model.trainable_parameters() if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 5, 10, 20, 40])
    parser.add_argument("--guidance", type=float, default=4.0)
    arguments = parser.parse_args()
    model = load_model(embedded_model_path())
    model.set_scheduler("ddim")
    torch.manual_seed(0)
    add_lora(model.denoiser, rank=8)
    rows = []
    for steps in arguments.steps:
        every_step = (DRaFT(), DRTune(train_steps=steps, early_stop_steps=0))
        norms = [gradient_norm(model, steps, method, arguments.guidance) for method in every_step]
        rows.append((steps, *norms, norms[0] / norms[1]))
    text = table(["sampling steps", "full DRaFT", "DRTune, all steps", "ratio"], rows)
    print(text)
    (arguments.docs / "gradient_norm_table.md").write_text(text, encoding="utf-8")
    curves = [
        Curve("full DRaFT", arguments.steps, [row[1] for row in rows], colour="base", markers=True),
        Curve("DRTune", arguments.steps, [row[2] for row in rows], colour="tuned", markers=True),
    ]
    picture, _ = curve_plot(
        curves, title="Gradient norm of mean symmetry", y_label="L2 norm of the LoRA gradient",
        x_label="sampling steps, all supervised", log=True,
    )  # fmt: skip
    write_atomic(arguments.docs / "images" / "gradient_norm_vs_steps.png", picture)


if __name__ == "__main__":
    main()
