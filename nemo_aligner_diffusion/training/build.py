"""From a checked configuration to the model, the reward and the Lightning module. Nothing here trains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

from nemo_aligner_diffusion.algorithms.base import Method, TrainingMethod
from nemo_aligner_diffusion.algorithms.policy.ddpo import DDPO
from nemo_aligner_diffusion.algorithms.policy.module import PolicyGradient
from nemo_aligner_diffusion.algorithms.preference.base import PreferenceMethod
from nemo_aligner_diffusion.algorithms.preference.module import PreferenceTuning
from nemo_aligner_diffusion.algorithms.reward_tuning import RewardTuning
from nemo_aligner_diffusion.algorithms.tuning import DenoiserTuning
from nemo_aligner_diffusion.diffusion.decoding import load_small_decoder, set_up_decoder
from nemo_aligner_diffusion.diffusion.generate import Sampling
from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.diffusion.lora import add_lora, continue_lora, has_lora
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.network.eight_bits import keep_in_8_bits, multiply_in_fp8
from nemo_aligner_diffusion.diffusion.network.offload import Offload
from nemo_aligner_diffusion.diffusion.network.rollout_network import cache_config
from nemo_aligner_diffusion.diffusion.settings import SamplingSettings
from nemo_aligner_diffusion.diffusion.taps import PromptCache
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.parallel.broadcast import load_once, on_every_process
from nemo_aligner_diffusion.parallel.module import OptimizerFactory
from nemo_aligner_diffusion.parallel.non_finite import NonFinitePolicy
from nemo_aligner_diffusion.parallel.parallelism import Parallelism
from nemo_aligner_diffusion.parallel.tensor.plans import check_tensor_parallel
from nemo_aligner_diffusion.rewards.base import Reward
from nemo_aligner_diffusion.runtime.settings import MachineSettings
from nemo_aligner_diffusion.training.export import export_notes
from nemo_aligner_diffusion.training.optimizers import OptimizerSettings, build_optimizer
from nemo_aligner_diffusion.training.schedules import build_schedule
from nemo_aligner_diffusion.training.settings import ModelSettings, RunSettings

log = logging.getLogger(__name__)

# model.frozen_precision; of 8 bits: what is no linear layer's
FROZEN_DTYPES = {None: None, "32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16, "fp8": torch.bfloat16}


def build_model(
    settings: RunSettings,
    device: str | torch.device = "cpu",
    phase: Callable[[str], AbstractContextManager[Any]] | None = None,
    pipe: Any = None,
) -> DiffusionModel:
    """The model on ``device`` with its trainable part marked: a LoRA (``sdlora``) or the whole denoiser (``none``).

    Its files are read once on each node, so this is a collective call where there is a process group; ``phase``: see
    :func:`.load_once`. ``pipe``: a pipeline that is tuned itself, in place of files.
    """
    section = settings.model
    declared = section.pipeline.declared()
    frozen = FROZEN_DTYPES[section.frozen_precision]
    if pipe is not None:
        model = DiffusionModel(pipe, **declared).to(device)
    else:
        model = load_once(
            lambda: load_model(
                section.from_pretrained,
                denoiser_path=section.denoiser_path,
                vae_path=section.vae_path,
                text_path=section.text_path,
                revision=section.revision,
                dtype=(frozen if section.peft.is_lora else None) or torch.float32,  # none of it is trained
                **declared,
            ),
            device,
            phase,
        )
    small = section.decoder.small_decoder
    set_up_decoder(
        model, section.decoder, None if small is None else load_once(lambda: load_small_decoder(small), device)
    )
    model.prompt_cache = PromptCache(section.cache_prompts) if section.cache_prompts else None
    model.notes = export_notes(settings, model, None if pipe is None else pipe.name_or_path or type(pipe).__name__)
    _prepare(section, model)
    if frozen is not None:
        convert_frozen(model, frozen)
    for _, parameter in model.trainable_parameters():  # of a pipeline in half precision; peft computes either way
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    if section.keeps_8_bits:
        assert section.frozen_precision is not None
        networks = {*model.networks.values(), model.reference_denoiser or model.denoiser}
        count = keep_in_8_bits(networks, section.frozen_precision)
        log.info("weights of %d frozen linear layers are kept in 8 bits (%s)", count, section.frozen_precision)
    if settings.trainer.precision == "fp8":
        count = multiply_in_fp8(model.denoiser, section.fp8, model.device, "trainer.precision=fp8")
        log.info("%d linear layers of the %s multiply in float8 (model.fp8)", count, model.trained)
    return model


def set_up_offload(names: Sequence[str], model: DiffusionModel, reward: Reward) -> None:
    """``model.offload``: see :class:`.Offload`.

    Raises:
        ConfigurationError: the pipeline has no such part.
    """
    parts = {**model.frozen_parts(), "reward": reward}
    for name in names:
        if not any(True for _ in parts.get(name, torch.nn.Identity()).parameters()):
            raise ConfigurationError(
                f"model.offload names {name}: there are no weights of it ({type(model.pipe).__name__}, reward "
                f"{reward.name}); leave it out"
            )
    if names and model.device.type == "cpu":
        log.info("model.offload: weights are in the host's memory already, as this run is on a CPU")
    model.offload = Offload({name: parts[name] for name in names})


def convert_frozen(model: DiffusionModel, dtype: torch.dtype) -> None:
    """Frozen weights in ``dtype``, but what a class of ``diffusers`` keeps in float32, and no buffers: rotary
    frequencies in bfloat16 are wrong ones."""
    kept: set[torch.nn.Parameter] = set()
    for network in model.modules():
        names = getattr(network, "_keep_in_fp32_modules_strict", None)  # transformers' other list is for float16 alone
        names = getattr(network, "_keep_in_fp32_modules", None) if names is None else names
        if names:
            kept |= {p for name, p in network.named_parameters() if set(names) & set(name.split("."))}
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point() and parameter not in kept:
            parameter.data = parameter.data.to(dtype)
    if not has_lora(model.denoiser):  # latents are in the text states' format: not in that of every weight
        model.denoiser.register_forward_pre_hook(partial(_given_in, torch.float32), with_kwargs=True)
        model.reference_denoiser.register_forward_pre_hook(partial(_given_in, dtype), with_kwargs=True)


def _given_in(dtype: torch.dtype, _: Any, args: Any, kwargs: Any) -> Any:
    """A network's arguments in ``dtype``; times, single numbers a sample, as they are."""

    def convert(value: Any) -> Any:
        wide = isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1
        return value.to(dtype) if wide else value

    return tree_map(convert, (args, kwargs))


def _prepare(section: ModelSettings, model: DiffusionModel) -> None:
    """Mark the trainable part of a loaded model and give its pipeline the solver that is asked for."""
    if section.tensor_model_parallel_size > 1:
        check_tensor_parallel(model.denoiser, section.tensor_model_parallel_size)
    model.set_scheduler(section.infer.sampler_type, section.infer.eta)
    if section.peft.is_lora:
        tuning = section.peft.lora_tuning
        path = section.peft.restore_from_path
        if path is not None:  # when a run is resumed, too: its checkpoint then brings the weights
            file, kind = Path(path).expanduser(), type(model.pipe)
            on_every_process(lambda: continue_lora(model.denoiser, file, tuning, kind))
        else:
            targets = list(tuning.target_modules or model.lora_targets)
            torch.manual_seed(section.seed)  # the adapter's start is part of the run
            assert tuning.adapter_dim is not None, "without a file there is a rank"
            add_lora(model.denoiser, tuning.adapter_dim, tuning.alpha, tuning.dropout, targets)
    else:
        model.denoiser.requires_grad_(True)
        model.keep_reference()  # validation shows the base model beside the tuned one, the KL term needs it
    if section.activation_checkpointing:
        model.denoiser.enable_gradient_checkpointing()


def optimizer_factory(settings: OptimizerSettings, machine: MachineSettings, max_steps: int) -> OptimizerFactory:
    """What makes optimizer and schedule of a model's parameters."""

    def build(parameters: list[tuple[str, torch.nn.Parameter]]) -> tuple[torch.optim.Optimizer, Any]:
        # under a loss scale Lightning leaves unscaling to a fused optimizer, after gradients are measured and clipped
        optimizer = build_optimizer(parameters, settings, allow_fused=not machine.has_loss_scale)
        return optimizer, build_schedule(optimizer, settings.sched, max_steps)

    return build


def build_sampling(infer: SamplingSettings) -> Sampling:
    return Sampling(infer.inference_steps, infer.unconditional_guidance_scale, infer.height, infer.width, infer.eta)


def rollout_precision(settings: RunSettings) -> str | None:
    """``model.rollout_precision``, in float64 without bfloat16.

    Raises:
        ConfigurationError: it asks for that by name.
    """
    asked = settings.model.rollout_precision
    if asked in ("bf16", "fp8", "auto") and settings.trainer.lightning_precision == "64-true":
        if asked != "auto":
            raise ConfigurationError(
                f"{settings.model.given('rollout_precision')} with {settings.trainer.given('precision')}: products of "
                "fewer bits have no place among numbers of 64 bits; expected same, or null"
            )
        return "same"
    return asked


def build_module(
    settings: RunSettings,
    model: DiffusionModel,
    reward: Reward,
    max_steps: int,
    guard: NonFinitePolicy | None = None,
    method: TrainingMethod | None = None,
) -> DenoiserTuning:
    """The Lightning module of ``method``'s kind, or of that of ``model.algorithm``."""
    section = settings.model
    method = method or settings.method()
    set_up_offload(section.offload or (), model, reward)
    common: dict[str, Any] = {
        "model": model,
        "reward": reward,
        "sampling": build_sampling(section.infer),
        "optimizer_factory": optimizer_factory(section.optim, settings.trainer, max_steps),
        "decode_micro_batch_size": section.decode_micro_batch_size,
        "seed": section.seed,
        "guard": guard,
        "parallel": Parallelism(settings.layout),
    }
    if isinstance(method, PreferenceMethod):
        return PreferenceTuning(method, section.preference, **common)
    if isinstance(method, DDPO):
        return PolicyGradient(method, section.micro_batch_size, **common)
    assert isinstance(method, Method), "no other kind yet"
    return RewardTuning(
        rollout_precision=rollout_precision(settings),
        rollout_options={
            "fp8": section.fp8,
            "compile_mode": section.rollout_compile,
            "cache": cache_config(
                section.rollout_cache, section.rollout_cache_threshold, section.rollout_cache_interval
            ),
        },
        replay_compile=section.replay_compile,
        rollout_guidance_interval=section.rollout_guidance_interval,
        kept_steps=section.steps_kept,
        plan_rule=method.plan,
        kl_coeff=section.kl_coeff,
        kl_space=section.kl_space,
        reward_scale=section.reward_scale,
        reward_margin=section.reward_margin,
        **common,
    )
