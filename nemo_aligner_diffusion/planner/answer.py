"""A plan as tables on the screen, and as JSON."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from nemo_aligner_diffusion.planner.plan import Plan
from nemo_aligner_diffusion.planner.search import Candidate

SHOWN = 12  # layouts
WIDTH_OF_A_FILE = 120  # columns, where the output is no terminal: a log wraps nothing


def as_json(plan: Plan) -> dict[str, Any]:
    """Bytes, floating-point operations and seconds, nothing rounded."""
    step, held, counts = plan.asked.step, plan.asked.memory, plan.counts
    pictures = plan.asked.case.micro_batch_size * plan.asked.accumulation
    return {
        "model": plan.settings.spec.name,
        "parameters": plan.measured.parameters,
        "trained_parameters_per_rank": plan.measured.trained_elements,
        "algorithm": plan.algorithm,
        "precision": plan.settings.precision,
        "gpu": plan.machines.gpu.name,
        "gpus": plan.machines.world,
        "layout": _layout(plan.asked),
        "per_micro_batch": {
            "network_calls": counts.network_calls,
            "reference_calls": counts.references,
            "replayed_steps": counts.replays,
            "reads": counts.reads,
        },
        "bytes_per_rank": {
            "parts": held.parts,
            "phases": held.phases,
            "transient": {name: record.peak for name, record in plan.measured.phases.items()},
            "replay_with_activation_checkpointing_the_other_way": plan.other_replay,
            "peak": held.peak,
            "peak_phase": held.peak_phase,
            "needed_on_device": held.needed(plan.machines.assumptions),
            "device": plan.machines.gpu.memory_bytes,
            "fits": plan.asked.fits,
        },
        "bytes_sent_per_rank_and_step": step.sent,
        "flops_per_step_and_rank": step.flops,
        "flops_per_picture": sum(step.flops.values()) * plan.asked.case.layout.tensor / pictures,
        "seconds": {name: time.total for name, time in step.times.items()},
        "seconds_per_step": step.seconds,
        "pictures_per_second": plan.global_batch_size / step.seconds,
        "bottleneck": {"what": step.bottleneck[0], "share": step.bottleneck[1]},
        "assumptions": vars(plan.machines.assumptions),
        "layouts": [{**_layout(item), **_outcome(item, plan)} for item in plan.layouts],
        "notes": plan.notes,
    }


def _layout(item: Candidate) -> dict[str, Any]:
    return {
        "tensor": item.case.layout.tensor,
        "data": item.case.layout.data,
        "fsdp": item.case.layout.fsdp,
        "micro_batch_size": item.case.micro_batch_size,
        "accumulation": item.accumulation,
        "activation_checkpointing": item.case.activation_checkpointing,
        "decode_micro_batch_size": item.case.decode_micro_batch_size,
    }


def _outcome(item: Candidate, plan: Plan) -> dict[str, Any]:
    return {
        "peak_bytes": item.memory.peak,
        "peak_phase": item.memory.peak_phase,
        "fits": item.fits,
        "seconds_per_step": item.step.seconds,
        "pictures_per_second": plan.global_batch_size / item.step.seconds,
        "bottleneck": item.step.bottleneck[0],
    }


def show(plan: Plan, console: Console | None = None) -> None:
    """Print it."""
    if console is None:
        console = Console()
        if not console.is_terminal:
            console.width = WIDTH_OF_A_FILE
    layout, machines = plan.asked.case.layout, plan.machines
    console.print(
        f"[bold]{plan.settings.spec.name}[/bold], {plan.measured.parameters / 1e6:,.0f} M parameters in the denoiser, "
        f"{plan.measured.trained_elements / 1e6:,.1f} M trained on a rank; {plan.algorithm}, precision "
        f"{plan.settings.precision}"
    )
    console.print(
        f"{layout.world_size} × {machines.gpu.name}: tensor {layout.tensor} × data {layout.data}"
        f"{', sharded (FSDP2)' if layout.fsdp else ''}; micro-batch {plan.asked.case.micro_batch_size} × accumulation "
        f"{plan.asked.accumulation}, global batch {plan.global_batch_size}"
    )
    console.print(_memory_table(plan))
    console.print(_time_table(plan))
    if plan.asked.step.sent:
        console.print(_communication_table(plan))
    name, share = plan.asked.step.bottleneck
    console.print(
        f"estimated {plan.asked.step.seconds:.3g} s a step, {plan.global_batch_size / plan.asked.step.seconds:.3g} "
        f"pictures/s; most of it ({share:.0%}): {name}"
    )
    if plan.layouts:
        console.print(_layouts_table(plan))
    for note in plan.notes:
        console.print(f"note: {note}")


def _memory_table(plan: Plan) -> Table:
    held, machines = plan.asked.memory, plan.machines
    table = Table(title="memory of a rank", title_justify="left", show_footer=False)
    table.add_column("what")
    table.add_column("bytes", justify="right")
    for name, size in held.parts.items():
        table.add_row(name, human(size))
    table.add_section()
    checkpointing = plan.asked.case.activation_checkpointing
    for name, size in held.phases.items():
        mark = "  [bold]<- peak[/bold]" if name == held.peak_phase else ""
        table.add_row(f"in {name}{mark}", human(size))
        if name == "replay":
            replay = max(plan.measured.phases[key].peak for key in ("replay", "replay_next")
                         if key in plan.measured.phases)  # fmt: skip
            other = size - replay + plan.other_replay
            way = "without" if checkpointing else "with"
            table.add_row(f"  {way} activation checkpointing", human(other))
    table.add_section()
    needed = held.needed(machines.assumptions)
    table.add_row("needed, context and fragmentation included", human(needed))
    verdict = "[green]fits[/green]" if plan.asked.fits else "[red]does not fit[/red]"
    table.add_row(f"{machines.gpu.name}: {verdict}", human(machines.gpu.memory_bytes))
    return table


def _time_table(plan: Plan) -> Table:
    step, counts = plan.asked.step, plan.counts
    pictures = plan.asked.case.micro_batch_size * plan.asked.accumulation / plan.asked.case.layout.tensor
    times = {
        "rollout": _times(counts.network_calls, "call"),
        "reference": _times(counts.references, "call"),
        "decode and reward": _times(counts.reads, "read"),
        "replay": _times(counts.replays, "step"),
    }
    table = Table(title="an optimizer step of a rank", title_justify="left")
    for column in ("phase", "a micro-batch", "TFLOP", "a picture", "seconds", "limited by"):
        table.add_column(column, justify="right" if column in ("TFLOP", "a picture", "seconds") else "left")
    for name, time in step.times.items():
        flops = step.flops.get(name, 0.0)
        table.add_row(
            name,
            times.get(name, ""),
            _in_short(flops / 1e12),
            _in_short(flops / 1e12 / pictures),
            _in_short(time.total),
            time.limit,
        )
    table.add_section()
    total = sum(step.flops.values())
    table.add_row("sum", "", _in_short(total / 1e12), _in_short(total / 1e12 / pictures), _in_short(step.seconds))
    return table


def _in_short(number: float) -> str:
    """Two decimals, or two digits of what is smaller than one."""
    return f"{number:,.2f}" if number >= 1 else f"{number:.2g}"


def _communication_table(plan: Plan) -> Table:
    table = Table(title="sent by a rank in an optimizer step", title_justify="left")
    table.add_column("what")
    table.add_column("bytes", justify="right")
    words = {
        "tensor_parallel": "sums over the tensor group",
        "fsdp_gather": "gathering sharded weights",
        "fsdp_scatter": "scattering gradients",
        "gradients": "averaging gradients",
    }
    for name, size in plan.asked.step.sent.items():
        table.add_row(words[name], human(size))
    return table


def _layouts_table(plan: Plan) -> Table:
    fitting = [item for item in plan.layouts if item.fits]
    table = Table(title=f"layouts: {len(fitting)} of {len(plan.layouts)} fit; fastest first", title_justify="left")
    for column in ("tensor", "data", "FSDP", "micro-batch", "accumulation", "checkpointing", "peak", "in", "s a step",
                   "pictures/s", "most time in"):  # fmt: skip
        table.add_column(column, justify="left" if column in ("in", "most time in") else "right")
    for item in fitting[:SHOWN]:
        table.add_row(
            str(item.case.layout.tensor),
            str(item.case.layout.data),
            "yes" if item.case.layout.fsdp else "no",
            str(item.case.micro_batch_size),
            str(item.accumulation),
            "yes" if item.case.activation_checkpointing else "no",
            human(item.memory.peak),
            item.memory.peak_phase,
            f"{item.step.seconds:.3g}",
            f"{plan.global_batch_size / item.step.seconds:.3g}",
            item.step.bottleneck[0],
        )
    return table


def _times(number: float, what: str) -> str:
    return f"{number:g} {what}{'' if number == 1 else 's'}"


def human(size: float) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} B"
