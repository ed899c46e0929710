"""The tables and the figure of ``docs/scaling.md``: what runs on 8, 64 and 512 GPUs would look like, by the planner.

Nothing here ran on a GPU. Counting takes minutes; ``--counts`` keeps it in a file, from which tables are made anew.

    python -m benchmarks.scaling_tables --counts scaling_counts.json --figures docs/images
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_aligner_diffusion.config.load import load_settings
from nemo_aligner_diffusion.diffusion.plan import Plan
from nemo_aligner_diffusion.parallel.layout import Layout
from nemo_aligner_diffusion.planner.estimate import Machines, Memory, StepEstimate, estimate, memory
from nemo_aligner_diffusion.planner.gpus import GPUS
from nemo_aligner_diffusion.planner.ledger import Collective, Op, Record
from nemo_aligner_diffusion.planner.measure import Measurement, measure
from nemo_aligner_diffusion.planner.plan import quiet
from nemo_aligner_diffusion.planner.presets import model_spec
from nemo_aligner_diffusion.planner.schedule import StepCounts, step_counts
from nemo_aligner_diffusion.planner.settings import Case, Settings, settings_from

NODE = 8
SIZES = (8, 64, 512)
GPU = "h100-80gb"
COMMON = ["model.infer.inference_steps=50", "model.truncation_steps=5", "model.activation_checkpointing=true",
          "trainer.draftp_sd.val_check_interval=0"]  # fmt: skip
MIXED = [*COMMON, "trainer.precision=bf16", "model.infer.unconditional_guidance_scale=7.5"]
WHOLE_16 = [*COMMON, "trainer.precision=bf16-true", "model.infer.unconditional_guidance_scale=1",
            "model.infer.height=1024", "model.infer.width=1024"]  # fmt: skip
FULL = ["peft=none", "model.kl_coeff=5"]


@dataclass(frozen=True)
class Scenario:
    """One model trained one way on one kind of layout; ``data`` and above 8 GPUs follow from the size."""

    name: str
    model: str
    overrides: tuple[str, ...]
    micro_batch_size: int
    decode: int
    tensor: int = 1
    fsdp: bool = False

    def layout(self, gpus: int) -> Layout:
        return Layout(gpus // self.tensor, self.tensor, self.fsdp)


SCENARIOS = (
    Scenario("SD 1.5, LoRA, replicas", "sd15", tuple(MIXED), 8, 4),
    Scenario("SD 1.5, LoRA, tensor 2", "sd15", tuple(MIXED), 8, 4, tensor=2),
    Scenario("SD 1.5, every weight, replicas", "sd15", (*MIXED, *FULL), 8, 4),
    Scenario("SD 1.5, every weight, FSDP", "sd15", (*MIXED, *FULL), 8, 4, fsdp=True),
    Scenario("SDXL, LoRA, replicas", "sdxl", tuple(MIXED), 4, 2),
    Scenario("SDXL, LoRA, tensor 2", "sdxl", tuple(MIXED), 4, 2, tensor=2),
    Scenario("SDXL, LoRA, frozen bf16", "sdxl", (*MIXED, "model.frozen_precision=bf16"), 4, 2),
    Scenario("SDXL, every weight, FSDP", "sdxl", (*MIXED, *FULL), 4, 2, fsdp=True),
    Scenario("12 B DiT, LoRA, replicas", "flux1", tuple(WHOLE_16), 2, 1),
    Scenario("12 B DiT, LoRA, FSDP", "flux1", tuple(WHOLE_16), 2, 1, fsdp=True),
    Scenario("12 B DiT, LoRA, tensor 2", "flux1", tuple(WHOLE_16), 2, 1, tensor=2),
    Scenario("12 B DiT, every weight, FSDP", "flux1", (*WHOLE_16, *FULL), 2, 1, fsdp=True),
)


def prepared(scenario: Scenario) -> tuple[Settings, StepCounts]:
    sizes = [f"model.micro_batch_size={scenario.micro_batch_size}",
             f"model.global_batch_size={scenario.micro_batch_size}"]  # fmt: skip
    cfg = load_settings("draftp_sd", [f"family={scenario.model}", *scenario.overrides, *sizes])
    spec = model_spec(scenario.model)
    return settings_from(cfg, spec), step_counts(cfg, spec)


def counted(scenario: Scenario, settings: Settings) -> Measurement:
    """At 8 GPUs. What differs by a few per cent stands for each other, for the sake of time: the trained model's call
    for the frozen one's, and one active step for each of the five."""
    case = Case(scenario.layout(NODE), scenario.micro_batch_size, True, scenario.decode)
    measured = measure(settings, case, Plan(active=(0,)), only=("text", "call", "decode", "replay"))
    return replace(measured, phases=measured.phases | {"reference": measured.phases["call"]})


def on(scenario: Scenario, settings: Settings, counts: StepCounts, measured: Measurement, gpus: int
       ) -> tuple[Memory, StepEstimate]:  # fmt: skip
    """What was counted for 8 GPUs, on more of them: shards get smaller, operations stay."""
    layout = scenario.layout(gpus)
    if scenario.fsdp:
        shrink = scenario.layout(NODE).data / layout.data
        weights = {name: round(size * shrink) if name in ("denoiser", "reference") else size
                   for name, size in measured.weights.items()}  # fmt: skip
        average = replace(measured.phases["average"], peak=round(measured.phases["average"].peak * shrink))
        measured = replace(measured, weights=weights, trained=round(measured.trained * shrink),
                           trained_elements=round(measured.trained_elements * shrink),
                           moments=round(measured.moments * shrink),
                           phases=measured.phases | {"average": average})  # fmt: skip
    held = memory(settings, measured, counts, 1, scenario.micro_batch_size, GPUS[GPU])
    return held, estimate(settings, measured, counts, layout, 1, Machines(GPUS[GPU], gpus, NODE))


def tables(results: Sequence[tuple[Scenario, int, Memory, StepEstimate]]) -> None:
    runs = [[result for result in results if result[0] is scenario] for scenario in SCENARIOS]
    runs = [run for run in runs if run]
    print("| run | GB a GPU, peak: 8 GPUs | 512 | fits 80 GB | peak in | s a step | pictures/s: 8 GPUs | 64 | 512 "
          "| efficiency at 512 | most time in |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for run in runs:
        rates = [each.micro_batch_size * each.layout(gpus).data / step.seconds for each, gpus, _, step in run]
        scenario, _, held, step = run[0]
        cause, share = step.bottleneck
        fits = held.needed <= GPUS[GPU].memory_bytes
        print(
            f"| {scenario.name} | {held.peak / 1e9:.1f} | {run[-1][2].peak / 1e9:.1f} | {'yes' if fits else 'no'} "
            f"| {held.peak_phase} | {step.seconds:.1f} | {' | '.join(f'{rate:.3g}' for rate in rates)} "
            f"| {rates[-1] / rates[0] / (SIZES[-1] / SIZES[0]):.1%} | {cause} ({share:.0%}) |"
        )
    print()
    print("| run (8 GPUs) | PFLOP a picture | rollout | reference | decode and reward | replay | optimizer "
          "| GB sent a step: 8 GPUs | 64 | 512 |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for run in runs:
        scenario, _, _, step = run[0]
        flops = sum(step.flops.values()) * scenario.tensor / scenario.micro_batch_size / 1e15
        shares = [step.times[name].total / step.seconds
                  for name in ("rollout", "reference", "decode and reward", "replay", "optimizer")]  # fmt: skip
        sent = [sum(each.sent.values()) / 1e9 for _, _, _, each in run]
        print(f"| {scenario.name} | {flops:.2f} | {' | '.join(f'{share:.0%}' for share in shares)} "
              f"| {' | '.join(f'{size:.2f}' for size in sent)} |")  # fmt: skip


def figures(results: Sequence[tuple[Scenario, int, Memory, StepEstimate]], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    at_node = [(scenario, held) for scenario, gpus, held, _ in results if gpus == NODE]
    kinds = {"held all the time": "#4878a8", "gradients": "#e0a458", "the phase's own": "#c05746"}
    figure, axis = plt.subplots(figsize=(9, 1.25 * len(at_node) + 1.2), constrained_layout=True)
    places, names = [], []
    for group, (scenario, held) in enumerate(at_node):
        always = sum(size for name, size in held.parts.items() if name != "gradients")
        for number, (phase, size) in enumerate(held.phases.items()):
            place = group * (len(held.phases) + 0.9) + number
            gradients = held.parts["gradients"] if phase in ("replay", "optimizer") else 0
            left = 0.0
            for (kind, colour), part in zip(kinds.items(), (always, gradients, size - always - gradients), strict=True):
                axis.barh(place, part / 1e9, left=left, color=colour, height=0.82, label=kind if not places else None)
                left += part / 1e9
            weight = "bold" if phase == held.peak_phase else "normal"
            axis.text(left + 0.8, place, f"{size / 1e9:.1f}", va="center", fontsize=8, fontweight=weight)
            places.append(place)
            names.append(phase)
        axis.text(0.6, places[-4] - 0.75, scenario.name, va="center", fontweight="bold")
    axis.set_yticks(places, names, fontsize=8)
    axis.invert_yaxis()
    axis.axvline(GPUS[GPU].memory_bytes / 1e9, color="black", linestyle="--", linewidth=1)
    axis.set_xlim(0, max(1.12 * max(held.peak for _, held in at_node) / 1e9, 90))
    axis.set_xlabel("GB on one of 8 H100 (dashed: its 80 GB), planned; the peak in bold")
    axis.legend(loc="lower right", bbox_to_anchor=(0.87, 0), frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "planner_memory.png", dpi=130)


def as_plain(measured: Measurement) -> dict[str, Any]:
    phases = {
        name: {
            "peak": record.peak,
            "ops": [[*vars(op).values(), count] for op, count in record.ops.items()],
            "collectives": [[*vars(message).values(), count] for message, count in record.collectives.items()],
        }
        for name, record in measured.phases.items()
    }
    return {**vars(measured), "phases": phases}


def from_plain(plain: dict[str, Any]) -> Measurement:
    phases = {
        name: Record(
            Counter({Op(*op): count for *op, count in record["ops"]}),
            record["peak"],
            Counter({Collective(*message): count for *message, count in record["collectives"]}),
        )
        for name, record in plain["phases"].items()
    }
    return Measurement(**{**plain, "phases": phases})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=Path, help="JSON file to keep what was counted in, and to read it from")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the runs to count, from 0; no tables then")
    parser.add_argument("--known", action="store_true", help="only what --counts holds already")
    parser.add_argument("--figures", type=Path, help="folder for the figure")
    arguments = parser.parse_args()
    quiet()
    random.seed(0)
    kept: dict[str, Any] = {}
    if arguments.counts is not None and arguments.counts.is_file():
        kept = json.loads(arguments.counts.read_text("utf-8"))
    results = []
    for number, scenario in enumerate(SCENARIOS):
        if arguments.only is not None and number not in arguments.only:
            continue
        if arguments.known and scenario.name not in kept:
            continue
        settings, counts = prepared(scenario)
        if scenario.name not in kept:
            print(f"counting {scenario.name}", file=sys.stderr, flush=True)
            kept[scenario.name] = as_plain(counted(scenario, settings))
            if arguments.counts is not None:
                arguments.counts.write_text(json.dumps(kept), "utf-8")
        measured = from_plain(kept[scenario.name])
        results += [(scenario, gpus, *on(scenario, settings, counts, measured, gpus)) for gpus in SIZES]
    if arguments.only is not None:
        return
    tables(results)
    if arguments.figures is not None:
        figures(results, arguments.figures)


if __name__ == "__main__":
    main()
