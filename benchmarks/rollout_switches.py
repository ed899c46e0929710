"""What ``model.rollout_precision`` and ``model.kept_steps`` save of a training step, and what they change.

Each round takes a step with every switch in turn; ratios are to the first row's step of the same round. The gradient is
compared with that of the first row, of the same pictures.

    OMP_NUM_THREADS=1 python -m benchmarks.rollout_switches --active 1 5 --repeats 5
    OMP_NUM_THREADS=1 python -m benchmarks.rollout_switches --model quarter --active 1 --repeats 3
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.step_time import PROMPTS
from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.diffusion.lora import add_lora
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.network.rollout_network import rollout_network_of
from nemo_aligner_diffusion.diffusion.noise import sample_generator
from nemo_aligner_diffusion.diffusion.plan import Plan
from nemo_aligner_diffusion.diffusion.trajectory import rollout

SWITCHES: tuple[tuple[str | None, int], ...] = ((None, 0), (None, 99), ("same", 0), ("bf16", 0), ("bf16", 99))


def model_named(name: str) -> DiffusionModel:
    """``embedded``, or with a UNet of SD 1.5's blocks, a quarter as wide, of random weights."""
    model = load_model()
    if name == "quarter":
        from diffusers import UNet2DConditionModel

        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=32, block_out_channels=(80, 160, 320, 320), norm_num_groups=16, attention_head_dim=8,
            cross_attention_dim=model.denoiser.config.cross_attention_dim,
        )  # fmt: skip
        model.pipe.register_modules(unet=unet)
        model = DiffusionModel(model.pipe)
    add_lora(model.denoiser, 8, target_modules=model.lora_targets)
    for name, parameter in model.trainable_parameters():
        if "lora_B" in name:  # as after some steps: a fresh adapter has no effect
            torch.nn.init.normal_(parameter, std=0.005)
    model.denoiser.train()
    return model


def step(model: DiffusionModel, inputs: Any, plan: Plan, kept: int, rows: int) -> tuple[float, float, Tensor]:
    """Seconds of the rollout and of all; the gradient."""
    generators = [sample_generator(seed, 0, 0) for seed in range(rows)]
    for _, parameter in model.trainable_parameters():
        parameter.grad = None
    began = time.perf_counter()
    if model.rollout_network is not None:
        model.rollout_network.refresh()
    result = rollout(
        model, lambda path, rng: plan, generators, inputs, lambda x, part, read: x.square().flatten(1).mean(1),
        kept_steps=kept,
    )  # fmt: skip
    rolled = time.perf_counter()
    result.surrogate().backward()
    ended = time.perf_counter()
    return rolled - began, ended - began, torch.cat([p.grad.flatten() for _, p in model.trainable_parameters()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("embedded", "quarter"), default="embedded")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--active", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    model = model_named(given.model)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(given.batch)]
    inputs = model.inputs(prompts, given.steps, 4.0)
    for active in given.active:
        plan = Plan(active=tuple(range(given.steps - active, given.steps)))
        found: dict[tuple[str | None, int], list[tuple[float, float, Tensor]]] = {switch: [] for switch in SWITCHES}
        for _ in range(given.repeats + 1):  # the first warms up
            for precision, kept in SWITCHES:
                model.rollout_network = rollout_network_of(model.denoiser, precision, True, True)
                found[precision, kept].append(step(model, inputs, plan, kept, given.batch))
        first = found[SWITCHES[0]][1:]
        print(f"{given.model}, {given.steps} steps, {active} with gradient, {given.batch} pictures: "
              f"{statistics.median(x[1] for x in first):.2f} s a step")  # fmt: skip
        print("rollout_precision  kept   rollout            step               cosine of the gradient")
        for (precision, kept), mine in found.items():
            ratios = [[x[i] / y[i] for x, y in zip(mine[1:], first, strict=True)] for i in (0, 1)]
            shown = [f"{statistics.median(r):.2f} ({min(r):.2f}-{max(r):.2f})" for r in ratios]
            cosine = float(torch.nn.functional.cosine_similarity(mine[-1][2].double(), first[-1][2].double(), 0))
            print(f"{precision!s:<17}  {min(kept, active):<5}  {shown[0]:<17}  {shown[1]:<17}  {cosine:.7f}")


if __name__ == "__main__":
    main()
