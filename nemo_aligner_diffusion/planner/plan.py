"""A plan: what was asked for, measured and estimated, and the layouts beside it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.planner.estimate import Machines
from nemo_aligner_diffusion.planner.gpus import gpu_named
from nemo_aligner_diffusion.planner.measure import Measurement, measure
from nemo_aligner_diffusion.planner.options import Options
from nemo_aligner_diffusion.planner.presets import ModelSpec
from nemo_aligner_diffusion.planner.schedule import StepCounts, step_counts
from nemo_aligner_diffusion.planner.search import Candidate, candidate, nothing_fits, search
from nemo_aligner_diffusion.planner.settings import Case, Settings, settings_from
from nemo_aligner_diffusion.runtime.messages import quiet_libraries
from nemo_aligner_diffusion.training.settings import RunSettings


@dataclass
class Plan:
    """Everything that is printed.

    Attributes:
        asked: the layout of the configuration.
        other_replay: peak of the replay with the denoiser's activation checkpointing the other way round.
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


def make_plan(run: RunSettings, spec: ModelSpec, options: Options, progress: Callable[[str], None]) -> Plan:
    """Measure and estimate what ``run`` asks for.

    Raises:
        ConfigurationError: the model cannot be laid out as asked.
    """
    quiet()
    settings = settings_from(run, spec, options.reward, options.attention)
    counts, case = step_counts(run, spec), case_of(run)
    devices, batch = run.trainer.devices_per_node, run.model.global_batch_size
    machines = Machines(gpu_named(options.gpu), devices * run.trainer.num_nodes, options.gpus_per_node or devices)
    progress(f"{spec.name}, tensor {case.layout.tensor} × data {case.layout.data}, {case.micro_batch_size} pictures")
    measured = measure(settings, case, counts.plan)
    asked = candidate(settings, case, measured, counts, batch, machines)
    other = replace(case, activation_checkpointing=not case.activation_checkpointing)
    progress(f"the same {'without' if case.activation_checkpointing else 'with'} activation checkpointing")
    deepest = "replay_next" if "replay_next" in measured.phases else "replay"  # two active steps where there are two
    other_replay = measure(settings, other, counts.plan, only=(deepest,)).phases[deepest].peak
    plan = Plan(settings, run.model.algorithm, counts, machines, batch, measured, asked, other_replay)
    if options.layouts:
        plan.layouts = search(
            settings, counts, batch, machines, options.tensor_sizes, options.sharding, progress, case
        )  # fmt: skip
    if not any(item.fits for item in (plan.layouts if options.layouts else [asked])):
        plan.error = nothing_fits(plan.layouts if options.layouts else [asked], machines, settings, options.layouts)
    return plan


def case_of(run: RunSettings) -> Case:
    """What ``run`` asks of a process."""
    model = run.model
    return Case(run.layout, model.micro_batch_size, model.activation_checkpointing, model.decode_micro_batch_size)


def quiet() -> None:
    """Libraries' remarks about models that nobody will run."""
    warnings.filterwarnings("ignore")
    quiet_libraries()
    logging.getLogger("megatron").setLevel(logging.ERROR)
