"""What of a configuration a plan depends on. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_aligner_diffusion.diffusion.settings import LoRASettings
from nemo_aligner_diffusion.parallel.layout import Layout
from nemo_aligner_diffusion.planner.presets import REWARDS, ModelSpec
from nemo_aligner_diffusion.runtime.settings import lightning_precision
from nemo_aligner_diffusion.training.settings import RunSettings

# Lightning's name of trainer.precision -> (weights, what matrix products are computed in, autocast)
PRECISIONS: dict[str, tuple[str, str, bool]] = {
    "32-true": ("float32", "float32", False),
    "16-mixed": ("float32", "float16", True),
    "bf16-mixed": ("float32", "bfloat16", True),
    "16-true": ("float16", "float16", False),
    "bf16-true": ("bfloat16", "bfloat16", False),
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
    lora: LoRASettings | None
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
    def arithmetic(self) -> tuple[str, str, bool]:
        """Of :data:`PRECISIONS`."""
        return PRECISIONS[lightning_precision(self.precision)]

    @property
    def fused_optimizer(self) -> bool:
        """Whether the optimizer makes no temporary of the parameters' size."""
        return self.optimizer == "fused_adam" and not self.arithmetic[2]


def settings_from(run: RunSettings, spec: ModelSpec, reward: str | None = None, attention: str = "auto") -> Settings:
    """What ``run`` says, for the architecture ``spec``.

    Args:
        reward: a preset; ``recipe``: what the ``rm`` section builds; ``None``: the model's own preset where the recipe
            names no reward file of its own.
    """
    if reward is None and run.rm.get("name") == "clip" and not run.rm["model"].get("restore_from_path"):
        reward = spec.reward
    assert reward in (None, "recipe", *REWARDS)
    model, ema = run.model, run.exp_manager.ema
    return Settings(
        spec=spec,
        reward=None if reward == "recipe" else reward,
        rm=run.rm,
        precision=run.trainer.precision,
        lora=model.peft.lora_tuning if model.peft.is_lora else None,
        pipeline=model.pipeline.declared(),
        guidance_scale=model.infer.unconditional_guidance_scale,
        kl_coeff=model.kl_coeff,
        height=model.infer.height,
        width=model.infer.width,
        optimizer=model.optim.name,
        optimizer_states=model.optim.state_tensors,
        ema_on_device=ema.enable and not ema.cpu_offload,
        validation_batch_size=model.validation_batch_size if run.loop.val_check_interval else 0,
        attention=attention,
    )
