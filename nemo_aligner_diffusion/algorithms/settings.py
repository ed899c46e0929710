"""What every method reads: the loss, and the draws. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_aligner_diffusion.algorithms.registry import methods
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
        choice("same", "bf16", "auto", nullable=True),
        "steps without gradient, by a copy: same, bf16 (products), auto (bf16 if fast); null: by the trained network",
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
