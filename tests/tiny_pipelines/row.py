"""One row of the table of tiny pipelines, and the weights that all of them have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

PROMPTS = ("a red cube", "two blue balls")


def prompts(batch: int) -> dict[str, Any]:
    return {"prompt": [PROMPTS[i % len(PROMPTS)] for i in range(batch)]}


@dataclass(frozen=True)
class TinyPipeline:
    """A pipeline of real diffusers/transformers classes with tens of thousands of random weights.

    Attributes:
        name: of the row.
        pipeline: the pipeline's class.
        components: builds its components, with any weights, as the class's ``__init__`` takes them.
        train: the denoiser's component name.
        lora_targets: suffixes of the names of the denoiser's linear layers that take LoRA: attention projections and
            feed-forward.
        arguments: of a call, beside conditioning, guidance, generators, number of steps and ``output_type``.
        guidance: name and value of the guidance argument; ``None``: the pipeline has none.
        conditioning: of a batch size: prompts (new lists: Z-Image writes into its own), or what the pipeline takes
            beside them or in their place.
        options: values that are no component, of the class's ``__init__``.
        attributes: of the pipeline, set when it is built: sizes that its code fixes at a megapixel.
        stateless: class names of objects given to the denoiser that carry nothing from call to call.
        video: the output is ``(B, frames, 3, H, W)``.
        pixels: the range of ``output_type="pt"``: diffusers rescales and clamps to [0, 1], but for a few.
        batch: samples that one call can make.
        dtype: float64 where the pipeline allows it; a note says why not.
        steps: a usual ``num_inference_steps`` for a test.
        needs: a package that its prompts need and the tests' environment may not have.
        unused: trained parameters whose values cannot change the picture; a note says why.
        notes: what is special.
    """

    name: str
    pipeline: type[Any]  # of DiffusionPipeline: mypy does not see through its lazy import
    components: Callable[[], dict[str, Any]]
    train: str
    lora_targets: tuple[str, ...]
    arguments: Mapping[str, Any]
    guidance: tuple[str, float] | None
    conditioning: Callable[[int], dict[str, Any]] = prompts
    options: Mapping[str, Any] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    stateless: tuple[str, ...] = ()
    video: bool = False
    pixels: tuple[float, float] = (0.0, 1.0)
    batch: int = 2
    dtype: torch.dtype = torch.float64
    steps: int = 3
    needs: str | None = None
    unused: tuple[str, ...] = ()
    notes: str = ""

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
        """The pipeline; its weights are a function of ``seed``, whatever the dtype."""
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            components = self.components()
        modules = {name: part for name, part in components.items() if isinstance(part, nn.Module)}
        for index, (name, module) in enumerate(modules.items()):
            # A denoiser below 1/√fan_in is smooth enough for finite differences through all steps.
            randomise(module, 1000 * seed + index, gain=0.6 if name == self.train else 1.0)
            module.to(dtype).eval()
        pipe = self.pipeline(**components, **self.options)
        for name, value in self.attributes.items():
            setattr(pipe, name, value)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def inputs(self, batch: int | None = None) -> dict[str, Any]:
        """Arguments of a call but generators, number of steps and ``output_type``."""
        guidance = {} if self.guidance is None else dict([self.guidance])
        return {**self.conditioning(batch or self.batch), **self.arguments, **guidance}


def randomise(module: nn.Module, seed: int, gain: float = 1.0) -> None:
    """Random values for every parameter: none stays zero (adaLN-zero, zero convolutions) or uninitialised."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = name.rpartition(".")[2]
            if scale == "gamma" or (scale == "weight" and parameter.ndim < 2):  # of a norm
                parameter.copy_(1 + 0.1 * noise)
            elif parameter.ndim < 2:
                parameter.copy_(0.1 * noise)
            else:
                # less at a decoder's end keeps pixels off the clamp at 0 and 1, where they have no gradient
                share = 0.3 if "conv_out" in name else 0.1 if "decoder.proj_out" in name else gain
                parameter.copy_(share * noise / max(1, parameter[0].numel()) ** 0.5)
