"""Every further tiny pipeline takes a DRTune step: its gradient is the naive graph's, its picture the plain call's."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest
import torch
from generated import renewed
from models_page import table
from tiny_pipelines import MAIN, ROWS, TinyPipeline, double_precision

from nemo_aligner_diffusion.algorithms import DRaFT, DRTune
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.plan import PlanRule
from nemo_aligner_diffusion.diffusion.trajectory import rollout, sample
from nemo_aligner_diffusion.errors import ConfigurationError

ROUGH = {"z-image-img2img", "wan"}  # one asserts float32, UniPC solves in it
FURTHER = [row for row in ROWS if row not in MAIN]
DRTUNE = DRTune(train_steps=1, early_stop_steps=1).plan
NO_PROMPT = {"kandinsky-2.2", "dit"}  # refused as text-to-image pipelines


def reward(pictures):
    """One number a picture or video; a video's is of its frames."""
    x = pictures.double()
    weights = torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype).reshape(x.shape[1:])
    return -(x * weights + x**2).flatten(1).mean(1)


def available(row: TinyPipeline) -> None:
    if row.needs is not None:
        pytest.importorskip(row.needs)


def gradient(row: TinyPipeline, model: DiffusionModel, kept_steps: int | None, rule: PlanRule = DRTUNE) -> torch.Tensor:
    for _, parameter in model.trainable_parameters():
        parameter.grad = None
    result = rollout(
        model,
        rule,
        generators(row),
        inputs(row, model),
        lambda pictures, rows, read: reward(pictures),
        rng=random.Random(0),
        kept_steps=kept_steps,
    )
    result.surrogate().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in model.trainable_parameters()]
    return torch.cat([g.double().flatten() for g in gradients])


def generators(row: TinyPipeline) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(row.batch)]


def inputs(row: TinyPipeline, model: DiffusionModel) -> dict:
    return {**model.arguments, **row.inputs(), "num_inference_steps": row.steps}


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in FURTHER if row.name not in NO_PROMPT], ids=lambda row: row.name)
def test_a_drtune_step(row):
    available(row)
    pipe = row.build(row.dtype)
    model = DiffusionModel(pipe, trained=row.train, stateless=row.stateless)
    given = inputs(row, model)
    plain = pipe(**inputs(row, model), generator=generators(row), output_type="pt", return_dict=False)[0]
    plain = torch.stack(list(plain)) if isinstance(plain, list) else plain
    if model.family.signed:
        plain = (plain / 2 + 0.5).clamp(0, 1)
    assert torch.equal(sample(model, generators(row), given), plain)
    assert row.video == (plain.ndim == 5)
    model.denoiser.requires_grad_(True)
    got = gradient(row, model, kept_steps=0)
    assert got.norm() > 0
    expected = gradient(row, model, kept_steps=None)
    assert float((got - expected).norm() / expected.norm()) < (1e-9 if row.dtype == torch.float64 else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in FURTHER if row.name not in NO_PROMPT], ids=lambda row: row.name)
def test_finite_differences_and_no_parameter_without_gradient(row):
    """Parts of a network that run without gradient inside it (HiDream's experts) show in no comparison of graphs."""
    available(row)
    rough = row.name in ROUGH
    with contextlib.nullcontext() if rough else double_precision():
        model = DiffusionModel(row.build(row.dtype if rough else torch.float64), row.train, row.stateless)
        model.denoiser.requires_grad_(True)
        gradient(row, model, kept_steps=None, rule=DRaFT().plan)
        found = dict(model.trainable_parameters())
        without = [name for name, p in found.items() if p.grad is None or not p.grad.any()]
        assert without == [name for name in found if name.startswith(row.unused)]
        generator = torch.Generator().manual_seed(0)
        direction = {n: torch.randn(p.shape, generator=generator).to(p) for n, p in found.items() if n not in without}

        @torch.no_grad()
        def loss_at(scale):
            for name, d in direction.items():
                found[name].add_(d, alpha=scale)
            pictures = sample(model, generators(row), inputs(row, model))
            for name, d in direction.items():
                found[name].sub_(d, alpha=scale)
            return float(reward(pictures).mean())

        # Rectifiers and clamps are smooth only nearby; where float32 stays, its rounding needs a wide step.
        step, tolerance = (1e-3, 1e-2) if rough else (1e-8, 2e-5)
        wide, narrow = ((loss_at(h) - loss_at(-h)) / (2 * h) for h in (step, step / 2))
        analytic = sum(float((found[n].grad * d).sum()) for n, d in direction.items())
    assert analytic == pytest.approx((4 * narrow - wide) / 3 if rough else wide, rel=tolerance)


def test_experts_have_gradient_and_a_network_in_training_mode_makes_the_same_picture():
    """HiDream's run without gradient in evaluation mode; in training mode its transformer gives patches, no latents."""
    row = next(row for row in FURTHER if row.name == "hidream")
    model = DiffusionModel(row.build(row.dtype))
    before = sample(model, generators(row), inputs(row, model))
    for training in (False, True):
        model.denoiser.requires_grad_(True).train(training)
        assert torch.equal(sample(model, generators(row), inputs(row, model)), before)
        gradient(row, model, kept_steps=0)
        experts = [p for name, p in model.trainable_parameters() if ".experts." in name]
        assert all(p.grad is not None for p in experts)
        assert all(module.training == training for module in model.denoiser.modules())


@pytest.mark.slow
def test_all_of_the_table_but_two_train_and_two_or_more_are_videos():
    trained = [row for row in FURTHER if row.name not in NO_PROMPT]
    assert len({row.pipeline for row in trained}) >= 25
    assert sum(row.video for row in trained) >= 2


@pytest.mark.parametrize("name", sorted(NO_PROMPT))
def test_what_takes_no_prompt_is_refused_by_name(name):
    row = next(row for row in FURTHER if row.name == name)
    with pytest.raises(
        ConfigurationError, match=rf"{row.pipeline.__name__} makes no pictures from prompts.*no `prompt`"
    ):
        DiffusionModel(row.build())


def test_the_page_of_models_shows_the_table():
    page = (Path(__file__).parents[1] / "docs/models.md").read_text("utf-8")
    assert page == renewed(page, table()), "python tests/models_page.py docs/models.md"
