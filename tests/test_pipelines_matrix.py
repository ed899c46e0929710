"""Every method on every family: pictures to the bit, and the gradient of a naive graph, in float64."""

from __future__ import annotations

import functools

import pytest
import torch
from naive_pipeline import naive_loss
from tiny.gradients import flat, generators, gradients, relative, reward, run, with_adapters
from tiny_pipelines import MAIN, PROMPTS, named

from nemo_aligner_diffusion.algorithms.leapalign import Leaps
from nemo_aligner_diffusion.algorithms.registry import methods
from nemo_aligner_diffusion.config.families import sampling_of
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.training.build import build_sampling

STEPS = 4
SETTINGS = {
    "draft_k": {"truncation_steps": 2},
    "draft+": {"truncation_steps": 2},
    "drtune": {"train_steps": 2, "early_stop_steps": 2},
    "alignprop": {"min_truncation_steps": 2, "max_truncation_steps": 3, "distribution": "uniform"},
    "flowbp_sparse": {"train_steps": 2},
    "flowbp_bridge": {"train_steps": 3, "compensation": 0.5},
}
READS_THE_END = {"draft", "draft_k", "draft+", "alignprop", "leapalign", "flowbp_sparse", "flowbp_bridge",
                 "flowbp_lagrange"}  # fmt: skip


def row_model(row, seed=0):
    mine = {name: value for name, value in row.arguments.items() if name not in ("height", "width")}
    return DiffusionModel(row.build(row.dtype, seed), row.train, row.stateless, mine)


@functools.cache
def adapted(name):
    row = named(name)
    return with_adapters(row_model(row), row.lora_targets)


def inputs_of(model, name):
    row = named(name)
    return model.inputs(PROMPTS, STEPS, row.guidance[1], 16, 16)


@pytest.mark.parametrize(
    ("name", "family", "given"),
    [
        ("flux", "flux1", {"guidance_scale": 3.5}),  # an input of the network
        ("qwen-image", "qwen_image", {"true_cfg_scale": 4.0, "negative_prompt": [" "]}),  # by a second call
        ("sdxl", "sdxl", {"guidance_scale": 5.0}),
    ],
)
def test_a_familys_guidance_goes_where_its_pipeline_takes_it(name, family, given):
    inputs = row_model(named(name)).inputs(["a"], **vars(build_sampling(sampling_of(family))))
    assert {key: value for key, value in inputs.items() if "cfg" in key or "guid" in key or "neg" in key} == given


@pytest.mark.parametrize("method", [name for name, method in methods().items() if method.kind == "reward"])
@pytest.mark.parametrize("name", [row.name for row in MAIN])
def test_gradient_of_every_method_is_that_of_the_naive_graph(name, method):
    model = adapted(name)
    kl_coeff = 0.5 if method in ("draft+", "draft_lv") else 0.0
    rule = methods()[method](**SETTINGS.get(method, {})).plan
    result, seen = run(model, rule, inputs_of(model, name), seed=3, reference=kl_coeff > 0, kl_space="prediction")
    got = flat(model, result.surrogate(kl_coeff))
    loss, pictures = naive_loss(model, result.plan, lambda: inputs_of(model, name), kl_coeff)
    expected = flat(model, loss)
    assert expected.norm() > 0
    assert (seen.pictures() - pictures.detach()).abs().max() < 1e-6
    # Z-Image hands its scheduler float32: a leap, written in other words, rounds otherwise
    assert relative(got, expected) < (1e-6 if name == "z-image" and isinstance(result.plan, Leaps) else 1e-9)
    if method in READS_THE_END:
        plain = model.pipe(**inputs_of(model, name), generator=generators(), output_type="pt").images
        assert torch.equal(seen.pictures(), plain)


@pytest.mark.parametrize("name", [row.name for row in MAIN])
def test_finite_differences_and_no_parameter_without_gradient(name):
    """What a naive graph cannot show: parts of a network that run without gradient, in it and in ours alike."""
    row = named(name)
    model = row_model(row)
    model.denoiser.requires_grad_(True)
    result, _ = run(model, methods()["draft"]().plan, inputs_of(model, name))
    found = gradients(model, result.surrogate())
    without = [n for n, g in found.items() if g is None or not g.any()]
    assert without == [n for n in found if n.startswith(row.unused)]
    names = [n for n in found if n not in without]
    parameters = [dict(model.trainable_parameters())[n] for n in names]
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]

    @torch.no_grad()
    def loss_at(scale):
        for p, d in zip(parameters, direction, strict=True):
            p.add_(d, alpha=scale)
        pictures = model.pipe(**inputs_of(model, name), generator=generators(), output_type="pt").images
        for p, d in zip(parameters, direction, strict=True):
            p.sub_(d, alpha=scale)
        return -float(reward(pictures).mean())

    step = 1e-3
    wide, narrow = ((loss_at(h) - loss_at(-h)) / (2 * h) for h in (step, step / 2))
    analytic = sum(float((found[n] * d).sum()) for n, d in zip(names, direction, strict=True))
    assert analytic == pytest.approx((4 * narrow - wide) / 3, rel=1e-4)  # schedulers compute in float32


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_video_that_is_decoded_by_parts_has_the_whole_gradient(chunk):
    """AnimateDiff and Latte call ``decode`` for some frames of the batch at a time."""
    row = named("animatediff")
    model = DiffusionModel(row.build(row.dtype), row.train, arguments={"num_frames": 2, "decode_chunk_size": chunk})
    with_adapters(model, row.lora_targets)
    found = {}
    for kept, rows in ((0, None), (None, None), (0, 1)):
        result, seen = run(
            model, methods()["draft_k"](truncation_steps=2).plan, inputs_of(model, "animatediff"),
            kept_steps=kept, decode_rows=rows,
        )  # fmt: skip
        found[kept, rows] = flat(model, result.surrogate())
        assert seen.pictures().shape == (2, 2, 3, 16, 16)
    loss, _ = naive_loss(model, result.plan, lambda: inputs_of(model, "animatediff"))
    expected = flat(model, loss)
    for got in found.values():
        assert relative(got, expected) < 1e-9
