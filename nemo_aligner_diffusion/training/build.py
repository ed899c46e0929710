"""From a checked configuration to the model, the reward and the Lightning module. Nothing here trains."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from nemo_aligner_diffusion.algorithms.base import Method
from nemo_aligner_diffusion.algorithms.registry import method_of
from nemo_aligner_diffusion.algorithms.reward_tuning import RewardTuning
from nemo_aligner_diffusion.config.checks import precision_name
from nemo_aligner_diffusion.config.load import derived
from nemo_aligner_diffusion.diffusion.generate import Sampling
from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.diffusion.lora import add_lora
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.embedded_assets import embedded_model_path
from nemo_aligner_diffusion.parallel.broadcast import load_once
from nemo_aligner_diffusion.parallel.layout import Layout
from nemo_aligner_diffusion.parallel.module import NonFiniteGuard
from nemo_aligner_diffusion.parallel.parallelism import Parallelism
from nemo_aligner_diffusion.parallel.tensor.plans import check_tensor_parallel
from nemo_aligner_diffusion.rewards.base import Reward
from nemo_aligner_diffusion.training.optimizers import build_optimizer
from nemo_aligner_diffusion.training.schedules import build_schedule


def build_model(
    cfg: DictConfig,
    device: str | torch.device = "cpu",
    phase: Callable[[str], AbstractContextManager[Any]] | None = None,
    pipe: Any = None,
) -> DiffusionModel:
    """The model on ``device`` with its trainable part marked: a LoRA (``sdlora``) or the whole denoiser (``none``).

    Its files are read once on each node, so this is a collective call where there is a process group; ``phase``: see
    :func:`.load_once`. ``pipe``: a pipeline that is tuned itself, in place of files.
    """
    declared: dict[str, Any] = {
        "trained": cfg.model.pipeline.trained,
        "stateless": list(cfg.model.pipeline.stateless or ()),
        "arguments": _plain(cfg.model.pipeline.arguments),
    }
    if pipe is not None:
        model = DiffusionModel(pipe, **declared).to(device)
    else:
        model = load_once(
            lambda: load_model(
                cfg.model.from_pretrained or embedded_model_path(),
                denoiser_path=cfg.model.unet_config.from_pretrained,
                vae_path=cfg.model.first_stage_config.from_pretrained,
                **declared,
            ),
            device,
            phase,
        )
    _prepare(cfg, model)
    for _, parameter in model.trainable_parameters():  # of a pipeline in half precision; peft computes either way
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    return model


def _prepare(cfg: DictConfig, model: DiffusionModel) -> None:
    """Mark the trainable part of a loaded model and give its pipeline the solver that is asked for."""
    if cfg.model.tensor_model_parallel_size > 1:
        config = {"_class_name": type(model.denoiser).__name__, **model.denoiser.config}
        check_tensor_parallel(config, cfg.model.tensor_model_parallel_size)
    model.set_scheduler(cfg.model.infer.sampler_type, cfg.model.infer.eta)
    if cfg.model.peft.peft_scheme == "sdlora":
        tuning = cfg.model.peft.lora_tuning
        targets = list(tuning.target_modules or model.lora_targets)
        torch.manual_seed(cfg.model.seed)  # the adapter's start is part of the run
        add_lora(model.denoiser, tuning.adapter_dim, tuning.alpha, tuning.dropout, targets)
    else:
        model.denoiser.requires_grad_(True)
        model.keep_reference()  # validation shows the base model beside the tuned one, the KL term needs it
    if cfg.model.activation_checkpointing:
        model.denoiser.enable_gradient_checkpointing()


def build_layout(cfg: DictConfig) -> Layout:
    """Processes and what each is for, from ``trainer`` and ``model``."""
    return Layout(
        data=derived(cfg).data_parallel_size,
        tensor=cfg.model.tensor_model_parallel_size,
        fsdp=cfg.model.fsdp,
        reshard_after_forward=cfg.model.fsdp_sharding_strategy == "full",
        sharded_frozen=tuple(cfg.model.fsdp_frozen or ()),
        cut_reward=cfg.model.tensor_parallel_reward,
    )


def build_sampling(cfg: DictConfig) -> Sampling:
    infer = cfg.model.infer
    return Sampling(infer.inference_steps, infer.unconditional_guidance_scale, infer.height, infer.width, infer.eta)


def build_module(
    cfg: DictConfig,
    model: DiffusionModel,
    reward: Reward,
    max_steps: int,
    guard: NonFiniteGuard | None = None,
    method: Method | None = None,
) -> RewardTuning:
    """The Lightning module, with the rule of ``method``, or of ``model.algorithm``."""
    optim = _plain(cfg.model.optim)

    def optimizer_factory(parameters: list[tuple[str, torch.nn.Parameter]]) -> tuple[torch.optim.Optimizer, Any]:
        # under a loss scale Lightning leaves unscaling to a fused optimizer, after gradients are measured and clipped
        optimizer = build_optimizer(parameters, optim, allow_fused=precision_name(cfg) != "16-mixed")
        return optimizer, build_schedule(optimizer, optim.get("sched"), max_steps)

    return RewardTuning(
        model,
        reward,
        build_sampling(cfg),
        (method or method_of(cfg)).plan,
        optimizer_factory,
        kl_coeff=cfg.model.kl_coeff,
        kl_space=cfg.model.kl_space,
        reward_scale=cfg.model.reward_scale,
        reward_margin=cfg.model.reward_margin,
        decode_micro_batch_size=cfg.model.decode_micro_batch_size,
        seed=cfg.model.seed,
        guard=guard,
        parallel=Parallelism(build_layout(cfg)),
    )


def _plain(section: Any) -> dict[str, Any]:
    return OmegaConf.to_container(section, resolve=True)  # type: ignore[return-value]
