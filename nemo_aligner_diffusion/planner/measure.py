"""One micro-batch's phases, run on fake tensors by the code that trains, and counted.

Each phase is run once: encoding the prompts, one network call without gradient, one of the frozen reference, the
decoder and the reward with their backward pass, and active steps replayed in the backward pass. How often a step of a
method needs each of them is :mod:`.schedule`'s business.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from nemo_aligner_diffusion.diffusion.lora import add_lora
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.plan import Plan
from nemo_aligner_diffusion.diffusion.taps import detached
from nemo_aligner_diffusion.diffusion.trajectory import reward_gradient
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.parallel.gradients import local_part
from nemo_aligner_diffusion.parallel.parallelism import Parallelism
from nemo_aligner_diffusion.parallel.simulated import simulated_mesh
from nemo_aligner_diffusion.planner.kernels import gpu_kernels
from nemo_aligner_diffusion.planner.ledger import Ledger, Record
from nemo_aligner_diffusion.planner.networks import build_model, call_pipeline, preset_reward, without_memory
from nemo_aligner_diffusion.planner.schedule import active_calls
from nemo_aligner_diffusion.planner.settings import Case, Settings
from nemo_aligner_diffusion.rewards.base import Reward
from nemo_aligner_diffusion.rewards.support.sample_keys import SampleKeys, scoring_samples

PHASES = ("text", "call", "reference", "decode", "replay", "replay_next", "validation")
TYPICAL_PROMPT = "a red apple on a wooden table, studio light"


@dataclass
class Measurement:
    """What one process does with one micro-batch, and what it holds all the time; bytes.

    Attributes:
        phases: ``text``, ``call`` (one guided network call without gradient), ``reference`` (one of the frozen model),
            ``decode`` (one read: decoder, reward and their backward pass), ``unread`` (the decoding without gradient
            that ends a trajectory which is re-noised), ``replay`` (recompute and backward pass of
            the first active step), ``replay_next`` (of each further one; ``peak`` and ``held`` are those of both),
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
    notes: list[str] = field(default_factory=list)


@dataclass
class _Subject:
    model: DiffusionModel
    reward: Reward
    notes: list[str]


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
        subject = _build(settings, case)
    model = subject.model
    frozen = model.frozen_parts()
    parameters = sum(p.numel() for p in model.denoiser.parameters())
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    without_memory(model, mode)
    without_memory(subject.reward, mode)
    layout = case.layout
    mesh_context = contextlib.nullcontext() if layout.is_single else simulated_mesh(layout)
    with mesh_context as mesh, mode:
        parallel = Parallelism(layout)
        if mesh is not None:
            denoisers = [part for part in (model.denoiser, model.reference_denoiser) if part is not None]
            parallel.apply(mesh, denoisers, {**frozen, "reward": subject.reward})
        phases = _Phases(settings, case, subject, parallel, prompts).run(plan, only)
        parallel.reshard()  # what is still gathered is in the phases already
        weights = {
            "denoiser": held_bytes(model.denoiser),
            "reference": held_bytes(model.reference_denoiser),
            **{name: held_bytes(part) for name, part in frozen.items()},
            "reward": held_bytes(subject.reward),
        }
        trained = [local_part(p) for p in model.denoiser.parameters() if p.requires_grad]
    return Measurement(
        phases,
        weights,
        sum(p.numel() * p.element_size() for p in trained),
        sum(p.numel() for p in trained),
        parameters,
        subject.notes,
    )


class _Phases:
    def __init__(
        self, settings: Settings, case: Case, subject: _Subject, parallel: Parallelism, prompts: Sequence[str] | None
    ) -> None:
        self.settings, self.case, self.parallel = settings, case, parallel
        self.model, self.reward = subject.model, subject.reward
        mesh = parallel.mesh
        groups = {mesh[f"{name}_parallel"].get_group().group_name: name for name in ("data", "tensor")} if mesh else {}
        known = (local_part(tensor) for tensor in _tensors(self.model, self.reward))
        self.ledger = Ledger(known, groups)
        self.prompts = list(prompts or (f"{TYPICAL_PROMPT}, {i}" for i in range(case.micro_batch_size)))
        self.found: dict[str, Record] = {}
        self._phase, self._running = contextlib.ExitStack(), ""

    def run(self, plan: Plan, only: Sequence[str]) -> dict[str, Record]:
        kernels = contextlib.nullcontext() if self.settings.attention == "cpu" else gpu_kernels(self.settings.attention)
        with kernels, self.ledger:
            self._run(plan, only)
        return self.found

    def _run(self, plan: Plan, only: Sequence[str]) -> None:
        model, settings = self.model, self.settings
        if self.case.layout.fsdp or set(only) - {"replay", "replay_next"}:
            self._rollout(reference="reference" in only and bool(settings.kl_coeff))
        if "decode" in only:
            self._reward_gradient()
            if plan.renoise and not plan.own_step:
                self._decoding("unread", len(self.prompts))
        cut = plan.cut or bool(plan.renoise)
        if "replay" in only:
            self._replay("replay", 1, cut)
            self._begin("average")
            trained = [(name, p) for name, p in model.denoiser.named_parameters() if p.requires_grad]
            self.parallel.average_gradients(trained)
            self._end()
            self._drop_gradients()
        if "replay_next" in only and active_calls(plan) > 1:
            self._replay("replay_next", 2, cut)
            two, one = self.found["replay_next"], self.found.get("replay", Record())
            self.found["replay_next"] = replace(
                two, ops=two.ops - one.ops, collectives=two.collectives - one.collectives
            )
            self._drop_gradients()
        if "validation" in only and settings.validation_batch_size:
            self._decoding("validation", self._rows(settings.validation_batch_size)[0].stop)

    def _begin(self, name: str) -> None:
        self._phase.close()
        self.found[name], self._running = self._phase.enter_context(self.ledger.phase()), name

    def _end(self) -> None:
        self._phase.close()
        self._running = ""

    def _pipeline(self, steps: int, network: Any, **taps: Any) -> Tensor:
        settings = self.settings
        inputs = self.model.inputs(self.prompts, steps, settings.guidance_scale, settings.height, settings.width)
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
        rows, vae, leaves = self._rows(len(self.prompts)), self.model.pipe.vae, []

        def decode(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._begin("decode")
            torch.set_grad_enabled(True)
            leaves.append(latents.detach().requires_grad_())
            if len(rows) == 1:
                return vae.decode(leaves[0], *args, **kwargs)

            def some(part: Tensor) -> Tensor:
                return vae.decode(part, *args, **{**kwargs, "return_dict": False})[0]

            # one graph at a time: the others are made again in the backward pass
            return (torch.cat([checkpoint(some, leaves[0][part], use_reentrant=False) for part in rows]),)

        def objective(images: Tensor, part: slice, _: int) -> Tensor:
            # as in training: pictures are augmented
            with scoring_samples(SampleKeys(0, 0, tuple(range(len(self.prompts))[part]))):
                images = images.to(torch.promote_types(images.dtype, torch.float32))
                return -self.reward.scores(images, self.prompts[part])[0]

        images = self._pipeline(1, lambda *_, **__: self.output, decode=decode)
        with self._precision():
            reward_gradient(images, leaves[:1], objective, None, 0, 1, rows[0].stop, 1.0)
        self._end()

    def _decoding(self, name: str, pictures: int) -> None:
        """Phase ``name``: as many pictures without gradient."""

        def decode(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._begin(name)
            parts = [
                self.model.pipe.vae.decode(
                    latents.new_zeros(part.stop - part.start, *latents.shape[1:]), *args, **kwargs
                )
                for part in self._rows(pictures)
            ]
            self._end()
            return parts[0]

        self._pipeline(1, lambda *_, **__: self.output, decode=decode)

    def _rows(self, pictures: int) -> list[slice]:
        """Those that are decoded and scored at a time."""
        size = min(self.case.decode_micro_batch_size or pictures, pictures)
        return [slice(start, min(start + size, pictures)) for start in range(0, pictures, size)]

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
        if self.settings.kl_coeff:  # the distance to the reference's predictions, whatever they are
            distances = [(e - torch.zeros_like(e)).square().mean() for e in predictions]
            surrogate = surrogate + self.settings.kl_coeff * torch.stack(distances).mean()
        del latents
        predictions.clear()
        self._begin(name)
        surrogate.backward()
        self._end()

    def _precision(self, cache: bool = True) -> Any:
        """What Lightning puts around a training step. Counted on the CPU's autocast; see :mod:`.kernels`."""
        _, compute, autocast = self.settings.arithmetic
        if not autocast:
            return contextlib.nullcontext()
        return torch.autocast("cpu", getattr(torch, compute), cache_enabled=cache)

    def _drop_gradients(self) -> None:
        for parameter in self.model.denoiser.parameters():
            parameter.grad = None


def _build(settings: Settings, case: Case) -> _Subject:
    """As ``training.assemble`` does, from an architecture instead of weights."""
    notes: list[str] = []
    model = build_model(settings.spec, **settings.pipeline)
    if settings.lora is not None:
        names = [name for name, _ in model.denoiser.named_modules()]
        asked = list(settings.lora.target_modules or model.lora_targets)
        targets = [t for t in asked if any(name == t or name.endswith(f".{t}") for name in names)]
        if not targets:
            raise ConfigurationError(
                f"model.peft.lora_tuning.target_modules: {settings.spec.name} has no module named {', '.join(asked)}"
            )
        if len(targets) < len(asked):
            missing = ", ".join(t for t in asked if t not in targets)
            notes.append(f"{settings.spec.name} has no modules named {missing}: no adapters there")
        add_lora(model.denoiser, settings.lora.adapter_dim, settings.lora.alpha, settings.lora.dropout, targets)
    else:
        model.denoiser.requires_grad_(True)
        model.keep_reference()
    if case.activation_checkpointing:
        model.denoiser.enable_gradient_checkpointing()
    reward = _reward(settings)
    weights, _, autocast = settings.arithmetic
    if weights != "float32" and not autocast:  # the reward has a precision of its own
        model.to(getattr(torch, weights))
    model.denoiser.train()
    return _Subject(model, reward, notes)


def _reward(settings: Settings) -> Reward:
    from nemo_aligner_diffusion.rewards.augmentation import Augmentation
    from nemo_aligner_diffusion.rewards.build import build_reward
    from nemo_aligner_diffusion.rewards.settings import PRECISIONS as REWARD_PRECISIONS
    from nemo_aligner_diffusion.rewards.support.augmented import augmented

    if settings.reward is not None:
        given = settings.rm.get("model", {})
        reward = preset_reward(
            settings.reward,
            {
                "micro_batch_size": given.get("micro_batch_size"),
                "activation_checkpointing": bool(given.get("activation_checkpointing", False)),
            },
        )
        precision = REWARD_PRECISIONS[str(settings.rm.get("trainer", {}).get("precision", 32))]
        return augmented(reward.to(getattr(torch, precision)), Augmentation(**settings.rm.get("augment", {})))
    with torch.device("cpu"):
        return build_reward(settings.rm)


def _recomputed(network: Any, args: Any, kwargs: Any, handle: Tensor) -> Any:
    """``network(*args, **kwargs)`` that keeps its inputs and its output, and has a backward pass of its own."""
    leaves, structure = tree_flatten((args, kwargs))
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def call(_: Tensor, *given: Tensor) -> Any:
        at = dict(zip(tensors, given, strict=True))
        args, kwargs = tree_unflatten([at.get(i, leaf) for i, leaf in enumerate(leaves)], structure)
        return network(*args, **kwargs)

    return checkpoint(call, handle, *(leaves[i] for i in tensors), use_reentrant=True)


def held_bytes(module: nn.Module | None) -> int:
    """Of a module's parameters and buffers, each storage once."""
    if module is None:
        return 0
    storages = [local_part(tensor).untyped_storage() for tensor in (*module.parameters(), *module.buffers())]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _tensors(*modules: nn.Module) -> Iterator[Tensor]:
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()
