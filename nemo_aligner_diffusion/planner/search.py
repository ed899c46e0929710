"""Which layouts fit on a GPU, and which of them is fastest.

Every tensor-parallel size is measured at two micro-batches without sharding and once with it; in between, operations
and bytes are straight lines in the number of pictures (:func:`_line`). The layout asked for is measured itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.parallel.layout import Layout
from nemo_aligner_diffusion.planner.estimate import Machines, Memory, StepEstimate, estimate, memory
from nemo_aligner_diffusion.planner.ledger import Collective, Op, Record
from nemo_aligner_diffusion.planner.measure import Measurement, measure
from nemo_aligner_diffusion.planner.schedule import StepCounts
from nemo_aligner_diffusion.planner.settings import Case, Settings

T = TypeVar("T", Op, Collective)
SMALL, LARGE = 1, 3  # micro-batches that are measured


@dataclass(frozen=True)
class Candidate:
    """A layout with a micro-batch, and what became of it."""

    case: Case
    accumulation: int
    memory: Memory
    step: StepEstimate
    fits: bool


def candidate(
    settings: Settings,
    case: Case,
    measured: Measurement,
    counts: StepCounts,
    global_batch_size: int,
    machines: Machines,
) -> Candidate:
    """What ``measured`` means on ``machines``."""
    accumulation = max(1, global_batch_size // (case.micro_batch_size * case.layout.data))
    held = memory(settings, measured, accumulation, case.micro_batch_size)
    step = estimate(settings, measured, counts, case.layout, accumulation, machines)
    return Candidate(case, accumulation, held, step, held.needed <= machines.gpu.memory_bytes)


def search(
    settings: Settings,
    counts: StepCounts,
    global_batch_size: int,
    machines: Machines,
    tensor_sizes: Sequence[int],
    with_sharding: bool,
    progress: Callable[[str], None],
    asked: Case,
) -> list[Candidate]:
    """Every layout of ``machines`` for the global batch, those that fit first, fastest first.

    Sizes of ``tensor_sizes`` beyond the first are tried until one fits: cutting layers costs speed, so more of it is
    never better than the least that fits. What is not searched (the pictures decoded at a time, which frozen parts are
    sharded or cut, when FSDP2 lets go of weights) is as ``asked``, where a layout has a use for it.
    """
    found: list[Candidate] = []
    for tensor in tensor_sizes:
        data = machines.world // tensor
        if machines.world % tensor or global_batch_size % data:
            continue
        for fsdp in (False, True) if with_sharding and data > 1 else (False,):
            for checkpointing in (False, True):
                layout = _as_asked(asked.layout, data, tensor, fsdp)
                progress(f"tensor {tensor} × data {data}{', sharded' if fsdp else ''}"
                         f"{', activation checkpointing' if checkpointing else ''}")  # fmt: skip
                case = Case(layout, SMALL, checkpointing, asked.decode_micro_batch_size)
                found += _sweep(settings, case, counts, global_batch_size, machines)
        if any(item.fits for item in found):
            break
    return sorted(found, key=lambda item: (not item.fits, item.step.seconds, item.memory.peak))


def _as_asked(layout: Layout, data: int, tensor: int, fsdp: bool) -> Layout:
    frozen, cut = layout.sharded_frozen if fsdp else (), layout.cut_reward and tensor > 1
    return replace(layout, data=data, tensor=tensor, fsdp=fsdp, sharded_frozen=frozen, cut_reward=cut)


def _sweep(
    settings: Settings, case: Case, counts: StepCounts, global_batch_size: int, machines: Machines
) -> Iterator[Candidate]:
    share = global_batch_size // case.layout.data
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    small = measure(settings, case, counts.plan)
    large = small if len(sizes) == 1 else measure(settings, replace(case, micro_batch_size=LARGE), counts.plan)
    for size in sizes:
        measured = _line(small, large, size) if size != SMALL else small
        yield candidate(settings, replace(case, micro_batch_size=size), measured, counts, global_batch_size, machines)


def _line(small: Measurement, large: Measurement, size: int) -> Measurement:
    """Through two measurements, at another micro-batch: every operator's work is a straight line in the batch."""
    share = (size - SMALL) / (LARGE - SMALL)
    phases = {name: _record_line(small.phases[name], large.phases[name], share) for name in small.phases}
    return replace(small, phases=phases)


def _record_line(small: Record, large: Record, share: float) -> Record:
    return Record(
        calls_line(small.ops, large.ops, share, ("flops", "moved")),
        round(small.peak + share * (large.peak - small.peak)),
        calls_line(small.collectives, large.collectives, share, ("size",)),
    )


def calls_line(small: Counter[T], large: Counter[T], share: float, numbers: Sequence[str]) -> Counter[T]:
    """Calls with the same operators in the same order of size: of each kind, rank by rank, ``numbers`` are on a line.

    Where there are more calls of a kind in the larger batch (one for each picture), their number is on a line.
    """
    found: Counter[T] = Counter()
    lows, highs = _by_kind(small, numbers), _by_kind(large, numbers)
    for kind in lows | highs:
        low, high = lows.get(kind, []), highs.get(kind, [])
        if len(low) != len(high):
            for calls, weight in ((low, 1 - share), (high, share)):
                for call in calls:
                    found[call] += weight  # type: ignore[assignment]
            continue
        for one, other in zip(low, high, strict=True):
            pairs = {name: (getattr(one, name), getattr(other, name)) for name in numbers}
            between: dict[str, Any] = {name: round(a + share * (b - a)) for name, (a, b) in pairs.items()}
            found[replace(one, **between)] += 1
    return found


def _by_kind(calls: Counter[T], numbers: Sequence[str]) -> dict[T, list[T]]:
    """In order of ``numbers``; of a kind is what differs in them alone."""
    kinds: dict[T, list[T]] = {}
    nothing: dict[str, Any] = dict.fromkeys(numbers, 0)
    for call in sorted(calls.elements(), key=lambda call: [getattr(call, name) for name in numbers]):
        kinds.setdefault(replace(call, **nothing), []).append(call)
    return kinds


def nothing_fits(
    found: Sequence[Candidate], machines: Machines, settings: Settings, searched: bool
) -> ConfigurationError:
    """What to change when no layout fits.

    Args:
        searched: ``found`` is every layout, not only the one asked for.
    """
    if not found:
        return ConfigurationError(
            f"no layout of {machines.world} GPUs divides model.global_batch_size: expected a multiple of "
            f"{machines.world} (without tensor parallelism)"
        )
    nearest = min(found, key=lambda item: item.memory.peak)
    held, phase = nearest.memory, nearest.memory.peak_phase
    who = f"the smallest of {len(found)} layouts" if searched else "this layout"
    largest = max(held.parts, key=held.parts.__getitem__)
    return ConfigurationError(
        f"nothing fits: {who} on {machines.world} × {machines.gpu.name} needs {held.needed / 1e9:.1f} GB of "
        f"{machines.gpu.memory_bytes / 1e9:.0f} GB (the peak is in {phase!r}; the largest part: {largest}, "
        f"{held.parts[largest] / 1e9:.1f} GB). What would help: {'; '.join(_advice(nearest, settings, searched))}"
    )


def _advice(nearest: Candidate, settings: Settings, searched: bool) -> Iterator[str]:
    """What lowers the peak of ``nearest``: what changes nothing else first, what costs most last."""
    case, phase = nearest.case, nearest.memory.peak_phase
    if phase == "replay" and not case.activation_checkpointing:
        yield "model.activation_checkpointing=true"
    if phase in ("decode and reward", "validation") and case.decode_micro_batch_size != 1:
        yield "model.decode_micro_batch_size=1"
    if case.micro_batch_size > 1:
        yield "fewer pictures at once (model.micro_batch_size)"
    if settings.lora is None:
        yield "LoRA instead of every weight (peft=sdlora)"
    if settings.precision not in ("bf16-true", "16-true"):
        yield "weights in 16 bits (trainer.precision=bf16-true)"
    if not case.layout.fsdp and case.layout.data > 1:
        yield "model.fsdp=true"
    if not searched:
        yield "another layout (--layouts shows them all)"
    yield "smaller pictures (model.infer.height, width)"
    yield "a GPU with more memory (--gpu)"
