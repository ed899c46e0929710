"""A plan as JSON, and as tables on the screen."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from nemo_aligner_diffusion.planner.estimate import LEARNING
from nemo_aligner_diffusion.planner.plan import Plan
from nemo_aligner_diffusion.planner.search import Candidate

SHOWN = 12  # layouts
WIDTH_OF_A_FILE = 120  # columns, where the output is no terminal: a log wraps nothing
SENT = {
    "tensor_parallel": "sums over the tensor group",
    "fsdp_gather": "gathering sharded weights",
    "fsdp_scatter": "scattering gradients",
    "gradients": "averaging gradients",
}


def as_json(plan: Plan) -> dict[str, Any]:
    """Bytes, floating-point operations and seconds, nothing rounded."""
    asked, counts, run = plan.asked, plan.counts, plan.settings.run
    return {
        "model": plan.settings.spec.name,
        "parameters": plan.measured.parameters,
        "trained_parameters_per_rank": plan.measured.trained_elements,
        "algorithm": run.model.algorithm,
        "precision": run.trainer.precision,
        "gpu": plan.machines.gpu.name,
        "gpus": plan.machines.world,
        "per_micro_batch": {
            "network_calls": counts.network_calls,
            "reference_calls": counts.references,
            "replayed_steps": counts.replays,
            "reads": counts.reads,
            **({"encodings": counts.encodings} if counts.kind == "preference" else {}),
        },
        "bytes_per_rank": {
            "parts": asked.memory.parts,
            "phases": asked.memory.phases,
            "peak": asked.memory.peak,
            "peak_phase": asked.memory.peak_phase,
            "needed_on_device": asked.memory.needed,
            "device": plan.machines.gpu.memory_bytes,
        },
        "bytes_sent_per_rank_and_step": asked.step.sent,
        "flops_per_step_and_rank": asked.step.flops,
        "seconds": {name: time.total for name, time in asked.step.times.items()},
        **_layout(plan, asked),
        "layouts": [_layout(plan, item) for item in plan.layouts],
        "not_counted": plan.settings.not_counted,
        "fits_with": list(plan.words) if plan.fitted is not None and plan.fitted.fits else None,
    }


def _layout(plan: Plan, item: Candidate) -> dict[str, Any]:
    return {
        "tensor": item.case.layout.tensor,
        "data": item.case.layout.data,
        "fsdp": item.case.layout.fsdp,
        "micro_batch_size": item.case.micro_batch_size,
        "accumulation": item.accumulation,
        "activation_checkpointing": item.case.activation_checkpointing,
        "decode_micro_batch_size": item.case.decode_micro_batch_size,
        "fits": item.fits,
        "peak_bytes": item.memory.peak,
        "peak_phase": item.memory.peak_phase,
        "seconds_per_step": item.step.seconds,
        f"{_unit(plan)}_per_second": _per_second(plan, item),
        "bottleneck": item.step.bottleneck[0],
    }


def _unit(plan: Plan) -> str:
    return "pairs" if plan.counts.kind == "preference" else "pictures"


def _per_second(plan: Plan, item: Candidate) -> float:
    """Of further passes over the same pictures none is new."""
    return plan.settings.run.model.global_batch_size / item.step.seconds / plan.counts.passes


def show(plan: Plan) -> None:
    """Print it."""
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH_OF_A_FILE
    asked, layout, run = plan.asked, plan.asked.case.layout, plan.settings.run
    batch = run.model.global_batch_size
    console.print(
        f"[bold]{plan.settings.spec.name}[/bold], {plan.measured.parameters / 1e6:,.0f} M parameters in the denoiser, "
        f"{plan.measured.trained_elements / 1e6:,.1f} M trained on a rank; {run.model.algorithm}, precision "
        f"{run.trainer.precision}"
    )
    console.print(
        f"{layout.world_size} × {plan.machines.gpu.name}: tensor {layout.tensor} × data {layout.data}"
        f"{', sharded (FSDP2)' if layout.fsdp else ''}; micro-batch {asked.case.micro_batch_size} × accumulation "
        f"{asked.accumulation}, global batch {batch}"
    )
    console.print(_memory_table(plan))
    console.print(_time_table(plan))
    if asked.step.sent:
        sent = _table("sent by a rank in an optimizer step", "what", ">bytes")
        for name, size in asked.step.sent.items():
            sent.add_row(SENT[name], human(size))
        console.print(sent)
    name, share = asked.step.bottleneck
    console.print(
        f"estimated {asked.step.seconds:.3g} s a step, {_per_second(plan, asked):.3g} {_unit(plan)}/s; most of it "
        f"({share:.0%}): {name}"
    )
    if plan.settings.not_counted:
        console.print(f"not counted: {', '.join(plan.settings.not_counted)}; planned as without it, float8 as bfloat16")
    if plan.layouts:
        console.print(_layouts_table(plan))


def _table(title: str, *columns: str) -> Table:
    """Columns whose names begin with ``>`` are ranged right."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left")
    return table


def _memory_table(plan: Plan) -> Table:
    gpu, shown = plan.machines.gpu, [plan.asked]
    if plan.fitted is not None and plan.words:
        shown.append(plan.fitted)
    both = [item.memory for item in shown]
    table = _table("memory of a rank", "what", *(">as asked", ">with what helps") if len(shown) > 1 else (">bytes",))
    for name in both[0].parts:
        table.add_row(name, *(human(held.parts[name]) for held in both))
    table.add_section()
    for name in both[0].phases:
        peaks = [human(held.phases[name]) + (" [bold]peak[/bold]" * (name == held.peak_phase)) for held in both]
        table.add_row(f"in {name}", *peaks)
    table.add_section()
    beside = "interpreter, libraries" if gpu.is_cpu else "context"
    table.add_row(f"needed, {beside} and fragmentation included", *(human(held.needed) for held in both))
    verdicts = ["[green]fits[/green]" if item.fits else "[red]does not fit[/red]" for item in shown]
    table.add_row(f"{gpu.name}: {human(gpu.memory_bytes)}{' free' if gpu.is_cpu else ''}", *verdicts)
    return table


def _time_table(plan: Plan) -> Table:
    step, counts = plan.asked.step, plan.counts
    calls = {
        "encode": counts.encodings,
        "rollout": counts.network_calls,
        "reference": counts.references,
        "decode and reward": counts.reads,
        **dict.fromkeys(LEARNING, counts.replays),
    }
    table = _table("an optimizer step of a rank", "phase", ">times", ">TFLOP", ">seconds", "limited by")
    for name, time in step.times.items():
        times = f"{calls[name]:g}" if name in calls else ""
        if not time.total:
            continue
        table.add_row(name, times, f"{step.flops.get(name, 0) / 1e12:.3g}", f"{time.total:.3g}", time.limit)
    table.add_section()
    table.add_row("sum", "", f"{sum(step.flops.values()) / 1e12:.3g}", f"{step.seconds:.3g}", "")
    return table


def _layouts_table(plan: Plan) -> Table:
    fitting = [item for item in plan.layouts if item.fits]
    table = _table(f"layouts: {len(fitting)} of {len(plan.layouts)} fit; fastest first", ">tensor", ">data", ">FSDP",
                   ">micro-batch", ">accumulation", ">checkpointing", ">peak", "in", ">s a step", f">{_unit(plan)}/s",
                   "most time in")  # fmt: skip
    for item in fitting[:SHOWN]:
        row = _layout(plan, item)
        numbers = [str(row[name]) for name in ("tensor", "data")]
        numbers += ["yes" if row["fsdp"] else "no", str(row["micro_batch_size"]), str(row["accumulation"])]
        numbers += ["yes" if row["activation_checkpointing"] else "no", human(row["peak_bytes"]), row["peak_phase"]]
        numbers += [f"{row['seconds_per_step']:.3g}", f"{_per_second(plan, item):.3g}", row["bottleneck"]]
        table.add_row(*numbers)
    return table


def human(size: float) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} B"
