"""What the tests of gradients share: a reward, a rollout's gradient, and weights that no adapter leaves at zero."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_aligner_diffusion.diffusion.lora import add_lora
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.plan import Plan
from nemo_aligner_diffusion.diffusion.trajectory import Rollout, rollout


def generators(batch: int = 2, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 * seed + i) for i in range(batch)]


def reward(images: Tensor) -> Tensor:
    """Smooth, not symmetric in anything: one number for each picture (or video)."""
    weights = torch.linspace(-1, 1, images[0].numel(), dtype=images.dtype).reshape(images.shape[1:])
    return (images * weights).flatten(1).mean(1) + 3 * (images**2).flatten(1).mean(1)


def with_adapters(model: DiffusionModel, targets: Sequence[str], seed: int = 5) -> DiffusionModel:
    """LoRA whose B is not zero."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        add_lora(model.denoiser, rank=2, target_modules=tuple(targets))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.denoiser.named_parameters():
        if "lora_B" in name:
            with torch.no_grad():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def gradients(model: DiffusionModel, loss: Tensor) -> dict[str, Tensor | None]:
    """By parameter; ``None``: no graph reached it."""
    for _, parameter in model.trainable_parameters():
        parameter.grad = None
    loss.backward()
    return {name: parameter.grad for name, parameter in model.trainable_parameters()}


def flat(model: DiffusionModel, loss: Tensor) -> Tensor:
    found = gradients(model, loss)
    parameters = dict(model.trainable_parameters())
    return torch.cat([(torch.zeros_like(parameters[n]) if g is None else g).flatten() for n, g in found.items()])


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


class Seen:
    """An objective that keeps the pictures it has scored, by read."""

    def __init__(self, score: Callable[[Tensor], Tensor] = reward) -> None:
        self.score = score
        self.rows: dict[int, list[Tensor]] = {}

    def __call__(self, images: Tensor, rows: slice, read: int) -> Tensor:
        self.rows.setdefault(read, []).append(images.detach())
        return -self.score(images)

    def pictures(self, read: int = 0) -> Tensor:
        return torch.cat(self.rows[read])


def run(
    model: DiffusionModel, plan: Plan | Callable[..., Plan], inputs: dict[str, Any], seed: int = 0, **options: Any
) -> tuple[Rollout, Seen]:
    seen = Seen()
    rule = (lambda path, rng: plan) if isinstance(plan, Plan) else plan
    batch = options.pop("batch", 2)
    return rollout(model, rule, generators(batch), inputs, seen, rng=random.Random(seed), **options), seen
