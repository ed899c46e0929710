"""What every method reads: the loss, and the draws. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_aligner_diffusion.algorithms.registry import methods
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.settings import Kind, Settings, choice, integer, number, setting


@dataclass(frozen=True)
class RewardTuningSettings(Settings):
    """The method and its loss; its own settings stand in its file."""

    section = "model"

    algorithm: str = setting(
        "draft+", Kind("text", choices=tuple(methods()), or_import_path=True), "the method; your own: module:name"
    )
    reward_scale: float = setting(
        1.0, number(above=0), "λ, weight of the reward in the loss −λ·mean(R) + kl_coeff·KL; > 0"
    )
    reward_margin: float | None = setting(
        None,
        number(nullable=True),
        "the reward counts only up to here: loss λ·mean(relu(margin − R)); in the reward's units, null: no cap",
    )
    kl_coeff: float = setting(
        0.0,
        number(0),
        "weight of the squared distance to the base model's predictions; >= 0, 0: not computed",
    )
    kl_space: str | None = setting(
        None,
        choice("epsilon", "prediction", "velocity", nullable=True),
        "what that distance compares: epsilon, prediction or velocity; null: epsilon, of flows velocity",
    )
    rollout_precision: str | None = setting(
        None,
        choice("same", "bf16", "fp8", "auto", nullable=True),
        "steps without gradient, by a copy: same, bf16, fp8 (products), auto (bf16 if fast); null: by the trained one",
    )
    rollout_compile: str | None = setting(
        None,
        choice("default", "reduce-overhead", "max-autotune", nullable=True),
        "torch.compile of that copy, and its mode; reduce-overhead: CUDA graphs; null: not compiled",
    )
    replay_compile: str | None = setting(
        None,
        choice("default", "max-autotune-no-cudagraphs", nullable=True),
        "torch.compile of the steps with gradient: default or max-autotune-no-cudagraphs; null: not compiled",
    )
    rollout_cache: str | None = setting(
        None,
        choice("first_block", "taylorseer", nullable=True),
        "approximate those steps by a cache of diffusers in that copy: first_block or taylorseer; null: exact",
    )
    rollout_cache_threshold: float = setting(
        0.05,
        number(0),
        "with first_block: how far, relatively, the first block may change until all are computed; >= 0",
    )
    rollout_cache_interval: int = setting(
        2, integer(1), "with taylorseer: one step of so many is computed, the others extrapolated; integer >= 1, 1: all"
    )
    rollout_guidance_interval: tuple[float, ...] | None = setting(
        None,
        Kind("floats", low=0, high=1, length=2, nullable=True),
        "guide those steps in this part of the trajectory alone: [0.2, 0.8], 0 noise, 1 the picture; null: everywhere",
    )
    kept_steps: int = setting(
        0,
        integer(0),
        "the last so many steps with gradient keep their activations, the others are made again: time against memory",
    )
    decode_micro_batch_size: int | None = setting(
        None,
        integer(1, nullable=True),
        "pictures decoded and scored at a time; integer >= 1, null: the micro batch; fewer need less memory",
    )
    seed: int = setting(
        1234,
        Kind("int", low=0, high=2**63 - 1),
        "every draw of the run follows from it: initial noise, prompts' order, plans; integer >= 0",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rollout_cache is not None and self.rollout_precision is None:
            raise ConfigurationError(
                f"{self.given('rollout_cache')} is of the copy that makes the steps without gradient, and "
                f"{self.given('rollout_precision')} says that there is none; expected rollout_precision=same, or bf16"
            )
        low, high = self.rollout_guidance_interval or (0, 1)
        if low > high:
            key = self.keys()["rollout_guidance_interval"]
            raise ConfigurationError(f"{key} = [{low}, {high}]: expected the smaller first, [{high}, {low}]")

    def unread(self) -> dict[str, str]:
        """See :meth:`.Settings.unread`."""
        of = {"rollout_cache_threshold": "first_block", "rollout_cache_interval": "taylorseer"}
        own = {field: f"model.rollout_cache is not {kind}" for field, kind in of.items() if self.rollout_cache != kind}
        return {**super().unread(), **own}
