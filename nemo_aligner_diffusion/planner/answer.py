"""A plan as tables on the screen, and as JSON."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from nemo_aligner_diffusion.planner.estimate import ASSUMED
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
            "needed_on_device": held.needed,
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
        "assumptions": vars(ASSUMED),
        "layouts": [
            {
                **_layout(item),
                "peak_bytes": item.memory.peak,
                "peak_phase": item.memory.peak_phase,
                "fits": item.fits,
                "seconds_per_step": item.step.seconds,
                "pictures_per_second": plan.global_batch_size / item.step.seconds,
                "bottleneck": item.step.bottleneck[0],
            }
            for item in plan.layouts
        ],
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


def show(plan: Plan) -> None:
    """Print it."""
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH_OF_A_FILE
    asked, layout, batch = plan.asked, plan.asked.case.layout, plan.global_batch_size
    console.print(
        f"[bold]{plan.settings.spec.name}[/bold], {plan.measured.parameters / 1e6:,.0f} M parameters in the denoiser, "
        f"{plan.measured.trained_elements / 1e6:,.1f} M trained on a rank; {plan.algorithm}, precision "
        f"{plan.settings.precision}"
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
        f"estimated {asked.step.seconds:.3g} s a step, {batch / asked.step.seconds:.3g} pictures/s; most of it "
        f"({share:.0%}): {name}"
    )
    if plan.layouts:
        console.print(_layouts_table(plan))


def _table(title: str, *columns: str) -> Table:
    """Columns whose names begin with ``>`` are ranged right."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left")
    return table


def _memory_table(plan: Plan) -> Table:
    held, gpu = plan.asked.memory, plan.machines.gpu
    table = _table("memory of a rank", "what", ">bytes")
    for name, size in held.parts.items():
        table.add_row(name, human(size))
    table.add_section()
    for name, size in held.phases.items():
        mark = "  [bold]<- peak[/bold]" if name == held.peak_phase else ""
        table.add_row(f"in {name}{mark}", human(size))
        if name == "replay":
            replays = [record.peak for phase, record in plan.measured.phases.items() if phase.startswith("replay")]
            way = "without" if plan.asked.case.activation_checkpointing else "with"
            table.add_row(f"  {way} activation checkpointing", human(size - max(replays) + plan.other_replay))
    table.add_section()
    table.add_row("needed, context and fragmentation included", human(held.needed))
    verdict = "[green]fits[/green]" if plan.asked.fits else "[red]does not fit[/red]"
    table.add_row(f"{gpu.name}: {verdict}", human(gpu.memory_bytes))
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
    table = _table("an optimizer step of a rank", "phase", "a micro-batch", ">TFLOP", ">a picture", ">seconds",
                   "limited by")  # fmt: skip

    def add_row(name: str, flops: float, seconds: float, limit: str) -> None:
        numbers = (flops / 1e12, flops / 1e12 / pictures, seconds)
        table.add_row(name, times.get(name, ""), *map(_in_short, numbers), limit)

    for name, time in step.times.items():
        add_row(name, step.flops.get(name, 0.0), time.total, time.limit)
    table.add_section()
    add_row("sum", sum(step.flops.values()), step.seconds, "")
    return table


def _layouts_table(plan: Plan) -> Table:
    fitting = [item for item in plan.layouts if item.fits]
    table = _table(f"layouts: {len(fitting)} of {len(plan.layouts)} fit; fastest first", ">tensor", ">data", ">FSDP",
                   ">micro-batch", ">accumulation", ">checkpointing", ">peak", "in", ">s a step", ">pictures/s",
                   "most time in")  # fmt: skip
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


def _in_short(number: float) -> str:
    """Two decimals, or two digits of what is smaller than one."""
    return f"{number:,.2f}" if number >= 1 else f"{number:.2g}"


def _times(number: float, what: str) -> str:
    return f"{number:g} {what}{'' if number == 1 else 's'}"


def human(size: float) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} B"
