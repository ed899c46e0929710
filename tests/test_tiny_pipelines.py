"""The tiny pipelines that other tests train: made of their seed, and the same after saving and loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import MAIN, TinyPipeline, double_precision, named
from torch import Tensor, nn


def picture(row: TinyPipeline, pipe: Any) -> Tensor:
    generators = [torch.Generator().manual_seed(100 + i) for i in range(row.batch)]
    inputs = {**row.inputs(), "num_inference_steps": 2, "output_type": "pt"}
    return pipe(generator=generators, **inputs).images


def aligned(pipe: Any) -> Any:
    """Weights in memory of their own: safetensors maps them where the file has them, and sums of products round
    otherwise there (to 1e-14 in float64)."""
    for part in pipe.components.values():
        for parameter in part.parameters() if isinstance(part, nn.Module) else ():
            parameter.data = parameter.data.clone()
    return pipe


@pytest.mark.parametrize("row", MAIN, ids=lambda row: row.name)
def test_the_picture_is_the_seed_s_and_survives_saving(row: TinyPipeline, tmp_path: Path) -> None:
    pipe = row.build()
    first = picture(row, pipe)
    assert first.shape == (row.batch, 3, 16, 16)
    assert ((first > 0) & (first < 1)).double().mean() > 0.99, "pixels at the clamp have no gradient"
    assert not torch.equal(first[0], first[1])
    assert torch.equal(picture(row, row.build()), first)
    assert not torch.equal(picture(row, row.build(seed=1)), first)

    pipe.save_pretrained(tmp_path)
    loaded: Any = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is row.pipeline
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(picture(row, aligned(loaded)), first)


@pytest.mark.parametrize("row", MAIN, ids=lambda row: row.name)
def test_lora_targets_are_linear_layers_of_the_network(row: TinyPipeline) -> None:
    network = getattr(row.build(), row.train)
    for target in row.lora_targets:
        matched = [module for name, module in network.named_modules() if f".{name}".endswith(f".{target}")]
        assert matched, f"{row.name} has no layer named {target}"
        assert all(isinstance(module, nn.Linear) for module in matched), f"{target} of {row.name} is no linear layer"


def slope(row: TinyPipeline, pipe: Any, step: float) -> float:
    """Of the mean pixel along the weights of the network, by a central difference."""
    network = getattr(pipe, row.train)
    means = []
    for scale in (1 + step, (1 - step) / (1 + step)):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(scale)
        means.append(float(picture(row, pipe).double().mean()))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.div_(1 - step)
    return (means[0] - means[1]) / (2 * step)


def test_double_precision_makes_finite_differences_exact() -> None:
    row = named("flux")  # casts to float32 in its scheduler, its norms and its rotary embedding
    pipe = row.build(torch.float64)

    def disagreement() -> float:
        return abs(slope(row, pipe, 1e-5) / slope(row, pipe, 1e-6) - 1)

    assert disagreement() > 1e-4
    with double_precision():
        assert disagreement() < 1e-6
    assert torch.get_default_dtype() == torch.float32
