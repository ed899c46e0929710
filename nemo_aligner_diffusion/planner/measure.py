"""One micro-batch's phases, run on fake tensors by the code that trains, and counted.

Each phase is run once: encoding the prompts, one network call without gradient, one of the frozen reference, the
decoder and the reward with their backward pass, and active steps replayed in the backward pass; for pairs of pictures
the VAE's encoder, and the network's call for both with its backward pass. How often a step of a method needs each of
them is :mod:`.schedule`'s business.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import checkpoint

from nemo_aligner_diffusion.algorithms.preference.base import PreferenceMethod
from nemo_aligner_diffusion.diffusion.decoding import decode_as_set_up
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.network.dry_run import guidance_choices
from nemo_aligner_diffusion.diffusion.network.latents import encode
from nemo_aligner_diffusion.diffusion.network.rollout_network import fast_in_bf16, rollout_network_of
from nemo_aligner_diffusion.diffusion.plan import Plan
from nemo_aligner_diffusion.diffusion.taps import detached
from nemo_aligner_diffusion.diffusion.trajectory import reward_gradient
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.parallel.parallelism import Parallelism
from nemo_aligner_diffusion.parallel.placements import local_part
from nemo_aligner_diffusion.parallel.simulated import group_names, simulated_mesh
from nemo_aligner_diffusion.planner.kernels import gpu_kernels
from nemo_aligner_diffusion.planner.ledger import Ledger, Record
from nemo_aligner_diffusion.planner.networks import call_pipeline, model_of, reward_of
from nemo_aligner_diffusion.planner.schedule import active_calls
from nemo_aligner_diffusion.planner.settings import Case, Settings
from nemo_aligner_diffusion.planner.shapes import ShapesMode, convertible, without_memory
from nemo_aligner_diffusion.rewards.base import Reward
from nemo_aligner_diffusion.rewards.support.augmented import SampleKeys, scoring_samples
from nemo_aligner_diffusion.training.build import rollout_precision

PHASES = ("encode", "text", "call", "reference", "decode", "replay", "replay_next", "validation")
TYPICAL_PROMPT = "a red apple on a wooden table, studio light"


@dataclass
class Measurement:
    """What one process does with one micro-batch, and what it holds all the time; bytes.

    Attributes:
        phases: ``text``, ``call`` (one guided network call without gradient), ``copied`` (the same of the rollout's own
            network) and ``fold`` (which brings that up to date, once a step), ``kept`` and ``kept, then`` (whose starts
            differ by what a call holds whose activations are kept), ``reference`` (one of the frozen model),
            ``decode`` (one read: decoder, reward and their backward pass), ``unread`` (the decoding without gradient
            that ends a trajectory which is re-noised), ``replay`` (recompute and backward pass of
            the first active step), ``replay_next`` (of each further one; ``peak`` is that of both),
            ``average`` (of gradients, once a step) and ``validation`` (decoding without gradient). Of pairs also
            ``encode`` (both pictures by the VAE) and ``conditioning`` (the prompts, unguided); ``replay`` is forward
            and backward pass of one call for both pictures, ``decode`` without gradient, as of a policy gradient.
        weights: of ``denoiser``, ``reference``, ``text_encoder``, ``vae``, ``reward``: what this process holds.
        trained, trained_elements, moments: bytes of the trained parameters it holds, their number, and optimizer state.
        parameters: of the whole denoiser, adapters included, over all processes.
        latents, pictures: bytes of a micro-batch's.
    """

    phases: dict[str, Record]
    weights: dict[str, int]
    trained: int
    trained_elements: int
    moments: int
    parameters: int
    latents: int = 0
    pictures: int = 0


def measure(
    settings: Settings,
    case: Case,
    plan: Plan,
    prompts: Sequence[str] | None = None,
    only: Sequence[str] = PHASES,
) -> Measurement:
    """Count one micro-batch of ``case``.

    Args:
        plan: one draw of the method's plan: whether it cuts, re-noises, and how many active steps it has matter here.
        prompts: one a picture; a reward's text tower may do more for longer ones.
        only: phases to run, of :data:`PHASES`; the others are missing in the result (``average`` comes with
            ``replay``; ``replay_next`` without it is both steps).

    Raises:
        ConfigurationError: the model cannot be laid out so.
    """
    with torch.device("meta"):
        model = model_of(settings, case)
        reward = reward_of(settings)
    frozen = model.frozen_parts()
    parameters = sum(p.numel() for p in model.denoiser.parameters())
    mode = ShapesMode()
    without_memory(model, mode)
    without_memory(reward, mode)
    layout = case.layout
    mesh_context = contextlib.nullcontext() if layout.is_single else simulated_mesh(layout)
    with mesh_context as mesh, mode:
        parallel = Parallelism(layout)
        fast = settings.on_gpu or fast_in_bf16(torch.device("cpu"))
        asked = rollout_precision(settings.run) if settings.run.method().kind == "reward" else None
        asked = "bf16" if asked == "fp8" else asked  # Settings.not_counted says so
        model.rollout_network = rollout_network_of(model.denoiser, asked, fast, parallel.holds_whole_weights)
        if mesh is not None:
            copied = None if model.rollout_network is None else model.rollout_network.network
            denoisers = [part for part in (model.denoiser, model.reference_denoiser, copied) if part is not None]
            parallel.apply(mesh, denoisers, {**frozen, "reward": reward})
        run = _Phases(settings, case, model, reward, parallel, prompts)
        phases = run.run(plan, only)
        parallel.reshard()  # what is still gathered is in the phases already
        parts = {"denoiser": model.denoiser, "reference": model.reference_denoiser, **frozen, "reward": reward}
        weights = {name: 0 if part is None else _held_bytes(part) for name, part in parts.items()}
        if model.rollout_network is not None:
            both = nn.ModuleList([model.denoiser, model.rollout_network.network])
            weights["rollout network"] = _held_bytes(both) - weights["denoiser"]
        if settings.run.model.keeps_8_bits:
            weights = {name: size - (name != "reward") * _halved(parts.get(name)) for name, size in weights.items()}
        trained = [local_part(p) for _, p in model.trainable_parameters()]
    moments = sum(map(settings.run.model.optim.state_bytes, trained))
    return Measurement(
        phases, weights, sum(p.nbytes for p in trained), sum(p.numel() for p in trained), moments, parameters,
        run.latents, run.pictures,
    )  # fmt: skip


class _Phases:
    def __init__(
        self,
        settings: Settings,
        case: Case,
        model: DiffusionModel,
        reward: Reward,
        parallel: Parallelism,
        prompts: Sequence[str] | None,
    ) -> None:
        self.settings, self.case, self.parallel = settings, case, parallel
        self.model, self.reward = model, reward
        self.method = settings.run.method()
        self.kl_coeff = settings.run.model.kl_coeff if self.method.kind == "reward" else 0.0
        self.latents = self.pictures = 0
        copied = [] if model.rollout_network is None else [model.rollout_network.network]
        known = [local_part(tensor) for part in (model, reward, *copied) for tensor in _tensors(part)]
        self.ledger = Ledger(known, group_names(parallel.mesh) if parallel.mesh else {})
        self.prompts = list(prompts or (f"{TYPICAL_PROMPT}, {i}" for i in range(case.micro_batch_size)))
        self.found: dict[str, Record] = {}
        self._phase, self._running = contextlib.ExitStack(), ""

    def run(self, plan: Plan, only: Sequence[str]) -> dict[str, Record]:
        kernels = gpu_kernels() if self.settings.on_gpu else contextlib.nullcontext()
        with kernels, self.ledger:
            self._run(plan, only)
        return self.found

    def _run(self, plan: Plan, only: Sequence[str]) -> None:
        model, settings = self.model, self.settings
        if self.case.layout.fsdp or set(only) - {"replay", "replay_next"}:
            self._rollout(reference="reference" in only and bool(self.kl_coeff))
        if "decode" in only and (self.method.kind != "preference" or not settings.run.reads_pairs(self.method)):
            if self.method.kind == "reward":
                self._reward_gradient()
            else:
                self._scores()
            if plan.renoise and not plan.own_step:
                self._decoding("unread", len(self.prompts))
        cut = plan.cut or bool(plan.renoise)
        if "replay" in only:
            if isinstance(self.method, PreferenceMethod):
                self._pairs(self.method.compares)
            else:
                self._replay("replay", 1, cut)
            self._begin("average")
            self.parallel.average_gradients(model.trainable_parameters())
            self._end()
            model.zero_grad(set_to_none=True)
        if "replay_next" in only and active_calls(plan) > 1:
            self._replay("replay_next", 2, cut)
            two, one = self.found["replay_next"], self.found.get("replay", Record())
            self.found["replay_next"] = replace(
                two, ops=two.ops - one.ops, collectives=two.collectives - one.collectives
            )
            model.zero_grad(set_to_none=True)
        if "validation" in only and settings.validation_batch_size:
            size = settings.validation_batch_size
            self._decoding("validation", min(self.case.decode_micro_batch_size or size, size))

    def _begin(self, name: str) -> None:
        self._phase.close()
        self.found[name], self._running = self._phase.enter_context(self.ledger.phase()), name

    def _end(self) -> None:
        self._phase.close()
        self._running = ""

    def _pipeline(
        self, steps: int, network: Any, prompts: list[str] | None = None, guidance: Any = None, **taps: Any
    ) -> Tensor:
        """Args ``prompts``, ``guidance``: in the place of the micro-batch's prompts, of the recipe's scale."""
        infer = self.settings.run.model.infer
        scale = infer.unconditional_guidance_scale if guidance is None else None
        inputs = self.model.inputs(prompts or self.prompts, steps, scale, infer.height, infer.width) | (guidance or {})
        with self._precision(), torch.no_grad():
            return call_pipeline(self.model, inputs, network, **taps)

    def _rollout(self, reference: bool) -> None:
        """Phases ``text``, ``call`` and ``reference``."""
        calls: list[Any] = []  # of one step: two networks' calls, where a pipeline guides so

        def network(*args: Any, **kwargs: Any) -> Any:
            if self._running != "call":
                self._begin("call")
                calls.clear()
            calls.append((args, kwargs))
            self.output = self.model.denoiser(*args, **kwargs)
            return self.output

        self._begin("text")
        # FSDP2 lays out its buffers at the first call
        self._pipeline(2 if self.case.layout.fsdp else 1, network, stepped=lambda prediction: self._end())
        if self.model.rollout_network is not None:
            self.parallel.reshard()
            self._begin("fold")
            self.model.rollout_network.refresh()
            self._end()
            self._begin("copied")
            with self._precision(), torch.no_grad():
                for args, kwargs in calls:
                    self.model.rollout_network(*args, **kwargs)
            self._end()
        if self.settings.run.model.steps_kept and self.method.kind == "reward":
            self._begin("kept")
            with self._precision(cache=False), torch.enable_grad():
                held = [self.model.denoiser(*args, **kwargs) for args, kwargs in calls]
            self._begin("kept, then")  # begins with what they hold
            del held
        if reference:
            self._begin("reference")
            with self._precision(), torch.no_grad(), self.model.reference():
                for args, kwargs in calls:
                    self.model.network(self.model.trained)(*args, **kwargs)
            self._end()

    def _reward_gradient(self) -> None:
        """Phase ``decode``."""
        rows, leaves = self.case.decode_micro_batch_size, []

        def begin(latents: Tensor) -> Tensor:
            self._begin("decode")
            torch.set_grad_enabled(True)
            leaves.append(latents.detach().requires_grad_())
            return leaves[0]

        def objective(images: Tensor, part: slice, _: int) -> Tensor:
            # as in training: pictures are augmented
            with scoring_samples(SampleKeys(0, 0, tuple(range(len(self.prompts))[part]))):
                images = images.to(torch.promote_types(images.dtype, torch.float32))
                return -self.reward.scores(images, self.prompts[part])[0]

        images = self._decoded(begin, in_training=True)
        with self._precision():
            reward_gradient(images, leaves[:1], objective, None, 0, 1, rows, 1.0)
        self._end()

    def _scores(self) -> None:
        """Phase ``decode`` where no reward's gradient is taken."""

        def begin(latents: Tensor) -> Tensor:
            self._begin("decode")
            self.latents = latents.nbytes
            return latents

        images = self._decoded(begin, in_training=self.method.kind == "policy")
        self.pictures, rows = images.nbytes, self.case.decode_micro_batch_size or len(images)
        for start in range(0, len(images), rows):
            part = slice(start, start + rows)
            with self._precision(), torch.no_grad(), scoring_samples(SampleKeys(0, 0, tuple(range(len(images))[part]))):
                self.reward.scores(images[part], self.prompts[part])
        self._end()

    def _pairs(self, compares: bool) -> None:
        """Phases ``encode``, ``conditioning``, ``reference`` and ``replay`` of a method that learns from pairs."""
        model, infer = self.model, self.settings.run.model.infer
        size: Any = (infer.height, infer.width)
        if None in size:
            size = self._decoded(lambda latents: latents, in_training=False).shape[-2:]
        pictures = torch.empty(2 * len(self.prompts), 3, *size)  # alive as long as the batch
        if self.settings.run.reads_pairs(self.method):
            self._begin("encode")
            with convertible(model.pipe.vae):
                encode(model, pictures)
            self._end()
        errors: list[Tensor] = []

        def learn(*args: Any, **kwargs: Any) -> Any:
            if compares:
                self._begin("reference")
                with model.reference():
                    model.network(model.trained)(*args, **kwargs)
            self._begin("replay")
            with torch.enable_grad(), self._precision(cache=False):
                output = model.denoiser(*args, **kwargs)
            first = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
            with torch.enable_grad():
                errors.append(first.to(torch.promote_types(first.dtype, torch.float32)).square().mean())
            return detached(output)

        both = self.prompts * (2 if compares else 1)
        self._pipeline(1, learn, both, self._unguided())
        errors.pop().backward()
        self._end()

    def _unguided(self) -> dict[str, float]:
        """With which of its guidance the pipeline calls its network once for all prompts; phase ``conditioning``."""

        def network(*args: Any, **kwargs: Any) -> Any:
            self._end()
            output = self.model.denoiser(*args, **kwargs)
            called.append(next(len(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)))
            return output

        for guidance in guidance_choices(self.model, self.settings.run.model.infer.unconditional_guidance_scale):
            called: list[int] = []
            self._begin("conditioning")
            self._pipeline(1, network, None, guidance)
            if called == [len(self.prompts)]:
                return guidance
        raise ConfigurationError(
            f"{type(self.model.pipe).__name__} cannot be planned: training on pairs calls its {self.model.trained} "
            "once for all prompts, which none of its guidance scales does"
        )

    def _decoding(self, name: str, pictures: int) -> None:
        """Phase ``name``: as many pictures without gradient."""

        def begin(latents: Tensor) -> Tensor:
            self._begin(name)
            return latents.new_zeros(pictures, *latents.shape[1:])

        self._decoded(begin, in_training=name == "unread", ends=True)

    def _decoded(self, begin: Callable[[Tensor], Tensor], in_training: bool, ends: bool = False) -> Tensor:
        """The pipeline's pictures of what ``begin`` makes of its latents; ``ends``: the phase, with the decoding."""
        model = self.model
        vae = (model.small_decoder if in_training else None) or model.pipe.vae

        def decode(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
            rows = self.case.decode_micro_batch_size
            out = decode_as_set_up(model, vae, begin(latents), rows, in_training, *args, **kwargs)
            if ends:
                self._end()
            return out

        return self._pipeline(1, lambda *_, **__: self.output, decode=decode, vae=vae)

    def _replay(self, name: str, active: int, cut: bool) -> None:
        """The backward pass of a trajectory of ``active`` steps, all of them active."""
        handle = torch.empty(0, requires_grad=True)  # a reentrant checkpoint needs an input with a gradient
        predictions: list[Tensor] = []

        def network(*args: Any, **kwargs: Any) -> Any:
            torch.set_grad_enabled(True)
            if cut:
                args, kwargs = detached((args, kwargs))
            with self._precision(cache=False):
                return _recomputed(self.model.denoiser, args, kwargs, handle)

        latents = self._pipeline(active, network, stepped=predictions.append)
        surrogate = torch.zeros(())
        if self.method.kind == "reward":
            surrogate = (latents * torch.ones_like(latents)).sum()
        if self.kl_coeff or self.method.kind == "policy":  # the distance to other predictions; a step's density
            distances = [(e - torch.zeros_like(e)).square().mean() for e in predictions]
            surrogate = surrogate + (self.kl_coeff or 1.0) * torch.stack(distances).mean()
        del latents
        predictions.clear()
        self._begin(name)
        surrogate.backward()
        self._end()

    def _precision(self, cache: bool = True) -> Any:
        """What Lightning puts around a training step. Counted on the CPU's autocast; see :mod:`.kernels`."""
        if not self.settings.autocast:
            return contextlib.nullcontext()
        return torch.autocast("cpu", getattr(torch, self.settings.precision[1]), cache_enabled=cache)


def _recomputed(network: Any, args: Any, kwargs: Any, handle: Tensor) -> Any:
    """``network(*args, **kwargs)`` that keeps its inputs and its output, and has a backward pass of its own."""
    leaves, structure = tree_flatten((args, kwargs))
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    given_back: Any = None
    first: list[Any] = []  # as in training, where the second output is compared with it

    def call(_: Tensor, *given: Tensor) -> Any:
        nonlocal given_back
        at = dict(zip(tensors, given, strict=True))
        args, kwargs = tree_unflatten([at.get(i, leaf) for i, leaf in enumerate(leaves)], structure)
        flat, given_back = tree_flatten(network(*args, **kwargs))
        first[:] = first or detached(flat)
        return tuple(flat)  # a checkpoint does not see into the list that Z-Image's network gives

    flat = checkpoint(call, handle, *(leaves[i] for i in tensors), use_reentrant=True)
    return tree_unflatten(list(flat), given_back)


def _held_bytes(module: nn.Module) -> int:
    """Of a module's parameters and buffers, each storage once."""
    storages = [local_part(tensor).untyped_storage() for tensor in _tensors(module)]
    return sum({id(storage): storage.nbytes() for storage in storages}.values())


def _halved(module: nn.Module | None) -> int:
    """What 8 bits a weight save of the 16 of frozen linear layers."""
    layers = [] if module is None else [layer for layer in module.modules() if type(layer) is nn.Linear]
    frozen = [w for w in (layer.weight for layer in layers) if not w.requires_grad and w.dtype == torch.bfloat16]
    return sum(w.numel() for w in {id(w): w for w in frozen}.values())


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())
