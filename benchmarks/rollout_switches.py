"""What ``model.rollout_precision``, ``model.kept_steps`` and approximations of the rollout save of a training step, and
what they change.

Each round takes a step with every switch in turn; ratios are to the first row's step of the same round. The gradient is
compared with that of the first row, of the same pictures: of the squares of their pixels, and of approximations of the
embedded reward, with the latents that are decoded. ``/tmp/small_dit`` is what :mod:`benchmarks.small_dit` writes.

    OMP_NUM_THREADS=1 python -m benchmarks.rollout_switches --active 1 5 --repeats 5
    OMP_NUM_THREADS=1 python -m benchmarks.rollout_switches --model quarter --active 1 --repeats 3
    OMP_NUM_THREADS=1 python -m benchmarks.rollout_switches --approximations --guidance 2 --repeats 3
    OMP_NUM_THREADS=1 python -m benchmarks.rollout_switches --model /tmp/small_dit --approximations --repeats 3
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.small_dit import small_dit
from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.diffusion.lora import add_lora
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.network.guidance_interval import GuidanceInterval, guidance_interval
from nemo_aligner_diffusion.diffusion.network.rollout_network import cache_config, rollout_network_of
from nemo_aligner_diffusion.diffusion.noise import sample_generator
from nemo_aligner_diffusion.diffusion.plan import Plan
from nemo_aligner_diffusion.diffusion.trajectory import rollout
from nemo_aligner_diffusion.embedded_assets import embedded_reward_path
from nemo_aligner_diffusion.rewards import restore_reward

PROMPTS = ["red apple", "dog", "rocket", "pizza", "cat face", "sunflower", "castle", "bicycle"]


@dataclass(frozen=True)
class Switch:
    """A row; ``cache``: kind, threshold, interval; ``noise``: other pictures, for what cosines between these are."""

    name: str
    precision: str | None = None
    kept: int = 0
    cache: tuple[str | None, float, int] = (None, 0.0, 1)
    interval: tuple[float, float] | None = None
    noise: int = 0


SWITCHES = (
    Switch("null"), Switch("null, kept", kept=99), Switch("same", "same"), Switch("bf16", "bf16"),
    Switch("bf16, kept", "bf16", 99),
)  # fmt: skip
SAME = Switch("same", "same")
OTHER = Switch("same, other noise", "same", noise=1000)
BOUNDS = ((0.0, 1.0), (0.2, 1.0), (0.2, 0.8), (0.4, 0.8), (0.0, 0.5), (0.0, 0.0))
INTERVALS = (SAME, *(Switch(f"interval {bounds}", "same", interval=bounds) for bounds in BOUNDS), OTHER)
CACHES = (
    SAME,
    *(Switch(f"first_block {x}", "same", cache=("first_block", x, 1)) for x in (0.0, 0.02, 0.05, 0.1, 0.2)),
    *(Switch(f"taylorseer {n}", "same", cache=("taylorseer", 0.0, n)) for n in (1, 2, 3, 4)),
    OTHER,
)


def model_named(name: str) -> DiffusionModel:
    """``embedded``, or with a UNet of SD 1.5's blocks, a quarter as wide, of random weights; else a small DiT's."""
    model = load_model() if name in ("embedded", "quarter") else small_dit(name)
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


def step(
    model: DiffusionModel, inputs: Any, plan: Plan, switch: Switch, loss: Callable[[Tensor, slice, int], Tensor]
) -> tuple[float, float, Tensor, Tensor]:
    """Seconds of the rollout and of all; the gradient; the latents that are decoded."""
    generators = [sample_generator(switch.noise + j, 0, 0) for j in range(len(inputs["prompt"]))]
    for _, parameter in model.trainable_parameters():
        parameter.grad = None
    began = time.perf_counter()
    if model.rollout_network is not None:
        model.rollout_network.refresh()
    result = rollout(model, lambda path, rng: plan, generators, inputs, loss, kept_steps=switch.kept)
    rolled = time.perf_counter()
    result.surrogate().backward()
    ended = time.perf_counter()
    gradient = torch.cat([p.grad.flatten() for _, p in model.trainable_parameters() if p.grad is not None])
    return rolled - began, ended - began, gradient.double(), result.ends[0].detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded", help="embedded, quarter, or the folder of a small DiT")
    parser.add_argument("--approximations", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--active", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    model = model_named(given.model)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(given.batch)]
    inputs = model.inputs(prompts, given.steps, given.guidance, *((64, 64) if given.approximations else ()))
    switches = SWITCHES
    reward = None
    if given.approximations:
        reward = restore_reward(embedded_reward_path())
        switches = CACHES if hasattr(model.denoiser, "enable_cache") else INTERVALS

    def loss(x: Tensor, part: slice, read: int) -> Tensor:
        return x.square().flatten(1).mean(1) if reward is None else -reward.scores(x, prompts[part])[0]

    intervals: dict[Any, GuidanceInterval | None] = {
        bounds: bounds and guidance_interval(model, bounds, lambda them: {**inputs, "prompt": them})
        for bounds in {switch.interval for switch in switches}
    }
    for active in given.active:
        plan = Plan(active=tuple(range(given.steps - active, given.steps)))
        found: dict[Switch, list[tuple[float, float, Tensor, Tensor]]] = {switch: [] for switch in switches}
        for _ in range(given.repeats + 1):  # the first warms up
            for switch, mine in found.items():
                cache, model.guidance_interval = cache_config(*switch.cache), intervals[switch.interval]
                model.rollout_network = rollout_network_of(model.denoiser, switch.precision, True, True, cache=cache)
                mine.append(step(model, inputs, plan, switch, loss))
        first = found[switches[0]][1:]
        print(f"{given.model}, {given.steps} steps, {active} with gradient, {given.batch} pictures: "
              f"{statistics.median(x[1] for x in first):.2f} s a step")  # fmt: skip
        print(f"{'':<20}  {'rollout':<17}  {'step':<17}  cosine of the gradient  latents differ by")
        for switch, mine in found.items():
            ratios = [[x[i] / y[i] for x, y in zip(mine[1:], first, strict=True)] for i in (0, 1)]
            shown = [f"{statistics.median(r):.2f} ({min(r):.2f}-{max(r):.2f})" for r in ratios]
            (_, _, gradient, ends), (_, _, exact, reached) = mine[-1], first[-1]
            cosine = float(torch.nn.functional.cosine_similarity(gradient, exact, 0))
            far = float((ends - reached).norm() / reached.norm())
            print(f"{switch.name:<20}  {shown[0]:<17}  {shown[1]:<17}  {cosine:<22.7f}  {far:.4f}")


if __name__ == "__main__":
    main()
