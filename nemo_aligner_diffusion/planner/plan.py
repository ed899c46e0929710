"""A plan: what was asked for, measured and estimated, and the layouts beside it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.planner.estimate import Assumptions
from nemo_aligner_diffusion.planner.gpus import gpu_named
from nemo_aligner_diffusion.planner.measure import Measurement, measure
from nemo_aligner_diffusion.planner.options import Options
from nemo_aligner_diffusion.planner.presets import ModelSpec
from nemo_aligner_diffusion.planner.schedule import StepCounts, step_counts
from nemo_aligner_diffusion.planner.search import Candidate, Machines, candidate, nothing_fits, search
from nemo_aligner_diffusion.planner.settings import Case, Settings, settings_from
from nemo_aligner_diffusion.runtime.messages import quiet_libraries
from nemo_aligner_diffusion.training.settings import RunSettings


@dataclass
class Plan:
    """Everything that is printed.

    Attributes:
        asked: the layout of the configuration.
        checkpointed: phases of the same with the denoiser's activation checkpointing the other way round.
        layouts: what the search found, best first; empty without a search.
        error: what to change, where nothing fits.
    """

    settings: Settings
    algorithm: str
    counts: StepCounts
    machines: Machines
    global_batch_size: int
    measured: Measurement
    asked: Candidate
    other_replay: int
    layouts: list[Candidate] = field(default_factory=list)
    error: ConfigurationError | None = None
    notes: list[str] = field(default_factory=list)


def make_plan(run: RunSettings, spec: ModelSpec, options: Options, progress: Callable[[str], None]) -> Plan:
    """Measure and estimate what ``run`` asks for.

    Raises:
        ConfigurationError: the model cannot be laid out as asked.
    """
    quiet()
    settings = settings_from(run, spec, options.reward, options.attention)
    counts = step_counts(run, spec)
    devices = run.trainer.devices_per_node
    machines = Machines(
        gpu_named(options.gpu), devices * run.trainer.num_nodes, options.gpus_per_node or devices, Assumptions()
    )
    model = run.model
    case = Case(run.layout, model.micro_batch_size, model.activation_checkpointing, model.decode_micro_batch_size)
    progress(f"{spec.name}, tensor {case.layout.tensor} × data {case.layout.data}, "
             f"{case.micro_batch_size} pictures")  # fmt: skip
    measured = measure(settings, case, counts.plan)
    asked = candidate(settings, case, measured, counts, model.global_batch_size, machines)
    other = replace(case, activation_checkpointing=not case.activation_checkpointing)
    progress(f"the same {'without' if case.activation_checkpointing else 'with'} activation checkpointing")
    flipped = measure(settings, other, counts.plan, only=(_deepest(measured),)).phases
    other_replay = flipped[_deepest(measured)].peak
    plan = Plan(
        settings,
        model.algorithm,
        counts,
        machines,
        model.global_batch_size,
        measured,
        asked,
        other_replay,
        notes=list(measured.notes),
    )
    if options.layouts:
        plan.layouts = search(
            settings,
            counts,
            model.global_batch_size,
            machines,
            options.tensor_sizes,
            options.sharding,
            progress,
            case,
        )
        if not any(item.fits for item in plan.layouts):
            plan.error = nothing_fits(plan.layouts, machines, settings, searched=True)
    elif not asked.fits:
        plan.error = nothing_fits([asked], machines, settings, searched=False)
    return plan


def _deepest(measured: Measurement) -> str:
    """The phase that holds the most of a replay: two active steps where there are two."""
    return "replay_next" if "replay_next" in measured.phases else "replay"


def quiet() -> None:
    """Libraries' remarks about models that nobody will run."""
    warnings.filterwarnings("ignore")
    quiet_libraries()
    logging.getLogger("megatron").setLevel(logging.ERROR)
