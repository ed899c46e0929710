"""One micro-batch's phases, run on fake tensors by the code that trains, and counted.

Each phase is run once: encoding the prompts, one network call without gradient, one of the frozen reference, the
decoder and the reward with their backward pass, and active steps replayed in the backward pass. How often a step of a
method needs each of them is :mod:`.schedule`'s business.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from nemo_aligner_diffusion.diffusion.decoding import decode_as_set_up, load_small_decoder, set_up_decoder
from nemo_aligner_diffusion.diffusion.lora import add_lora
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.plan import Plan
from nemo_aligner_diffusion.diffusion.taps import detached
from nemo_aligner_diffusion.diffusion.trajectory import reward_gradient
from nemo_aligner_diffusion.parallel.parallelism import Parallelism
from nemo_aligner_diffusion.parallel.placements import local_part
from nemo_aligner_diffusion.parallel.simulated import group_names, simulated_mesh
from nemo_aligner_diffusion.planner.kernels import gpu_kernels
from nemo_aligner_diffusion.planner.ledger import Ledger, Record
from nemo_aligner_diffusion.planner.networks import build_model, call_pipeline, preset_reward
from nemo_aligner_diffusion.planner.schedule import active_calls
from nemo_aligner_diffusion.planner.settings import Case, Settings
from nemo_aligner_diffusion.planner.shapes import ShapesMode, without_memory
from nemo_aligner_diffusion.rewards.base import Reward
from nemo_aligner_diffusion.rewards.support.augmented import SampleKeys, scoring_samples
from nemo_aligner_diffusion.training.build import FROZEN_DTYPES, convert_frozen

PHASES = ("text", "call", "reference", "decode", "replay", "replay_next", "validation")
TYPICAL_PROMPT = "a red apple on a wooden table, studio light"


@dataclass
class Measurement:
    """What one process does with one micro-batch, and what it holds all the time; bytes.

    Attributes:
        phases: ``text``, ``call`` (one guided network call without gradient), ``reference`` (one of the frozen model),
            ``decode`` (one read: decoder, reward and their backward pass), ``unread`` (the decoding without gradient
            that ends a trajectory which is re-noised), ``replay`` (recompute and backward pass of
            the first active step), ``replay_next`` (of each further one; ``peak`` is that of both),
            ``average`` (of gradients, once a step) and ``validation`` (decoding without gradient).
        weights: of ``denoiser``, ``reference``, ``text_encoder``, ``vae``, ``reward``: what this process holds.
        trained: bytes of the trained parameters it holds, ``trained_elements`` their number.
        parameters: of the whole denoiser, adapters included, over all processes.
    """

    phases: dict[str, Record]
    weights: dict[str, int]
    trained: int
    trained_elements: int
    parameters: int


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
        model = _model(settings, case)
        reward = _reward(settings)
    frozen = model.frozen_parts()
    parameters = sum(p.numel() for p in model.denoiser.parameters())
    mode = ShapesMode()
    without_memory(model, mode)
    without_memory(reward, mode)
    layout = case.layout
    mesh_context = contextlib.nullcontext() if layout.is_single else simulated_mesh(layout)
    with mesh_context as mesh, mode:
        parallel = Parallelism(layout)
        if mesh is not None:
            denoisers = [part for part in (model.denoiser, model.reference_denoiser) if part is not None]
            parallel.apply(mesh, denoisers, {**frozen, "reward": reward})
        phases = _Phases(settings, case, model, reward, parallel, prompts).run(plan, only)
        parallel.reshard()  # what is still gathered is in the phases already
        parts = {"denoiser": model.denoiser, "reference": model.reference_denoiser, **frozen, "reward": reward}
        weights = {name: 0 if part is None else _held_bytes(part) for name, part in parts.items()}
        trained = [local_part(p) for _, p in model.trainable_parameters()]
    return Measurement(
        phases, weights, sum(p.nbytes for p in trained), sum(p.numel() for p in trained), parameters
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
        known = [local_part(tensor) for part in (model, reward) for tensor in _tensors(part)]
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
            self._rollout(reference="reference" in only and bool(settings.run.model.kl_coeff))
        if "decode" in only:
            self._reward_gradient()
            if plan.renoise and not plan.own_step:
                self._decoding("unread", len(self.prompts))
        cut = plan.cut or bool(plan.renoise)
        if "replay" in only:
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

    def _pipeline(self, steps: int, network: Any, **taps: Any) -> Tensor:
        infer = self.settings.run.model.infer
        inputs = self.model.inputs(self.prompts, steps, infer.unconditional_guidance_scale, infer.height, infer.width)
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
        surrogate = (latents * torch.ones_like(latents)).sum()
        kl_coeff = self.settings.run.model.kl_coeff
        if kl_coeff:  # the distance to the reference's predictions, whatever they are
            distances = [(e - torch.zeros_like(e)).square().mean() for e in predictions]
            surrogate = surrogate + kl_coeff * torch.stack(distances).mean()
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


def _model(settings: Settings, case: Case) -> DiffusionModel:
    """As ``training.build`` does, from an architecture instead of weights."""
    section = settings.run.model
    model = build_model(settings.spec, **section.pipeline.declared())
    with torch.device("cpu"):
        small = section.decoder.small_decoder and load_small_decoder(section.decoder.small_decoder)
    set_up_decoder(model, section.decoder, small)
    if settings.lora is not None:
        tuning = settings.lora
        targets = list(tuning.target_modules or model.lora_targets)
        rank = tuning.adapter_dim or 32  # a file's is not looked up: that of most families
        add_lora(model.denoiser, rank, tuning.alpha, tuning.dropout, targets)
    else:
        model.denoiser.requires_grad_(True)
        model.keep_reference()
    if case.activation_checkpointing:
        model.denoiser.enable_gradient_checkpointing()
    weights, vae = getattr(torch, settings.precision[0]), model.pipe.vae
    model.to(weights)  # the reward has a precision of its own
    if section.frozen_precision is not None:
        convert_frozen(model, FROZEN_DTYPES[section.frozen_precision] or weights)
    if weights == torch.float16 and hasattr(model.pipe, "upcast_vae") and vae.config.get("force_upcast"):
        vae.float()  # as its pipeline does for the decoding: a conversion that fakes refuse
    model.denoiser.train()
    return model


def _reward(settings: Settings) -> Reward:
    from nemo_aligner_diffusion.rewards.augmentation import Augmentation
    from nemo_aligner_diffusion.rewards.registry import build_reward
    from nemo_aligner_diffusion.rewards.settings import PRECISIONS
    from nemo_aligner_diffusion.rewards.support.augmented import augmented

    rm = settings.run.rm
    if settings.reward is None:
        with torch.device("cpu"):
            return build_reward(rm)
    model, trainer = rm.get("model", {}), rm.get("trainer", {})
    reward = preset_reward(
        settings.reward,
        micro_batch_size=model.get("micro_batch_size"),
        activation_checkpointing=bool(model.get("activation_checkpointing", False)),
    )
    precision = PRECISIONS[str(trainer.get("precision", 32))]
    return augmented(reward.to(getattr(torch, precision)), Augmentation(**rm.get("augment", {})))


def _recomputed(network: Any, args: Any, kwargs: Any, handle: Tensor) -> Any:
    """``network(*args, **kwargs)`` that keeps its inputs and its output, and has a backward pass of its own."""
    leaves, structure = tree_flatten((args, kwargs))
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    given_back: Any = None

    def call(_: Tensor, *given: Tensor) -> Any:
        nonlocal given_back
        at = dict(zip(tensors, given, strict=True))
        args, kwargs = tree_unflatten([at.get(i, leaf) for i, leaf in enumerate(leaves)], structure)
        flat, given_back = tree_flatten(network(*args, **kwargs))
        return tuple(flat)  # a checkpoint does not see into the list that Z-Image's network gives

    flat = checkpoint(call, handle, *(leaves[i] for i in tensors), use_reentrant=True)
    return tree_unflatten(list(flat), given_back)


def _held_bytes(module: nn.Module) -> int:
    """Of a module's parameters and buffers, each storage once."""
    storages = [local_part(tensor).untyped_storage() for tensor in _tensors(module)]
    return sum({id(storage): storage.nbytes() for storage in storages}.values())


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())
