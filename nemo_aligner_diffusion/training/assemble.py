"""From a checked configuration to the model, the reward and the Lightning module. Nothing here trains."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from nemo_aligner_diffusion.algorithms.registry import method_of
from nemo_aligner_diffusion.algorithms.reward_tuning import RewardTuning
from nemo_aligner_diffusion.diffusion.checkpoints import component_config
from nemo_aligner_diffusion.diffusion.families.stable_diffusion import StableDiffusion
from nemo_aligner_diffusion.diffusion.lora import add_lora
from nemo_aligner_diffusion.diffusion.sampler import Sampler
from nemo_aligner_diffusion.embedded_assets import embedded_model_path
from nemo_aligner_diffusion.parallel.broadcast import load_once
from nemo_aligner_diffusion.parallel.layout import Layout
from nemo_aligner_diffusion.parallel.module import NonFiniteGuard
from nemo_aligner_diffusion.parallel.parallelism import Parallelism
from nemo_aligner_diffusion.parallel.tensor_plans import check_tensor_parallel
from nemo_aligner_diffusion.rewards.base import Reward
from nemo_aligner_diffusion.training.config import derived
from nemo_aligner_diffusion.training.optimizers import build_optimizer
from nemo_aligner_diffusion.training.schedules import build_schedule
from nemo_aligner_diffusion.training.schema_checks import precision_name


def build_model(
    cfg: DictConfig,
    device: str | torch.device = "cpu",
    phase: Callable[[str], AbstractContextManager[Any]] | None = None,
) -> StableDiffusion:
    """The model on ``device`` with its trainable part marked: a LoRA (``sdlora``) or the whole denoiser (``none``).

    Its files are read once on each node, so this is a collective call where there is a process group; ``phase``: see
    :func:`.load_once`.
    """
    _check_tensor_parallel(cfg)
    model = load_once(
        lambda: StableDiffusion.from_pretrained(
            cfg.model.from_pretrained or embedded_model_path(),
            unet_path=cfg.model.unet_config.from_pretrained,
            vae_path=cfg.model.first_stage_config.from_pretrained,
        ),
        device,
        phase,
    )
    if cfg.model.peft.peft_scheme == "sdlora":
        tuning = cfg.model.peft.lora_tuning
        torch.manual_seed(cfg.model.seed)  # the adapter's start is part of the run
        add_lora(model.denoiser, tuning.adapter_dim, tuning.alpha, tuning.dropout, list(tuning.target_modules))
    else:
        model.denoiser.requires_grad_(True)
        model.keep_reference()  # validation shows the base model beside the tuned one, the KL term needs it
    if cfg.model.activation_checkpointing:
        model.denoiser.enable_gradient_checkpointing()
    return model


def _check_tensor_parallel(cfg: DictConfig) -> None:
    size, weights = cfg.model.tensor_model_parallel_size, cfg.model.unet_config.from_pretrained
    if size > 1:
        pipeline = Path(cfg.model.from_pretrained or embedded_model_path()).expanduser()
        config = (component_config(weights, "unet") if weights else None) or component_config(pipeline / "unet", "unet")
        if config is not None:  # else loading says what is missing
            check_tensor_parallel({"_class_name": "UNet2DConditionModel", **config}, size)


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


def build_sampler(cfg: DictConfig, model: StableDiffusion) -> Sampler:
    infer = cfg.model.infer
    return Sampler(model.scheduler_config, infer.sampler_type, infer.inference_steps, infer.eta)


def build_module(
    cfg: DictConfig, model: StableDiffusion, reward: Reward, max_steps: int, guard: NonFiniteGuard | None = None
) -> RewardTuning:
    """The Lightning module, with the rule of ``model.algorithm``."""
    optim: dict[str, Any] = OmegaConf.to_container(cfg.model.optim, resolve=True)  # type: ignore[assignment]

    def optimizer_factory(parameters: list[tuple[str, torch.nn.Parameter]]) -> tuple[torch.optim.Optimizer, Any]:
        # under a loss scale Lightning leaves unscaling to a fused optimizer, after gradients are measured and clipped
        optimizer = build_optimizer(parameters, optim, allow_fused=precision_name(cfg) != "16-mixed")
        return optimizer, build_schedule(optimizer, optim.get("sched"), max_steps)

    return RewardTuning(
        model,
        reward,
        build_sampler(cfg, model),
        method_of(cfg).plan,
        optimizer_factory,
        guidance_scale=cfg.model.infer.unconditional_guidance_scale,
        kl_coeff=cfg.model.kl_coeff,
        reward_scale=cfg.model.reward_scale,
        reward_margin=cfg.model.reward_margin,
        height=cfg.model.infer.height,
        width=cfg.model.infer.width,
        decode_micro_batch_size=cfg.model.decode_micro_batch_size,
        seed=cfg.model.seed,
        guard=guard,
        parallel=Parallelism(build_layout(cfg)),
    )
