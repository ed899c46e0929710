"""What of a configuration a plan depends on. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_aligner_diffusion.parallel.layout import Layout
from nemo_aligner_diffusion.planner.presets import REWARDS, ModelSpec

# trainer.precision -> (weights, what matrix products are computed in, autocast)
PRECISIONS: dict[str, tuple[str, str, bool]] = {
    "32": ("float32", "float32", False),
    "32-true": ("float32", "float32", False),
    "16": ("float32", "float16", True),
    "16-mixed": ("float32", "float16", True),
    "bf16": ("float32", "bfloat16", True),
    "bf16-mixed": ("float32", "bfloat16", True),
    "16-true": ("float16", "float16", False),
    "bf16-true": ("bfloat16", "bfloat16", False),
    "64": ("float64", "float64", False),
    "64-true": ("float64", "float64", False),
}


@dataclass(frozen=True)
class Case:
    """One thing to measure: what a process of a run does with one micro-batch.

    Attributes:
        layout: how many processes share the model, and how.
        micro_batch_size: pictures the process handles at once.
        activation_checkpointing: the denoiser's own, inside an active step (``model.activation_checkpointing``).
        decode_micro_batch_size: pictures decoded and scored at a time.
    """

    layout: Layout
    micro_batch_size: int
    activation_checkpointing: bool
    decode_micro_batch_size: int | None


@dataclass(frozen=True)
class Settings:
    """The rest: what does not change from layout to layout.

    Attributes:
        spec: the architecture.
        reward: a preset of ``presets.REWARDS``; ``None``: what the ``rm`` section says is built.
        rm: the ``rm`` section.
        precision: ``trainer.precision``.
        lora: ``model.peft.lora_tuning``; ``None``: every weight of the denoiser is trained.
        pipeline: the ``model.pipeline`` section: what is declared about the pipeline.
        guidance_scale: ``None``: the pipeline's default.
        attention: see :func:`.kernels.gpu_kernels`; ``cpu``: PyTorch's own choice on this machine.
        optimizer_states: tensors of a parameter's size that the optimizer keeps for it.
        validation_batch_size: pictures at a time in validation; 0: none.
    """

    spec: ModelSpec
    reward: str | None
    rm: dict[str, Any]
    precision: str
    lora: dict[str, Any] | None
    pipeline: dict[str, Any]
    guidance_scale: float | None
    kl_coeff: float
    height: int | None
    width: int | None
    optimizer: str
    optimizer_states: int
    ema_on_device: bool
    validation_batch_size: int
    attention: str = "auto"

    @property
    def fused_optimizer(self) -> bool:
        """Whether the optimizer makes no temporary of the parameters' size."""
        return self.optimizer == "fused_adam" and not PRECISIONS[self.precision][2]


def settings_from(cfg: DictConfig, spec: ModelSpec, reward: str | None = None, attention: str = "auto") -> Settings:
    """What ``cfg`` says, for the architecture ``spec``.

    Args:
        reward: a preset; ``recipe``: what the ``rm`` section builds; ``None``: the model's own preset where the recipe
            names no reward file of its own.
    """
    from nemo_aligner_diffusion.config.load import loop_section

    rm: dict[str, Any] = OmegaConf.to_container(cfg.rm, resolve=True)  # type: ignore[assignment]
    if reward is None and rm.get("name") == "clip" and not rm["model"].get("restore_from_path"):
        reward = spec.reward
    assert reward in (None, "recipe", *REWARDS)
    tuning = OmegaConf.to_container(cfg.model.peft.lora_tuning, resolve=True)
    pipeline: dict[str, Any] = OmegaConf.to_container(cfg.model.pipeline, resolve=True)  # type: ignore[assignment]
    ema = cfg.exp_manager.ema
    return Settings(
        spec=spec,
        reward=None if reward == "recipe" else reward,
        rm=rm,
        precision=str(cfg.trainer.precision),
        lora=tuning if cfg.model.peft.peft_scheme == "sdlora" else None,  # type: ignore[arg-type]
        pipeline={name: value for name, value in pipeline.items() if value is not None},
        guidance_scale=cfg.model.infer.unconditional_guidance_scale,
        kl_coeff=float(cfg.model.kl_coeff),
        height=cfg.model.infer.height,
        width=cfg.model.infer.width,
        optimizer=str(cfg.model.optim.name),
        optimizer_states=2 if cfg.model.optim.name != "sgd" else int(cfg.model.optim.get("momentum", 0) > 0),
        ema_on_device=bool(ema.enable) and not bool(ema.cpu_offload),
        validation_batch_size=max(int(cfg.model.micro_batch_size), 8) if loop_section(cfg).val_check_interval else 0,
        attention=attention,
    )
