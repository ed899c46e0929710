"""What a plan is made of: a run's settings for an architecture, and what of its layout is measured. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_aligner_diffusion.diffusion.settings import LoRASettings
from nemo_aligner_diffusion.parallel.layout import Layout
from nemo_aligner_diffusion.planner.presets import REWARDS, ModelSpec
from nemo_aligner_diffusion.rewards.settings import PRECISIONS
from nemo_aligner_diffusion.runtime.settings import lightning_precision
from nemo_aligner_diffusion.training.settings import RunSettings


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


def case_of(run: RunSettings) -> Case:
    """What ``run`` asks of a process."""
    model = run.model
    return Case(run.layout, model.micro_batch_size, model.activation_checkpointing, model.decode_micro_batch_size)


@dataclass(frozen=True)
class Settings:
    """What does not change from layout to layout.

    Attributes:
        spec: the architecture.
        reward: a preset of ``presets.REWARDS``; ``None``: what the run's ``rm`` section says is built.
        validation_batch_size: pictures at a time in validation; 0: none.
        on_gpu: plan for a CUDA device's kernels (:func:`.kernels.gpu_kernels`), not for this machine's.
    """

    run: RunSettings
    spec: ModelSpec
    reward: str | None
    validation_batch_size: int
    on_gpu: bool = True

    @property
    def lora(self) -> LoRASettings | None:
        """``None``: every weight of the denoiser is trained."""
        peft = self.run.model.peft
        return peft.lora_tuning if peft.is_lora else None

    @property
    def not_counted(self) -> list[str]:
        """``key = value`` of what is planned as if it were not there; float8 as bfloat16."""
        model, found = self.run.model, []
        if self.run.method().kind == "reward":
            approximate = ("rollout_cache", "rollout_guidance_interval", "rollout_compile", "replay_compile")
            found = [model.given(field) for field in approximate if getattr(model, field) is not None]
            found += [model.given("rollout_precision")] if model.rollout_precision == "fp8" else []
        return found + ([self.run.trainer.given("precision")] if self.run.trainer.precision == "fp8" else [])

    @property
    def precision(self) -> tuple[str, str]:
        """dtypes of the weights and of matrix products; autocast where these differ."""
        name = lightning_precision(self.run.trainer.precision)
        return "float32" if name.endswith("-mixed") else PRECISIONS[name], PRECISIONS[name]

    @property
    def autocast(self) -> bool:
        weights, products = self.precision
        return weights != products


def settings_from(run: RunSettings, spec: ModelSpec, reward: str | None = None, on_gpu: bool = True) -> Settings:
    """What ``run`` says, for the architecture ``spec``.

    Args:
        reward: a preset; ``recipe``: what the ``rm`` section builds; ``None``: the model's own preset where the recipe
            names no reward file of its own.
    """
    if reward is None and run.rm.get("name") == "clip" and not run.rm["model"].get("restore_from_path"):
        reward = spec.reward
    assert reward in (None, "recipe", *REWARDS)
    validated = run.model.validation_batch_size if run.loop.val_check_interval else 0
    return Settings(run, spec, None if reward == "recipe" else reward, validated, on_gpu)
