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

from nemo_aligner_diffusion.diffusion.families.stable_diffusion import StableDiffusion
from nemo_aligner_diffusion.diffusion.guidance import guided_predictor
from nemo_aligner_diffusion.diffusion.lora import add_lora
from nemo_aligner_diffusion.diffusion.sampler import Sampler
from nemo_aligner_diffusion.diffusion.trajectory import Plan, reward_gradient, run_trajectory
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.parallel.gradients import local_part
from nemo_aligner_diffusion.parallel.parallelism import Parallelism
from nemo_aligner_diffusion.parallel.simulated import simulated_mesh
from nemo_aligner_diffusion.planner.kernels import gpu_kernels
from nemo_aligner_diffusion.planner.ledger import Ledger, Record
from nemo_aligner_diffusion.planner.networks import build_model, preset_reward, without_memory
from nemo_aligner_diffusion.planner.settings import PRECISIONS, Case, Settings
from nemo_aligner_diffusion.rewards.base import Reward
from nemo_aligner_diffusion.rewards.sample_keys import SampleKeys, scoring_samples

PHASES = ("text", "call", "reference", "decode", "replay", "replay_next", "validation")
TYPICAL_PROMPT = "a red apple on a wooden table, studio light"


@dataclass
class Measurement:
    """What one process does with one micro-batch, and what it holds all the time; bytes.

    Attributes:
        phases: ``text``, ``call`` (one guided network call without gradient), ``reference`` (one of the frozen model),
            ``decode`` (one read: decoder, reward and their backward pass), ``replay`` (recompute and backward pass of
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
    model: StableDiffusion
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
    text_encoders = nn.ModuleList(part for name, part in model.named_children() if name.startswith("text_encoder"))
    parameters = sum(p.numel() for p in model.denoiser.parameters())
    # their tables of coefficients need numbers: made before tensors lose theirs
    samplers = {steps: Sampler(model.scheduler_config, "ddim", steps) for steps in (1, 2)}
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
            frozen = {"text_encoder": text_encoders, "vae": model.vae, "reward": subject.reward}
            parallel.apply(mesh, denoisers, frozen)
        phases = _Phases(settings, case, subject, parallel, samplers, prompts).run(plan, only)
        parallel.reshard()  # what is still gathered is in the phases already
        weights = {
            "denoiser": held_bytes(model.denoiser),
            "reference": held_bytes(model.reference_denoiser),
            "text_encoder": held_bytes(text_encoders),
            "vae": held_bytes(model.vae),
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
        self,
        settings: Settings,
        case: Case,
        subject: _Subject,
        parallel: Parallelism,
        samplers: dict[int, Sampler],
        prompts: Sequence[str] | None,
    ) -> None:
        self.settings, self.case, self.parallel, self.samplers = settings, case, parallel, samplers
        self.model, self.reward = subject.model, subject.reward
        mesh = parallel.mesh
        groups = {mesh[f"{name}_parallel"].get_group().group_name: name for name in ("data", "tensor")} if mesh else {}
        self.ledger = Ledger((local_part(tensor) for tensor in _tensors(self.model, self.reward)), groups)
        self.prompts = list(prompts or (f"{TYPICAL_PROMPT}, {i}" for i in range(case.micro_batch_size)))

    def run(self, plan: Plan, only: Sequence[str]) -> dict[str, Record]:
        kernels = contextlib.nullcontext() if self.settings.attention == "cpu" else gpu_kernels(self.settings.attention)
        with kernels, self.ledger:
            return self._run(plan, only)

    def _run(self, plan: Plan, only: Sequence[str]) -> dict[str, Record]:
        model, ledger, settings = self.model, self.ledger, self.settings
        found: dict[str, Record] = {}
        model.unconditional(1)  # encoded once in a run
        with ledger.phase() as found["text"], self._precision():
            conditioning = model.encode_prompts(self.prompts)
        predict = guided_predictor(model, conditioning, settings.guidance_scale)
        noise = self._noise()
        timestep = torch.tensor(500)
        with torch.no_grad():
            if self.case.layout.fsdp:
                with self._precision():
                    predict(noise, timestep)  # FSDP2 lays out its buffers at the first call
            if "call" in only:
                with ledger.phase() as found["call"], self._precision():
                    predict(noise, timestep)
            if "reference" in only and settings.kl_coeff:
                with ledger.phase() as found["reference"], self._precision(), model.reference():
                    predict(noise, timestep)
        if "decode" in only:
            with ledger.phase() as found["decode"], self._precision():
                self._reward_gradient(noise)
        cut = plan.cut or bool(plan.renoise)
        active = plan.renoise or len(plan.active)
        if "replay" in only:
            found["replay"] = self._replay(1, cut, predict)
            with ledger.phase() as found["average"]:
                trained = [(name, p) for name, p in model.denoiser.named_parameters() if p.requires_grad]
                self.parallel.average_gradients(trained)
            self._drop_gradients()
        if "replay_next" in only and active > 1:
            two, one = self._replay(2, cut, predict), found.get("replay", Record())
            found["replay_next"] = replace(two, ops=two.ops - one.ops, collectives=two.collectives - one.collectives)
            self._drop_gradients()
        if "validation" in only and settings.validation_batch_size:
            pictures = settings.validation_batch_size
            pictures = min(self.case.decode_micro_batch_size or pictures, pictures)
            with ledger.phase() as found["validation"], self._precision(), torch.no_grad():
                model.decode(self._noise(pictures))
        return found

    def _replay(self, active: int, cut: bool, predict: Any) -> Record:
        """The backward pass through the last ``active`` steps of a trajectory in which all are active."""
        plan = Plan(active=tuple(range(active)), cut=cut)
        frozen = self._frozen(predict) if self.settings.kl_coeff else None
        with self._precision():
            trajectory = run_trajectory(predict, self.samplers[active], plan, self._noise, reference=frozen)
            surrogate = (trajectory.reads[0] * torch.ones_like(trajectory.reads[0])).sum()
            if trajectory.divergence is not None:
                surrogate = surrogate + self.settings.kl_coeff * trajectory.divergence
        with self.ledger.phase() as record:
            surrogate.backward()
        return record

    def _reward_gradient(self, read: Tensor) -> None:
        prompts = self.prompts

        samples = tuple(range(len(prompts)))

        def objective(images: Tensor, rows: slice) -> Tensor:
            with scoring_samples(SampleKeys(0, 0, samples[rows])):  # as in training: pictures are augmented
                return -self.reward.scores(images, prompts[rows])[0].sum() / len(prompts)

        reward_gradient([read], self.model.decode, objective, self.case.decode_micro_batch_size)

    def _frozen(self, predict: Any) -> Any:
        def frozen(latents: Tensor, timestep: Tensor) -> Tensor:
            with self.model.reference():
                return predict(latents, timestep)

        return frozen

    def _noise(self, batch_size: int | None = None) -> Tensor:
        shape = self.model.latent_shape(self.settings.height, self.settings.width)
        return torch.zeros(batch_size or self.case.micro_batch_size, *shape, dtype=self.model.latent_like.dtype)

    def _precision(self) -> Any:
        """What Lightning puts around a training step. Counted on the CPU's autocast; see :mod:`.kernels`."""
        _, compute, autocast = PRECISIONS[self.settings.precision]
        return torch.autocast("cpu", getattr(torch, compute)) if autocast else contextlib.nullcontext()

    def _drop_gradients(self) -> None:
        for parameter in self.model.denoiser.parameters():
            parameter.grad = None


def _build(settings: Settings, case: Case) -> _Subject:
    """As ``training.assemble`` does, from an architecture instead of weights."""
    notes: list[str] = []
    model = build_model(settings.spec)
    if settings.lora is not None:
        names = [name for name, _ in model.denoiser.named_modules()]
        asked = list(settings.lora["target_modules"])
        targets = [t for t in asked if any(name == t or name.endswith(f".{t}") for name in names)]
        if not targets:
            raise ConfigurationError(
                f"model.peft.lora_tuning.target_modules: {settings.spec.name} has no module named {', '.join(asked)}"
            )
        if len(targets) < len(asked):
            missing = ", ".join(t for t in asked if t not in targets)
            notes.append(f"{settings.spec.name} has no modules named {missing}: no adapters there")
        add_lora(
            model.denoiser, settings.lora["adapter_dim"], settings.lora["alpha"], settings.lora["dropout"], targets
        )
    else:
        model.denoiser.requires_grad_(True)
        model.keep_reference()
    if case.activation_checkpointing:
        model.denoiser.enable_gradient_checkpointing()
    reward = _reward(settings)
    weights, _, autocast = PRECISIONS[settings.precision]
    if weights != "float32" and not autocast:  # the reward has a precision of its own
        model.to(getattr(torch, weights))
    model.eval()
    model.denoiser.train()
    return _Subject(model, reward, notes)


def _reward(settings: Settings) -> Reward:
    from nemo_aligner_diffusion.rewards.build import PRECISIONS as REWARD_PRECISIONS
    from nemo_aligner_diffusion.rewards.build import augmented, build_reward

    if settings.reward is not None:
        given = settings.rm.get("model", {})
        reward = preset_reward(
            settings.reward,
            {
                "micro_batch_size": given.get("micro_batch_size"),
                "activation_checkpointing": bool(given.get("activation_checkpointing", False)),
            },
        )
        precision = str(settings.rm.get("trainer", {}).get("precision", 32))
        return augmented(reward.to(REWARD_PRECISIONS[precision]), settings.rm.get("augment", {}), "rm")
    with torch.device("cpu"):
        return build_reward(settings.rm)


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
