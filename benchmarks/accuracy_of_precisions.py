"""What each precision rounds: the network's prediction, and the adapters' gradient of a whole step, beside float32's.

    python -m benchmarks.accuracy_of_precisions

The embedded model with adapters as after some steps, its CLIP reward, four prompts, eight steps with guidance
of which the last two have gradient. Float8 products are emulated: rounded as on the hardware.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.judge import table
from benchmarks.rollout_switches import model_named
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.network.eight_bits import keep_in_8_bits, multiply_in_fp8
from nemo_aligner_diffusion.diffusion.network.rollout_network import RolloutNetwork
from nemo_aligner_diffusion.diffusion.noise import sample_generator
from nemo_aligner_diffusion.diffusion.plan import Plan
from nemo_aligner_diffusion.diffusion.settings import Float8Settings
from nemo_aligner_diffusion.diffusion.trajectory import rollout
from nemo_aligner_diffusion.embedded_assets import embedded_reward_path
from nemo_aligner_diffusion.rewards import restore_reward
from nemo_aligner_diffusion.training.build import convert_frozen

PROMPTS = ["dog face", "red apple", "rocket", "castle"]
STEPS, ACTIVE = 8, 2


def fp8(recipe: str) -> Float8Settings:
    return Float8Settings(recipe=recipe, emulate=True)


def products(model: DiffusionModel, recipe: str) -> None:
    multiply_in_fp8(model.denoiser, fp8(recipe), torch.device("cpu"), "here")


def copied(model: DiffusionModel, precision: str) -> None:
    model.rollout_network = RolloutNetwork(model.denoiser, precision, fp8=fp8("rowwise"))
    model.rollout_network.refresh()


def kept(model: DiffusionModel, kind: str) -> None:
    convert_frozen(model, torch.bfloat16)
    keep_in_8_bits([model.denoiser, model.pipe.text_encoder], kind)


def cast_by_layer(model: DiffusionModel) -> None:
    """``diffusers``: without a scale, and with gradient under autocast alone."""
    model.denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


# words → (what is done to the model, whether under autocast to bfloat16)
CASES: dict[str, tuple[Callable[[DiffusionModel], object], bool]] = {
    "trainer.precision=bf16": (lambda model: None, True),
    "trainer.precision=fp8 model.fp8.recipe=rowwise": (lambda model: products(model, "rowwise"), True),
    "trainer.precision=fp8 model.fp8.recipe=tensorwise": (lambda model: products(model, "tensorwise"), True),
    "model.rollout_precision=bf16": (lambda model: copied(model, "bf16"), False),
    "model.rollout_precision=fp8": (lambda model: copied(model, "fp8"), False),
    "model.frozen_precision=bf16": (lambda model: convert_frozen(model, torch.bfloat16), False),
    "model.frozen_precision=int8": (lambda model: kept(model, "int8"), False),
    "model.frozen_precision=fp8": (lambda model: kept(model, "fp8"), False),
    "(diffusers' layerwise casting, under autocast)": (cast_by_layer, True),
}


@contextlib.contextmanager
def autocast(on: bool) -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16) if on else contextlib.nullcontext():
        yield


def measured(
    model: DiffusionModel, reward: Callable[[Tensor, list[str]], Tensor], mixed: bool
) -> tuple[Tensor, Tensor]:
    """``(predictions (4 B, …) at four levels, by what makes the steps without gradient; the adapters' gradient)``."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(len(PROMPTS), 4, 16, 16, generator=generator)
    states = torch.randn(len(PROMPTS), 16, model.denoiser.config.cross_attention_dim, generator=generator)
    network, dtype = model.rollout_network or model.denoiser, model.pipe.text_encoder.dtype  # as the pipeline calls it
    z, states = z.to(dtype), states.to(dtype)
    with torch.no_grad(), autocast(mixed):
        predictions = [network(z, torch.tensor(t), states, return_dict=False)[0].float() for t in (900, 600, 300, 50)]
    for _, parameter in model.trainable_parameters():
        parameter.grad = None
    with autocast(mixed):
        result = rollout(
            model, lambda path, rng: Plan(tuple(range(STEPS - ACTIVE, STEPS))),
            [sample_generator(0, 0, i) for i in range(len(PROMPTS))], model.inputs(PROMPTS, STEPS, 2.0),
            lambda pictures, rows, read: -reward(pictures.float(), PROMPTS[rows]),
        )  # fmt: skip
        result.surrogate().backward()
    return torch.cat(predictions), torch.cat([p.grad.flatten() for _, p in model.trainable_parameters()]).double()


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    reward = restore_reward(embedded_reward_path())
    torch.manual_seed(0)
    state = model_named("embedded").denoiser.state_dict()

    def fresh() -> DiffusionModel:
        model = model_named("embedded")
        model.denoiser.load_state_dict(state)
        return model

    exact = measured(fresh(), reward, False)
    rows = []
    for name, (change, mixed) in CASES.items():
        model = fresh()
        change(model)
        prediction, gradient = measured(model, reward, mixed)
        error = float((prediction - exact[0]).norm() / exact[0].norm())
        cosine = float(torch.nn.functional.cosine_similarity(gradient, exact[1], 0))
        rows.append((name, f"{error:.4f}", f"{cosine:.5f}"))
        print(*rows[-1], flush=True)
    print(table(["", "error of the prediction", "cosine of the gradient"], rows))


if __name__ == "__main__":
    main()
