"""Peak activation memory of a training step against the number of active steps (oracle 4 of the design notes).

Counts every tensor that autograd saves for a backward pass, while it is alive, for the recomputing trajectory and for the
naive graph. The counter is exact and independent of the machine; peak resident memory would drown in the allocator.

    python benchmarks/memory_vs_active_steps.py
"""

from __future__ import annotations

import argparse
import weakref

import torch

from nemo_aligner_diffusion.diffusion.families.stable_diffusion import StableDiffusion
from nemo_aligner_diffusion.diffusion.guidance import guided_predictor
from nemo_aligner_diffusion.diffusion.lora import add_lora
from nemo_aligner_diffusion.diffusion.noise import gaussian, sample_generator
from nemo_aligner_diffusion.diffusion.sampler import Sampler
from nemo_aligner_diffusion.diffusion.trajectory import Plan, reward_gradient, run_trajectory
from nemo_aligner_diffusion.embedded_assets import embedded_model_path


class SavedTensorBytes:
    """Bytes of distinct storages that autograd holds for backward; parameters and the frozen weights not counted."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        pointer = storage.data_ptr()
        if pointer not in self.weights and pointer not in self.alive:
            size = storage.nbytes()
            self.alive[pointer] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, pointer)
        return tensor

    def _free(self, pointer: int) -> None:
        self.now -= self.alive.pop(pointer, 0)

    def __enter__(self) -> SavedTensorBytes:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)


def peak_bytes(model: StableDiffusion, active: int, steps: int, cut: bool, recompute: bool) -> int:
    """Peak of saved activations in one step of two pictures, forward and backward."""
    sampler = Sampler(model.scheduler_config, "ddim", steps)
    prompts = ["red apple", "dog"]
    predict = guided_predictor(model, model.encode_prompts(prompts), 4.0)
    generators = [sample_generator(0, 0, i) for i in range(len(prompts))]
    plan = Plan(active=tuple(range(steps - active, steps)), cut=cut)
    with SavedTensorBytes(model) as counter:
        shape = model.latent_shape()
        trajectory = run_trajectory(predict, sampler, plan, lambda: gaussian(generators, shape), recompute=recompute)
        gradients = reward_gradient(trajectory.reads, model.decode, lambda images, rows: -images.square().mean())
        (trajectory.reads[0] * gradients[0]).sum().backward()
    model.denoiser.zero_grad()
    return counter.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=25, help="sampling steps (default 25)")
    parser.add_argument("--active", type=int, nargs="+", default=[1, 5, 25], help="active steps (default 1 5 25)")
    arguments = parser.parse_args()
    model = StableDiffusion.from_pretrained(embedded_model_path())
    add_lora(model.denoiser, rank=8)
    print(f"peak of saved activations, {arguments.steps} sampling steps, 2 pictures, MB")
    print(f"{'active steps':>13} {'recompute':>10} {'recompute, cut':>15} {'naive graph':>12}")
    first: dict[tuple[bool, bool], int] = {}
    for active in arguments.active:
        cells = []
        for cut, recompute in ((False, True), (True, True), (False, False)):
            peak = peak_bytes(model, active, arguments.steps, cut, recompute)
            first.setdefault((cut, recompute), peak)
            cells.append(f"{peak / 1e6:.1f} ({peak / first[cut, recompute]:.2f}x)")
        print(f"{active:>13} " + " ".join(f"{cell:>15}" for cell in cells))


if __name__ == "__main__":
    main()
