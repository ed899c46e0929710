"""The settings of the machine, the run directory and the watch over ranks. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.settings import (
    BOOL,
    PATH,
    TEXT,
    Kind,
    Settings,
    choice,
    integer,
    number,
    part,
    setting,
)

# As `trainer.precision` and `rm.trainer.precision` spell them, beside Lightning's full names.
_SHORT = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}
PRECISIONS = (*_SHORT, "32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true")


def lightning_precision(name: str) -> str:
    """Lightning's full name of a precision: NeMo's ``bf16`` and ``16`` mean mixed, and ``fp8`` is within layers."""
    return "bf16-mixed" if name == "fp8" else _SHORT.get(name, name)


@dataclass(frozen=True)
class MachineSettings(Settings):
    """The machine: processes, devices, precision."""

    section = "trainer"
    title = "Machine"

    num_nodes: int = setting(1, integer(1), "machines; integer >= 1")
    devices: int | tuple[int, ...] = setting(
        1, Kind("devices"), "processes (GPUs) a machine: integer >= 1, or a list of device indices"
    )
    accelerator: str = setting(
        "auto",
        choice("auto", "cpu", "gpu", "cuda", "mps"),
        "auto, cpu, gpu (cuda) or mps; auto takes a GPU where there is one",
    )
    precision: str = setting(
        "32",
        choice(*PRECISIONS, "fp8"),
        "32, 16, bf16, fp8 (model.fp8) or Lightning's names (bf16-mixed, bf16-true, 64-true …); "
        "16 and 64 for one process",
    )
    threads: int | None = setting(
        None,
        integer(1, nullable=True),
        "CPU threads a process; null: OMP_NUM_THREADS, else on a CPU the cores that others leave; integer >= 1",
    )
    log_every_n_steps: int = setting(
        1,
        integer(1),
        "optimizer steps between two lines to TensorBoard and W&B; integer >= 1; metrics.csv has every step",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.world_size > 1 and self.lightning_precision in ("16-mixed", "64-true"):
            scaled = self.lightning_precision == "16-mixed"
            why = "each would have a loss scale of its own" if scaled else "numbers of 64 bits are for one"
            raise ConfigurationError(
                f"{self.given('precision')} with {self.world_size} processes (trainer.devices × trainer.num_nodes): "
                f"{why}; expected 32 or bf16"
            )

    @property
    def devices_per_node(self) -> int:
        return self.devices if isinstance(self.devices, int) else len(self.devices)

    @property
    def lightning_devices(self) -> int | list[int]:
        return self.devices if isinstance(self.devices, int) else list(self.devices)

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return self.num_nodes * self.devices_per_node

    @property
    def lightning_precision(self) -> str:
        return lightning_precision(self.precision)

    @property
    def has_loss_scale(self) -> bool:
        return self.lightning_precision == "16-mixed"


@dataclass(frozen=True)
class RunDirectorySettings(Settings):
    """Where the run's files go, and how it resumes."""

    section = "exp_manager"

    explicit_log_dir: str | None = setting(
        None, PATH, "the run directory itself; path, null: <exp_dir>/<name>/<version>"
    )
    exp_dir: str | None = setting(None, PATH, "folder of run directories; path, null: nemo_experiments")
    name: str = setting("${name}", TEXT, "the run directory's name under exp_dir; any text")
    version: str | None = setting(
        None,
        Kind("text", nullable=True),
        "last part of the run directory; text, null: date and time, none with resume_if_exists",
    )
    resume_if_exists: bool = setting(False, BOOL, "go on from the run directory's last checkpoint; true or false")
    resume_ignore_no_checkpoint: bool = setting(
        True, BOOL, "with resume_if_exists: start anew where there is none (true), or stop with an error (false)"
    )


@dataclass(frozen=True)
class RequeueSettings(Settings):
    """When a Slurm job goes back into the queue."""

    section = "exp_manager"

    requeue_on_preemption: bool = setting(
        True,
        BOOL,
        "in a Slurm job with --requeue: after SIGUSR1 or SIGTERM save, and go on in another start; true or false",
    )
    requeue_on_max_time: bool = setting(
        False, BOOL, "in a Slurm job with --requeue: also after max_time_per_run; true or false"
    )


@dataclass(frozen=True)
class FaultToleranceSettings(Settings):
    """The watch over ranks: limits in seconds, NeMo's section of the same name."""

    section = "exp_manager.fault_tolerance"

    workload_check_interval: float = setting(1.0, number(above=0), "between heartbeats of a rank; > 0")
    silence_timeout: float = setting(
        120.0, number(above=0), "a rank whose heartbeats stop is taken for stopped or cut off after this; > 0"
    )
    initial_rank_heartbeat_timeout: float | None = setting(
        3600.0,
        number(above=0, nullable=True),
        "longest without progress in loading, and in a phase's first passage; > 0, null: no limit",
    )
    rank_heartbeat_timeout: float | None = setting(
        2700.0, number(above=0, nullable=True), "longest without progress later; > 0, null: no limit"
    )
    calculate_timeouts: bool = setting(True, BOOL, "later limits from what each phase has taken so far; true or false")
    safety_factor: float = setting(5.0, number(1), "so many times the longest so far; >= 1")
    minimum_heartbeat_timeout: float = setting(300.0, number(above=0), "but no less than this; > 0")

    def longest_pause(self, longest: float | None) -> float:
        """Seconds that a process may go without passing a mark, in a phase that has taken ``longest`` so far.

        Args:
            longest: None: the phase is new to it (loading, compiling, the first step or validation).
        """
        later = math.inf if self.rank_heartbeat_timeout is None else self.rank_heartbeat_timeout
        if longest is None:
            return math.inf if self.initial_rank_heartbeat_timeout is None else self.initial_rank_heartbeat_timeout
        if not self.calculate_timeouts:
            return later
        return min(max(self.safety_factor * longest, self.minimum_heartbeat_timeout), later)


@dataclass(frozen=True)
class StragglerSettings(Settings):
    """Ranks that work slower than the others: NeMo's section of the same name."""

    section = "exp_manager.straggler_detection_params"

    report_time_interval: float = setting(60.0, number(above=0), "seconds between comparisons; > 0")
    gpu_relative_perf_threshold: float = setting(
        0.7,
        Kind("float", low=0, high=1),
        "a rank is slow below this share of the ranks' median speed, twice in a row; 0 ... 1",
    )
    stop_if_detected: bool = setting(False, BOOL, "end the run then; true or false")


@dataclass(frozen=True)
class WatchSettings(Settings):
    """What is watched in a run of several processes."""

    section = "exp_manager"

    create_fault_tolerance_callback: bool = setting(
        True, BOOL, "runs of several processes: name a rank that dies or hangs, and end the run; true or false"
    )
    create_straggler_detection_callback: bool = setting(
        True, BOOL, "name a rank that works slower than the others; true or false; needs fault tolerance, too"
    )
    fault_tolerance: FaultToleranceSettings = part(FaultToleranceSettings)
    straggler_detection_params: StragglerSettings = part(StragglerSettings)
