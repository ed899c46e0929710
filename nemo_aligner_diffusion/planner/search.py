"""Which layouts fit on a GPU, which of them is fastest, and what helps where none does.

Every tensor-parallel size is measured at two micro-batches, with sharding and without; the bytes and seconds of others
are on straight lines through these. The layout asked for is measured itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.parallel.layout import Layout
from nemo_aligner_diffusion.planner.estimate import (
    LEARNING,
    Machines,
    Memory,
    PhaseTime,
    StepEstimate,
    estimate,
    memory,
)
from nemo_aligner_diffusion.planner.measure import Measurement, measure
from nemo_aligner_diffusion.planner.schedule import StepCounts
from nemo_aligner_diffusion.planner.settings import Case, Settings, case_of

_DECODING = "decode and reward"
# what makes a run smaller, the cheapest first: (the phases whose peak it lowers; empty: all of them, override)
REMEDIES: tuple[tuple[tuple[str, ...], str], ...] = (
    ((_DECODING, "validation"), "model.decode_micro_batch_size=1"),
    ((), "model.micro_batch_size=1"),
    ((_DECODING,), "model.first_stage_config.activation_checkpointing=true"),
    ((), "model.frozen_precision=bf16"),
    (LEARNING, "model.activation_checkpointing=true"),
    ((), "rm.trainer.precision=bf16"),
    ((_DECODING,), "model.first_stage_config.tiling=512"),
)
SMALL, LARGE = 1, 3  # micro-batches that are measured
TENSOR_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Candidate:
    """A layout with a micro-batch, and what became of it."""

    case: Case
    accumulation: int
    memory: Memory
    step: StepEstimate
    fits: bool


def candidate(settings: Settings, case: Case, measured: Measurement, counts: StepCounts, machines: Machines,
              micro_batch_size: int | None = None) -> Candidate:  # fmt: skip
    """What ``measured`` means on ``machines``.

    Args:
        micro_batch_size: pictures by which the global batch is accumulated; ``None``: the case's.
    """
    pictures = (micro_batch_size or case.micro_batch_size) * case.layout.data
    accumulation = max(1, settings.run.model.global_batch_size // pictures)
    held = memory(settings, measured, counts, accumulation, case.micro_batch_size, machines.gpu)
    step = estimate(settings, measured, counts, case.layout, accumulation, machines)
    return Candidate(case, accumulation, held, step, held.needed <= machines.gpu.memory_bytes)


@dataclass(frozen=True)
class Fit:
    """What was asked for with some overrides more, which make it fit, or lower its peak as far as they can."""

    words: tuple[str, ...]
    settings: Settings
    measured: Measurement
    found: Candidate


def fit(
    asked: Fit,
    changed: Callable[[Sequence[str]], Settings],
    counts: StepCounts,
    machines: Machines,
    progress: Callable[[str], None],
) -> Fit:
    """Add to ``asked`` those of :data:`REMEDIES` that lower a peak, the next one for every phase that is too large at
    once, until it fits.

    Args:
        changed: the settings of the same command with further overrides.
    """
    best, left = asked, list(REMEDIES)
    while not best.found.fits:
        held, device = best.found.memory, machines.gpu.memory_bytes - machines.gpu.reserved
        if sum(held.parts.values()) / 2 > device:  # in 16 bits all of it would be too much still
            break
        settings, words = best.settings, best.words
        for phase in held.too_large(machines.gpu.memory_bytes):
            for remedy in [item for item in left if not item[0] or phase in item[0]]:
                left.remove(remedy)
                with contextlib.suppress(ConfigurationError):  # not with these settings
                    more = changed((*words, remedy[1]))
                    if more.run != settings.run:  # it was not so already
                        settings, words = more, (*words, remedy[1])
                        break
        if words == best.words:
            break
        progress(" ".join(words))
        with contextlib.suppress(ConfigurationError):  # not with this VAE
            measured = measure(settings, case_of(settings.run), counts.plan)
            found = candidate(settings, case_of(settings.run), measured, counts, machines)
            if found.memory.peak < held.peak:
                best = Fit(words, settings, measured, found)
    return best


def search(
    settings: Settings,
    counts: StepCounts,
    machines: Machines,
    progress: Callable[[str], None],
    asked: Case,
) -> list[Candidate]:
    """Every layout of ``machines`` for the global batch, those that fit first, fastest first.

    Of :data:`TENSOR_SIZES` those beyond the first are tried until one fits: cutting layers costs speed, so more of it
    is never better than the least that fits. What is not searched (the pictures decoded at a time, which frozen parts
    are sharded or cut, when FSDP2 lets go of weights) is as ``asked``, where a layout has a use for it.
    """
    found: list[Candidate] = []
    can_be_split = not settings.run.model.undivided
    for tensor in TENSOR_SIZES if can_be_split else (1,):
        data = machines.world // tensor
        if machines.world % tensor or settings.run.model.global_batch_size % data:
            continue
        for fsdp in (False, True) if data > 1 and can_be_split else (False,):
            for checkpointing in (False, True):
                layout = _as_asked(asked.layout, data, tensor, fsdp)
                progress(f"tensor {tensor} × data {data}{', sharded' if fsdp else ''}"
                         f"{', activation checkpointing' if checkpointing else ''}")  # fmt: skip
                case = Case(layout, SMALL, checkpointing, asked.decode_micro_batch_size)
                found += _sweep(settings, case, counts, machines)
        if any(item.fits for item in found):
            break
    return sorted(found, key=lambda item: (not item.fits, item.step.seconds, item.memory.peak))


def _as_asked(layout: Layout, data: int, tensor: int, fsdp: bool) -> Layout:
    frozen, cut = layout.sharded_frozen if fsdp else (), layout.cut_reward and tensor > 1
    return replace(layout, data=data, tensor=tensor, fsdp=fsdp, sharded_frozen=frozen, cut_reward=cut)


def _sweep(settings: Settings, case: Case, counts: StepCounts, machines: Machines) -> Iterator[Candidate]:
    """Every micro-batch that divides the share of a data rank."""
    share = settings.run.model.global_batch_size // case.layout.data
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    larger = replace(case, micro_batch_size=LARGE)
    small = measure(settings, case, counts.plan)
    large = measure(settings, larger, counts.plan) if len(sizes) > 1 else small
    for size in sizes:
        low = candidate(settings, case, small, counts, machines, size)
        high = candidate(settings, larger, large, counts, machines, size)
        yield low if size == SMALL else between(low, high, size, machines)


def between(low: Candidate, high: Candidate, size: int, machines: Machines) -> Candidate:
    """Of micro-batch ``size``, on the line through two that are measured."""
    share = (size - SMALL) / (LARGE - SMALL)

    def line(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
        return {name: a[name] + share * (b[name] - a[name]) for name in a}

    one, other = low.step, high.step
    times = {name: PhaseTime(**line(vars(time), vars(other.times[name]))) for name, time in one.times.items()}
    step = StepEstimate(line(one.flops, other.flops), line(one.sent, other.sent), times)
    held = Memory(low.memory.parts, line(low.memory.phases, high.memory.phases), low.memory.reserved)
    case = replace(low.case, micro_batch_size=size)
    return Candidate(case, low.accumulation, held, step, held.needed <= machines.gpu.memory_bytes)


def nothing_fits(
    found: Sequence[Candidate], machines: Machines, settings: Settings, searched: bool, words: Sequence[str] = ()
) -> ConfigurationError:
    """What to change when no layout fits.

    Args:
        searched: ``found`` is every layout, not only the one asked for.
        words: overrides that it has already, beyond what was asked for.
    """
    if not found:
        return ConfigurationError(
            f"no layout of {machines.world} GPUs divides model.global_batch_size: expected a multiple of "
            f"{machines.world} (without tensor parallelism)"
        )
    nearest = min(found, key=lambda item: item.memory.peak)
    held, phase = nearest.memory, nearest.memory.peak_phase
    who = f"the smallest of {len(found)} layouts" if searched else "this layout"
    if words:
        who += f" with {' '.join(words)}"
    largest = max(held.parts, key=held.parts.__getitem__)
    return ConfigurationError(
        f"nothing fits: {who} on {machines.world} × {machines.gpu.name} needs {held.needed / 1e9:.1f} GB of "
        f"{machines.gpu.memory_bytes / 1e9:.0f} GB (the peak is in {phase!r}; the largest part: {largest}, "
        f"{held.parts[largest] / 1e9:.1f} GB). What would help: {'; '.join(_advice(nearest, settings, searched))}"
    )


def _advice(nearest: Candidate, settings: Settings, searched: bool) -> Iterator[str]:
    """What lowers the peak of ``nearest``: what changes nothing else first, what costs most last."""
    case, phase, can_be_split = nearest.case, nearest.memory.peak_phase, not settings.run.model.undivided
    if phase in LEARNING and not case.activation_checkpointing:
        yield "model.activation_checkpointing=true"
    if phase in (_DECODING, "validation") and case.decode_micro_batch_size != 1:
        yield "model.decode_micro_batch_size=1"
    if phase == _DECODING and settings.run.model.decoder.small_decoder is None:
        yield "a small decoder (model.first_stage_config.small_decoder)"
    if phase == "encode":
        yield "shards of latents (nad-encode-latents)"
    if case.micro_batch_size > 1:
        yield "fewer pictures at once (model.micro_batch_size)"
    if settings.lora is None:
        yield "LoRA instead of every weight (peft=sdlora)"
        if can_be_split and not case.layout.fsdp and case.layout.tensor == 1:
            yield "moments in 8 bits (model.optim.name=adamw_8bit)"
    if settings.precision[0] == "float32":
        yield "weights in 16 bits (trainer.precision=bf16-true)"
    if not case.layout.fsdp and case.layout.data > 1 and can_be_split:
        yield "model.fsdp=true"
    if not searched:
        yield "another layout (--layouts shows them all)"
    yield "smaller pictures (model.infer.height, width)"
    yield "a GPU with more memory (--gpu)"
