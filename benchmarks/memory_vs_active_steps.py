"""Peak denoiser activation memory of a training step against the number of active steps (design notes, oracle 4).

Sums the allocator's own events over one forward and backward pass, which is exact and the same on every machine
(resident memory is neither). The reward is trivial here, so that the denoiser alone sets the peak; the frozen weights
existed before and do not count.

    python benchmarks/memory_vs_active_steps.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.diffusion.lora import add_lora
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.noise import sample_generator
from nemo_aligner_diffusion.diffusion.plan import Plan
from nemo_aligner_diffusion.diffusion.trajectory import rollout
from nemo_aligner_diffusion.embedded_assets import embedded_model_path


def peak_allocated_bytes(work: Callable[[], object]) -> int:
    """The most bytes that tensors made by ``work`` held at one time on the CPU.

    Only what this thread makes counts, until whoever holds it last lets it go: gloo copies what it sends in threads of
    its own, at moments of their own, and those threads free some of what they were given.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, record_function("work"):
        work()
    events, todo = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while todo:
        events.append(event := todo.pop())
        todo += event.children
    thread = next(event.start_tid for event in events if event.name == "work")
    held: dict[int, int] = {}
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_time_ns):
        if event.tag != _EventType.Allocation:
            continue
        address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        if size < 0:
            now -= held.pop(address, 0)
        elif event.start_tid == thread:
            held[address] = size
            now += size
            peak = max(peak, now)
    return peak


def step_peak_bytes(model: DiffusionModel, active: int, steps: int, cut: bool, recompute: bool) -> int:
    """Peak of one training step of two pictures whose last ``active`` of ``steps`` steps are supervised."""
    prompts = ["red apple", "dog"]
    plan = Plan(active=tuple(range(steps - active, steps)), cut=cut)

    def step() -> None:
        result = rollout(
            model,
            lambda path, rng: plan,
            [sample_generator(0, 0, i) for i in range(len(prompts))],
            model.inputs(prompts, steps, 4.0),
            lambda pictures, rows, read: pictures.square().mean((1, 2, 3)),
            kept_steps=0 if recompute else None,
            decode_rows=1,
        )
        result.surrogate().backward()

    for p in model.denoiser.parameters():  # gradients exist before: they are not activations
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    return peak_allocated_bytes(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=25, help="sampling steps (default 25)")
    parser.add_argument("--active", type=int, nargs="+", default=[1, 5, 25], help="active steps (default 1 5 25)")
    arguments = parser.parse_args()
    model = load_model(embedded_model_path())
    add_lora(model.denoiser, rank=8)
    kinds = {"recompute": (False, True), "recompute, cut (DRTune)": (True, True), "naive graph": (False, False)}
    print(f"peak allocated in a step of 2 pictures, {arguments.steps} sampling steps: MB (ratio to the first row)")
    print(" ".join([f"{'active steps':>12}", *(f"{kind:>24}" for kind in kinds)]))
    first: dict[str, int] = {}
    for active in arguments.active:
        cells = []
        for kind, (cut, recompute) in kinds.items():
            peak = step_peak_bytes(model, active, arguments.steps, cut, recompute)
            first.setdefault(kind, peak)
            cells.append(f"{peak / 1e6:.1f} ({peak / first[kind]:.2f})")
        print(" ".join([f"{active:>12}", *(f"{cell:>24}" for cell in cells)]))


if __name__ == "__main__":
    main()
