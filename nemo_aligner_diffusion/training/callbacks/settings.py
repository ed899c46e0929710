"""The settings of what hangs on Lightning's hooks. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.settings import BOOL, FRACTION, FREE, Kind, Settings, integer, setting


@dataclass(frozen=True)
class EMASettings(Settings):
    """Exponential moving average of the trained weights (NeMo's callback)."""

    section = "exp_manager.ema"

    enable: bool = setting(False, BOOL, "keep it, and validate and export with it; true or false")
    decay: float = setting(
        0.99, FRACTION, "share of the average kept at each update; in [0, 1); NeMo's 0.9999 suits 10,000s of steps"
    )
    every_n_steps: int = setting(1, integer(1), "optimizer steps between two updates; integer >= 1")
    validate_original_weights: bool = setting(False, BOOL, "validate with the raw weights all the same; true or false")
    cpu_offload: bool = setting(False, BOOL, "keep the average in host memory; true or false")


@dataclass(frozen=True)
class LoggerSettings(Settings):
    """Who else hears of the run's figures."""

    section = "exp_manager"

    create_wandb_logger: bool = setting(
        False, BOOL, "also log to Weights & Biases; true or false; needs the extra `wandb`"
    )
    wandb_logger_kwargs: dict[str, Any] = setting(
        {}, FREE, "any argument of Lightning's WandbLogger: project, name, group, resume …"
    )
    create_tensorboard_logger: bool = setting(
        True, BOOL, "also log to TensorBoard; true or false; metrics.csv is written always"
    )


@dataclass(frozen=True)
class TimeLimitSettings(Settings):
    """How long the run may take."""

    section = "exp_manager"

    max_time_per_run: str | None = setting(
        None,
        Kind("duration", nullable=True),
        "stop cleanly after days:hours:minutes:seconds, such as 00:03:45:00; null: no limit",
    )


@dataclass(frozen=True)
class CheckpointSettings(Settings):
    """Which checkpoints are kept, and how they are written; when: trainer.<recipe>.save_interval."""

    section = "exp_manager.checkpoint_callback_params"

    keep_last_n: int | None = setting(
        2, integer(1, nullable=True), "newest checkpoints that are kept; integer >= 1, null: all"
    )
    async_save: bool = setting(
        False, BOOL, "go on training while a checkpoint is written (from a copy in host memory); true or false"
    )


@dataclass(frozen=True)
class BestCheckpointSettings(CheckpointSettings):
    """Checkpoints of a run whose best ones are worth keeping."""

    save_top_k: int = setting(
        0,
        integer(-1),
        "kept besides: those of the highest validation reward; integer >= 0, -1: keep all",
    )


@dataclass(frozen=True)
class ProfileSettings(Settings):
    """Which optimizer steps are traced, and by what: docs/performance.md, "Reading a trace"."""

    section = "model.profile"

    enable: bool = setting(
        False, BOOL, "trace steps by torch's profiler, into the run's folder profile/; true or false"
    )
    nsys: bool = setting(
        False, BOOL, "mark them for Nsight Systems instead (NeMo's nsys_profile); without CUDA as enable; true or false"
    )
    start_step: int = setting(3, integer(1), "first optimizer step that is traced, as metrics.csv counts; integer >= 1")
    end_step: int = setting(3, integer(1), "last one that is; integer >= start_step")
    ranks: tuple[int, ...] = setting((0,), Kind("ints", low=0), "processes that trace, each for itself; integers >= 0")
    shapes: bool = setting(False, BOOL, "with the shapes of operators' inputs; true or false")
    memory: bool = setting(False, BOOL, "with what operators allocate and free; true or false")

    @property
    def is_on(self) -> bool:
        return self.enable or self.nsys

    def check(self, max_steps: int, processes: int) -> None:
        """Raise a ConfigurationError where nothing would be traced."""
        if self.is_on and not (self.start_step <= min(self.end_step, max_steps) and max(self.ranks) < processes):
            raise ConfigurationError(
                f"{self.given('start_step')}, {self.given('end_step')}, {self.given('ranks')} in a run of {max_steps} "
                f"steps on {processes} process(es): expected start_step <= end_step, start_step <= {max_steps}, "
                f"ranks < {processes}"
            )


@dataclass(frozen=True)
class NonFiniteSettings(Settings):
    """What to do about a reward or gradient that is NaN or infinite."""

    section = "model.nan_policy"

    max_consecutive: int = setting(
        3,
        integer(0),
        "steps in a row that are skipped before the run stops with an error; integer >= 0, 0: stop at once",
    )
