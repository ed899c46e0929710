"""Gradients in half precision beside float32's, and what scaling the objective saves in float16.

    python -m benchmarks.precision_of_gradients

For each precision: the cosine of the reward's gradient with respect to the decoded latents, then of the adapters'
gradient (the loss scaled by 2^16 for its backward pass and back, as ``torch.amp.GradScaler`` does), once with the
objective as it is and once times 256. The second reward is a ten-thousandth of the first.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.judge import table
from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.diffusion.lora import add_lora
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.noise import sample_generator
from nemo_aligner_diffusion.diffusion.plan import Plan
from nemo_aligner_diffusion.diffusion.trajectory import rollout
from nemo_aligner_diffusion.embedded_assets import embedded_model_path

LOSS_SCALE = 2.0**16
PRECISIONS = {
    "float16 weights": (torch.float16, None),
    "bf16 weights": (torch.bfloat16, None),
    "float16 autocast": (torch.float32, torch.float16),
    "bf16 autocast": (torch.float32, torch.bfloat16),
}


@contextlib.contextmanager
def precision(autocast: torch.dtype | None) -> Iterator[None]:
    with contextlib.nullcontext() if autocast is None else torch.autocast("cpu", autocast):
        yield


def squares(pictures: Tensor) -> Tensor:
    """A benign reward: every pixel's gradient is about the reciprocal of their number."""
    return (pictures - 0.3).square().mean((1, 2, 3))


def tiny(pictures: Tensor) -> Tensor:
    """The same in the dtype of the pictures, ten thousand times smaller."""
    return 1e-4 * squares(pictures)


def gradients(
    model: DiffusionModel,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    reward: Callable[[Tensor], Tensor],
    scale: float,
    steps: int = 4,
    active: int = 2,
) -> tuple[Tensor, Tensor]:
    """``(with respect to the latents, to the adapters)``, of DRaFT-K on four prompts."""
    model = copy.deepcopy(model).to(dtype)
    model.pipe = copy.copy(model.pipe)
    model.pipe.register_modules(**model.networks)
    prompts = ["dog", "red apple", "rocket", "castle"]
    with precision(autocast):
        result = rollout(
            model,
            lambda path, rng: Plan(tuple(range(steps - active, steps))),
            [sample_generator(0, 0, i) for i in range(len(prompts))],
            model.inputs(prompts, steps, 4.0),
            lambda pictures, rows, read: -reward(pictures),
            gradient_scale=scale,
        )
        (LOSS_SCALE * result.surrogate()).backward()
    found = [p.grad for _, p in model.trainable_parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten().double() for gradient in found]) / LOSS_SCALE
    return result.gradients[0].flatten().double(), flat


def cosine(a: Tensor, b: Tensor) -> float:
    """0 where one of them is zero, or not finite."""
    return float((a @ b / (a.norm() * b.norm())).nan_to_num())  # torch's own takes norms under 1e-8 for that


def rows_of(model: DiffusionModel) -> list[tuple[object, ...]]:
    """``(precision, reward, cosine of latents, of adapters, the same two with the objective times 256)``."""
    rows: list[tuple[object, ...]] = []
    for reward in (squares, tiny):
        expected = gradients(model, torch.float32, None, reward, 1.0)
        for name, (dtype, autocast) in PRECISIONS.items():
            figures = []
            for scale in (1.0, 256.0):
                found = gradients(model, dtype, autocast, reward, scale)
                figures += [cosine(a, b) for a, b in zip(found, expected, strict=True)]
            rows.append((name, reward.__name__, *figures))
    return rows


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    model = load_model(embedded_model_path())
    torch.manual_seed(0)
    add_lora(model.denoiser, rank=8)
    columns = ["precision", "reward", "latents", "adapters", "latents, × 256", "adapters, × 256"]
    print(table(columns, rows_of(model)))


if __name__ == "__main__":
    main()
