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
from torch import Tensor

from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.diffusion.lora import add_lora
from nemo_aligner_diffusion.diffusion.noise import sample_generator
from nemo_aligner_diffusion.diffusion.plan import Plan
from nemo_aligner_diffusion.diffusion.trajectory import rollout, sample
from nemo_aligner_diffusion.embedded_assets import embedded_model_path, embedded_reward_path
from nemo_aligner_diffusion.rewards import restore_reward

PROMPTS = ["red apple", "dog", "rocket", "pizza", "cat face", "sunflower", "castle", "bicycle"]


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(call: Callable[[], object]) -> float:
    started = now()
    call()
    return now() - started


class Phases:
    """Seconds of each phase, one entry a step; a phase ends where the next one begins."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._running: tuple[str, float] | None = None

    def enter(self, name: str | None) -> None:
        moment = now()
        if self._running is not None:
            phase, began = self._running
            self.seconds.setdefault(phase, []).append(moment - began)
        self._running = None if name is None else (name, moment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--active", type=int, default=1, help="active steps, from the last (default 1)")
    arguments = parser.parse_args()

    model = load_model(embedded_model_path())
    model.pipe.set_progress_bar_config(disable=True)
    reward = restore_reward(embedded_reward_path())
    inputs = model.inputs(PROMPTS, arguments.steps, arguments.guidance)

    def generators() -> list[torch.Generator]:
        return [sample_generator(seed, 0, 0) for seed in range(len(PROMPTS))]

    def theirs() -> Tensor:
        return model.pipe(**inputs, generator=generators(), output_type="pt").images

    def ours() -> Tensor:
        return sample(model, generators(), inputs)

    same = "the same pictures" if torch.equal(theirs(), ours()) else "OTHER PICTURES"
    pairs = [(seconds(theirs), seconds(ours)) for _ in range(arguments.repeats)]
    ratio = statistics.median(ours_s / theirs_s for theirs_s, ours_s in pairs)
    print(f"pictures without gradient: {ratio:.3f} x the time of the plain pipeline call "
          f"(median of {arguments.repeats}, {same})")  # fmt: skip

    add_lora(model.denoiser, 8, target_modules=model.lora_targets)
    parameters = [parameter for _, parameter in model.trainable_parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    plan = Plan(active=tuple(range(arguments.steps - arguments.active, arguments.steps)))
    phases = Phases()
    model.networks["vae"].decoder.register_forward_pre_hook(lambda *_: phases.enter("decode"))

    def objective(images: Tensor, rows: slice, read: int) -> Tensor:
        phases.enter("reward")
        loss = -reward(images, PROMPTS[rows])
        phases.enter("reward + decode backward")
        return loss

    for _ in range(arguments.repeats):
        phases.enter("rollout")
        result = rollout(model, lambda path, rng: plan, generators(), inputs, objective)
        phases.enter("replay (recompute + backward)")
        result.surrogate().backward()
        phases.enter("optimizer")
        optimizer.step()
        optimizer.zero_grad()
        phases.enter(None)
    total = sum(statistics.median(times) for times in phases.seconds.values())
    print(
        f"training step of {len(PROMPTS)} pictures, {arguments.steps} steps, {arguments.active} active: {total:.2f} s"
    )
    for phase, times in phases.seconds.items():
        median = statistics.median(times)
        print(f"  {phase:<30} {median:7.3f} s  {100 * median / total:5.1f} %")


if __name__ == "__main__":
    main()
