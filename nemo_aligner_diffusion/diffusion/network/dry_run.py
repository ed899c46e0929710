"""What a pipeline's own loop hands to its network and its scheduler: a few steps of it, watched."""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from nemo_aligner_diffusion.diffusion.loop import Loop
from nemo_aligner_diffusion.diffusion.network.latents import from_vae
from nemo_aligner_diffusion.diffusion.schedule import untapped
from nemo_aligner_diffusion.diffusion.taps import refuse_state
from nemo_aligner_diffusion.errors import ConfigurationError

if TYPE_CHECKING:
    from nemo_aligner_diffusion.diffusion.model import DiffusionModel

STEPS = 3  # the fewest that tell an affine map from another
PROMPTS = ("a red apple on a table", "two birds")
Arguments = dict[str, Any]  # of a network's call, by name


class Stop(BaseException):
    """Ends a pipeline's call from within; no pipeline catches it."""

    def __init__(self, reason: str = "") -> None:
        self.reason = reason


def stop(reason: str) -> Any:
    raise Stop(reason)


@dataclass(frozen=True)
class Part:
    """What of a network's output is the prediction: ``sign`` times the first ``size`` along ``dimension``."""

    sign: float
    dimension: int
    size: int

    def of(self, output: Any) -> Tensor:
        raw = _raw(output)
        part = raw if raw.shape[self.dimension] == self.size else raw.narrow(self.dimension, 0, self.size)
        return part if self.sign > 0 else -part


@dataclass
class Step:
    """One step of a pipeline's loop.

    Attributes:
        arguments: what the trained network was called with.
        raw: what it gave.
        latents: the scheduler's, as it scales them for the network.
        timestep: the scheduler's.
        prediction: what the scheduler stepped with.
    """

    arguments: Arguments
    raw: Tensor
    latents: Tensor
    timestep: float
    prediction: Tensor

    def latents_name(self) -> str:
        """The argument that is the latents."""
        names = [
            name for name, x in self.arguments.items()
            if isinstance(x, Tensor) and x.shape == self.latents.shape and same(x, self.latents)
        ]  # fmt: skip
        if len(names) != 1 or len(self.latents) != len(PROMPTS):
            lists = [name for name, x in self.arguments.items() if isinstance(x, list | tuple)]
            stop(
                f"expected one argument that is the latents of the {len(PROMPTS)} prompts, found {_listed(names)}"
                + (f" (lists: {_listed(lists)})" if lists else "")
            )
        return names[0]

    def parts(self) -> list[Part]:
        """Every reading of the output that gives the prediction."""
        size, given = self.prediction.shape, self.raw.shape
        if not self.prediction.any():
            stop("its predictions are zero everywhere")
        found = []
        if size == self.latents.shape and len(size) == len(given):
            parts = [Part(sign, d, size[d]) for d in {1, len(size) - 1} if given[d] >= size[d] for sign in (1.0, -1.0)]
            found = [part for part in parts if same(part.of(self.raw), self.prediction)]
        if not found:
            stop(
                f"what its scheduler steps with, {tuple(size)}, is no part of the network's output, {tuple(given)} "
                f"(nor its negative), for latents {tuple(self.latents.shape)}"
            )
        return found


class _Taps(Loop):
    def __init__(self, model: DiffusionModel, prompts: Sequence[str], inputs: dict[str, Any]) -> None:
        generators = [torch.Generator().manual_seed(j) for j in range(len(prompts))]
        super().__init__(
            model,
            generators,
            inputs,
            rule=None,
            rng=random.Random(0),
            reference=False,
            kept_steps=0,
            decode_rows=None,
        )

    def named(self, args: Any, kwargs: Any) -> Arguments:
        names = list(inspect.signature(self.model.denoiser.forward).parameters)[: len(args)]
        return {**dict(zip(names, args, strict=True)), **kwargs}

    def watch(self) -> None:
        """Run until :class:`Stop`; what the pipeline has changed of its parts by then is put back."""
        network, vae = self.model.denoiser, self.model.networks.get("vae")
        processors = dict(getattr(network, "attn_processors", {}))
        dtype = getattr(vae, "dtype", None)
        try:
            self.run("sample")
        finally:
            if any(own is not processors[name] for name, own in getattr(network, "attn_processors", {}).items()):  # PAG
                network.set_attn_processor(processors)
            if vae is not None and dtype != getattr(vae, "dtype", None):  # SDXL decodes in float32
                vae.to(dtype)


class _Capture(_Taps):
    arguments: Arguments

    def _network(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if name != self.model.trained:
            return super()._network(name, *args, **kwargs)
        self.arguments = self.named(args, kwargs)
        raise Stop


class _DryRun(_Taps):
    """Notes each step; stops at one that is not one call for all prompts, and before pictures are decoded."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.made: list[Step] = []
        self.pending: list[tuple[Arguments, Tensor]] = []
        self.undecoded: Tensor | None = None

    def _network(self, name: str, *args: Any, **kwargs: Any) -> Any:
        output = super()._network(name, *args, **kwargs)
        if name == self.model.trained:
            refuse_state((args, kwargs), self.model.stateless, f"{type(self.pipe).__name__} hands its {name}")
            self.pending.append((self.named(args, kwargs), _raw(output)))
        return output

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        given = self.step_signature.bind(*args, **kwargs).arguments
        latents, t = given["sample"], given["timestep"]
        if len(self.pending) != 1:
            stop(f"its loop calls it {len(self.pending)} times a step; expected one call for all prompts")
        if hasattr(self.scheduler, "scale_model_input"):
            latents = untapped(self.scheduler).scale_model_input(latents, t)
        (arguments, raw), self.pending = self.pending[0], []
        step = Step(arguments, raw, latents.clone(), float(t), given["model_output"])
        step.latents_name()
        step.parts()
        self.made.append(step)
        return super()._step(*args, **kwargs)

    def _decode(self, vae: Any, latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.undecoded = latents
        raise Stop

    def check_decoded(self) -> None:
        """That given pictures would become its latents as its latents become pictures."""
        decoded, own = self.undecoded, self.sample
        if decoded is None:
            return stop("it decodes its latents by no VAE, which would make latents of pictures")
        latents = from_vae(self.model, decoded.to(own))
        if latents.shape != own.shape or not same(latents, own):
            stop(f"how its VAE's latents {tuple(decoded.shape[1:])} become its own {tuple(own.shape[1:])} is not known")


def first_call(model: DiffusionModel, prompts: Sequence[str], inputs: dict[str, Any]) -> Arguments:
    """What the pipeline first calls its trained network with; the network is not called."""
    loop = _Capture(model, prompts, inputs)
    with contextlib.suppress(Stop):
        loop.watch()
    return loop.arguments


def guidance_choices(model: DiffusionModel, guidance_scale: float | None) -> list[dict[str, float]]:
    """Arguments of the pipeline's call, with more and more of its guidance switched off."""
    name, takes = model.guidance_argument, inspect.signature(type(model.pipe).__call__).parameters
    own = {name: guidance_scale} if name is not None and guidance_scale is not None else {}
    off = {key: value for key, value in (("true_cfg_scale", 1.0), ("pag_scale", 0.0)) if key in takes}
    choices = [own, {**own, **off}, *({**off, name: scale} for scale in (1.0, 0.0) if name is not None)]
    return [choice for j, choice in enumerate(choices) if choice not in choices[:j]]


def without_guidance(
    model: DiffusionModel, inputs: dict[str, Any], guidance_scale: float | None
) -> tuple[list[Step], dict[str, float]]:
    """The steps of a short call with as little guidance off as leaves one call a step, and what switched it off.

    A guidance scale that is an input of the network (FLUX.1's) stays as it is.

    Args:
        inputs: of the pipeline's call for :data:`PROMPTS`.

    Raises:
        Stop: its steps are not one call of the trained network each, whose prediction is what the scheduler steps with;
            or how pictures would become its latents is not known.
    """
    refused: Stop | None = None
    for guidance in guidance_choices(model, guidance_scale):
        loop = _DryRun(model, PROMPTS, {**inputs, **guidance})
        try:
            loop.watch()
        except Stop as end:
            if end.reason:
                refused = end
                continue
        except ConfigurationError:  # a scale that the pipeline does not take
            if refused is None:
                raise
            continue
        loop.check_decoded()
        return loop.made, guidance
    raise refused or Stop


# values


def same(got: Tensor, expected: Tensor, least: float = 0.0) -> bool:
    """Equal but for rounding in the coarser dtype of the two, at ``least`` that share of the largest."""
    share = max(8 * _exactness(got), 8 * _exactness(expected), least)
    got, expected = got.detach().double(), expected.detach().double()
    return got.shape == expected.shape and float((got - expected).abs().max()) <= share * float(expected.abs().max())


def equal(x: Any, y: Any) -> bool:
    """Two arguments, whatever they hold."""
    a, b = tree_leaves(x), tree_leaves(y)
    return len(a) == len(b) and all(
        torch.equal(p, q) if isinstance(p, Tensor) and isinstance(q, Tensor) else p is q or p == q
        for p, q in zip(a, b, strict=True)
    )


def affine(x: Sequence[float], arguments: Sequence[Any], scale: float) -> tuple[float, float] | None:
    """``(a, b)`` with which an argument is ``a x + b`` at every step: as pipelines write it, else through the ends.

    Args:
        scale: by which pipelines divide timesteps.
    """
    # autocast: float32 in the first step, what the network gave from then on
    exact, told = max(map(_exactness, arguments)), [_number(argument) for argument in arguments]
    y = [value for value in told if value is not None]
    if len(y) < len(told) or x[0] == x[-1]:
        return None
    slope = (y[-1] - y[0]) / (x[-1] - x[0])
    choices = [(1.0, 0.0), (1 / scale, 0.0), (-1 / scale, 1.0), (-1.0, scale)]
    if exact < 1e-4:  # of rounded numbers a slope would be a guess
        choices.append((slope, y[0] - slope * x[0]))
    largest = max(map(abs, y))
    for a, b in choices:
        if all(abs(a * p + b - q) <= 8 * exact * max(largest, abs(b)) for p, q in zip(x, y, strict=True)):
            return a, b
    return None


def followed(steps: Sequence[Step], latents: str, scale: float) -> tuple[str, tuple[float, float]]:
    """Which argument follows the scheduler's timestep, and by what map; every other must stay as it is."""
    x = [step.timestep for step in steps]
    if len(set(x)) < STEPS:
        stop(f"its loop made {len(set(x))} different steps where {STEPS} were asked for")
    follows, changes = {}, []
    for name in steps[0].arguments:
        given = [step.arguments.get(name) for step in steps]
        if name == latents or all(equal(given[0], y) for y in given[1:]):
            continue
        found = affine(x, given, scale)
        if found is None:
            changes.append(name)
        else:
            follows[name] = found
    if changes or len(follows) != 1:
        stop(
            f"expected one argument that follows its scheduler's timestep and no other that changes from step to step, "
            f"found {_listed(follows)} and {_listed(changes)}"
        )
    return next(iter(follows.items()))


def _raw(output: Any) -> Tensor:
    return next(x for x in tree_leaves(output) if isinstance(x, Tensor))


def _exactness(x: Any) -> float:
    """Relative rounding of a number in the form of ``x``."""
    return torch.finfo(x.dtype).eps if isinstance(x, Tensor) and x.is_floating_point() else 1e-6


def _number(x: Any) -> float | None:
    """The one number that an argument is, for all rows."""
    if isinstance(x, Tensor):
        one = x.numel() == 1 or (x.shape == (len(PROMPTS),) and bool((x == x[0]).all()))
        return float(x.flatten()[0]) if one else None
    return float(x) if isinstance(x, int | float) else None


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names)) or "none"
