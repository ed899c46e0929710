"""A plan: what was asked for, measured and estimated, and the layouts beside it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.planner.estimate import Machines
from nemo_aligner_diffusion.planner.gpus import GPU
from nemo_aligner_diffusion.planner.measure import Measurement, measure
from nemo_aligner_diffusion.planner.schedule import StepCounts, step_counts
from nemo_aligner_diffusion.planner.search import Candidate, Fit, candidate, fit, nothing_fits, search
from nemo_aligner_diffusion.planner.settings import Settings, case_of
from nemo_aligner_diffusion.runtime.messages import quiet_libraries


@dataclass
class Plan:
    """Everything that is printed.

    Attributes:
        asked: the layout of the configuration.
        layouts: what the search found, best first; empty without a search.
        words: overrides with which it fits, where it does not as asked; ``fitted`` is what becomes of it then.
        error: what to change, where nothing fits as asked.
    """

    settings: Settings
    counts: StepCounts
    machines: Machines
    measured: Measurement
    asked: Candidate
    layouts: list[Candidate] = field(default_factory=list)
    words: tuple[str, ...] = ()
    fitted: Candidate | None = None
    error: ConfigurationError | None = None


def make_plan(
    settings: Settings,
    gpu: GPU,
    layouts: bool,
    progress: Callable[[str], None],
    changed: Callable[[Sequence[str]], Settings] | None = None,
) -> Plan:
    """Measure and estimate what a run asks for; with ``layouts``, what fits beside it.

    Args:
        changed: the settings with further overrides, by which it is made to fit if it does not and no layouts are
            searched.

    Raises:
        ConfigurationError: the model cannot be laid out as asked.
    """
    quiet()
    run, spec = settings.run, settings.spec
    counts, case = step_counts(run, spec), case_of(run)
    machines = Machines(gpu, run.trainer.world_size, run.trainer.devices_per_node)
    progress(f"{spec.name}, tensor {case.layout.tensor} × data {case.layout.data}, {case.micro_batch_size} pictures")
    measured = measure(settings, case, counts.plan)
    plan = Plan(settings, counts, machines, measured, candidate(settings, case, measured, counts, machines))
    if layouts:
        plan.layouts = search(settings, counts, machines, progress, case)
    found = plan.layouts if layouts else [plan.asked]
    if any(item.fits for item in found):
        return plan
    if not layouts and changed is not None:
        best = fit(Fit((), settings, measured, plan.asked), changed, counts, machines, progress)
        plan.words, plan.fitted, settings, found = best.words, best.found, best.settings, [best.found]
    plan.error = nothing_fits(found, machines, settings, layouts, plan.words)
    if plan.fitted is not None and plan.fitted.fits:
        plan.error = ConfigurationError(
            f"as asked it needs {plan.asked.memory.needed / 1e9:.1f} GB of {gpu.memory_bytes / 1e9:.0f} GB; it fits, in "
            f"{plan.fitted.memory.needed / 1e9:.1f} GB and {plan.fitted.step.seconds:.3g} s a step, with: "
            f"{' '.join(plan.words)}"
        )
    return plan


def quiet() -> None:
    """Libraries' remarks about models that nobody will run."""
    warnings.filterwarnings("ignore")
    quiet_libraries()
    logging.getLogger("megatron").setLevel(logging.ERROR)
