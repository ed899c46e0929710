"""From counts to bytes held, bytes sent and seconds on a named GPU.

Seconds are a roofline, operator by operator: an operator takes the longer of its arithmetic at a share of the peak rate
and its bytes at a share of the memory's bandwidth; a phase takes at least what the host needs to launch its operators.
The shares are assumptions (:class:`Assumptions`), set so that published timings of plain inference come out
(``docs/planner.md``). What is not modelled: kernels that fuse, power limits, stragglers, data loading, checkpoints.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from nemo_aligner_diffusion.parallel.layout import Layout
from nemo_aligner_diffusion.planner.gpus import GPU
from nemo_aligner_diffusion.planner.ledger import Collective, Op, Record
from nemo_aligner_diffusion.planner.measure import Measurement
from nemo_aligner_diffusion.planner.schedule import StepCounts
from nemo_aligner_diffusion.planner.settings import Settings


@dataclass(frozen=True)
class Assumptions:
    """Shares of the data sheet's rates that are reached, and fixed costs.

    Attributes:
        matmul, conv, attention: of the peak arithmetic rate.
        bandwidth: of device memory's, by elementwise operators and normalisations.
        link: of NVLink's, PCIe's or the network's.
        launch_seconds: host time of an operator (modules in Python, dispatch, launch): what Stable Diffusion and SDXL
            take at batch 1 without compiling.
        cast_seconds: host time of a change of dtype, most of which autocast makes below Python.
        message_seconds: fixed cost of a collective.
        fragmentation: share of what is needed that the caching allocator holds on top.
    """

    matmul: float = 0.55
    conv: float = 0.45
    attention: float = 0.4
    bandwidth: float = 0.65
    link: float = 0.75
    launch_seconds: float = 42e-6
    cast_seconds: float = 8e-6
    message_seconds: float = 20e-6
    fragmentation: float = 0.05


ASSUMED = Assumptions()


@dataclass(frozen=True)
class Machines:
    """``world`` GPUs of one kind, ``per_node`` in a server."""

    gpu: GPU
    world: int
    per_node: int


@dataclass
class Memory:
    """Bytes of one process.

    Attributes:
        parts: what is held all the time (weights by network, optimizer, moving average) and the gradients.
        phases: the most that is held in each phase, all parts then held included.
        reserved: what is held beside tensors.
    """

    parts: dict[str, int]
    phases: Mapping[str, float]
    reserved: float

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.phases.__getitem__)

    @property
    def peak(self) -> float:
        return max(self.phases.values())

    @property
    def needed(self) -> float:
        """Of the device, context and fragmentation included."""
        return self._of_device(self.peak)

    def too_large(self, device: float) -> list[str]:
        """The phases that need more than ``device`` bytes, the largest first."""
        ordered = sorted(self.phases, key=lambda name: -self.phases[name])
        return [name for name in ordered if self._of_device(self.phases[name]) > device]

    def _of_device(self, peak: float) -> float:
        return peak * (1 + ASSUMED.fragmentation) + self.reserved


@dataclass
class PhaseTime:
    """Seconds of a phase in an optimizer step, and what they go into; ``parts`` knows what overlaps."""

    arithmetic: float = 0.0
    bandwidth: float = 0.0
    launches: float = 0.0
    tensor: float = 0.0
    sharding: float = 0.0
    replicas: float = 0.0

    @property
    def device(self) -> float:
        return max(self.arithmetic + self.bandwidth, self.launches)

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by cause, of what counts in ``total``."""
        # sums over a tensor group are waited for; gathers of sharded weights run beside the arithmetic
        if self.sharding > self.device:
            inside = {"sharding": self.sharding}
        elif self.launches > self.arithmetic + self.bandwidth:
            inside = {"launches": self.launches}
        else:
            inside = {"arithmetic": self.arithmetic, "bandwidth": self.bandwidth}
        return {**inside, "tensor": self.tensor, "replicas": self.replicas}

    @property
    def limit(self) -> str:
        """What most of it goes into."""
        return BOTTLENECKS[max(self.parts, key=self.parts.__getitem__)]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass
class StepEstimate:
    """An optimizer step of one process.

    Attributes:
        flops: by phase.
        sent: bytes this process sends, by kind: ``tensor_parallel``, ``fsdp_gather``, ``fsdp_scatter``, ``gradients``.
        times: by phase.
    """

    flops: dict[str, float]
    sent: dict[str, float]
    times: dict[str, PhaseTime] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return sum(time.total for time in self.times.values())

    @property
    def bottleneck(self) -> tuple[str, float]:
        """What most of the time goes into, and its share of it."""
        totals = {cause: sum(time.parts.get(cause, 0.0) for time in self.times.values()) for cause in BOTTLENECKS}
        cause = max(totals, key=totals.__getitem__)
        return BOTTLENECKS[cause], totals[cause] / max(self.seconds, 1e-30)


BOTTLENECKS = {
    "arithmetic": "matrix arithmetic",
    "bandwidth": "device memory bandwidth",
    "launches": "host launching operators",
    "tensor": "tensor-parallel sums",
    "sharding": "gathering sharded weights",
    "replicas": "averaging gradients",
}
# phases that have a part of model.offload on the device; what moving it takes is not in the seconds
TURNS = {
    "text_encoder": ("text", "validation"),
    "vae": ("encode", "decode and reward", "validation"),
    "reward": ("decode and reward", "validation"),
}
LEARNING = ("replay", "forward and backward")  # the phase with the denoiser's gradient: of a trajectory, of pairs
# (group, kind) of a collective -> what is sent, and which of PhaseTime's seconds it costs
TRAFFIC = {
    ("tensor", "all_reduce"): ("tensor_parallel", "tensor"),
    ("data", "all_gather"): ("fsdp_gather", "sharding"),
    ("data", "reduce_scatter"): ("fsdp_scatter", "sharding"),
    ("data", "all_reduce"): ("gradients", "replicas"),
}


def memory(
    settings: Settings, measured: Measurement, counts: StepCounts, accumulation: int, micro_batch_size: int, gpu: GPU
) -> Memory:
    """What a process holds, in the steady state (from the second optimizer step on)."""
    phases, gradients = measured.phases, measured.trained
    optim, ema = settings.run.model.optim, settings.run.exp_manager.ema
    average = 4 * measured.trained_elements if ema.enable and not ema.cpu_offload else 0
    # a fused optimizer makes no temporary of the parameters' size, that of 8 bits one parameter's at a time
    small = optim.name == "adamw_8bit" or (optim.name == "fused_adam" and not settings.autocast)
    temporary = 0 if small else measured.trained
    parts = {f"{name} weights": size for name, size in measured.weights.items() if size}
    parts |= {"optimizer": measured.moments, "moving average": average}
    always = sum(parts.values())
    peaks: dict[str, float] = {}

    def away(phase: str) -> int:
        parts = settings.run.model.offload if settings.on_gpu else None  # a CPU's memory is the host's
        return sum(measured.weights.get(part, 0) for part in parts or () if phase not in TURNS[part])

    kept = gradients if accumulation > 1 else 0  # gradients of the micro-batches before
    for name, most in peaks_of(measured, counts).items():
        if counts.kind == "policy":
            kept = _trajectories(measured, counts, accumulation, name)
        shown = "rollout" if counts.network_calls and name in ("text", "reference") else name
        if most:
            peaks[shown] = max(peaks.get(shown, -always), kept + most - away(name))
    if "average" in phases:
        peaks["optimizer"] = max(phases["average"].peak, gradients + temporary) - away("optimizer")
    if "validation" in phases:
        larger = max(1.0, settings.validation_batch_size / micro_batch_size)
        call = phases["call"].peak
        # autocast's copies of weights that have a gradient do not grow with the pictures
        copies = min(call, 2 * measured.trained_elements) if settings.autocast else 0
        most = max(phases["validation"].peak, int(copies + (call - copies) * larger))
        peaks["validation"] = gradients + most  # its turns are not told apart: all count
    held = {name: always + peak for name, peak in peaks.items()}
    return Memory({**parts, "gradients": gradients}, held, gpu.reserved)


def peaks_of(measured: Measurement, counts: StepCounts) -> dict[str, float]:
    """The most that each phase of a micro-batch holds, activations of kept steps included."""
    before, after = (measured.phases.get(name, Record()).start for name in ("kept", "kept, then"))
    step = after - before
    others = {"rollout": counts.kept - 1, "reference": counts.kept, "decode and reward": counts.kept,
              LEARNING[0]: counts.kept - 1}  # fmt: skip
    return {
        name: max((record.peak for often, record in records if often), default=0) + max(0, others.get(name, 0)) * step
        for name, records in micro_batch(measured, counts).items()
    }


def _trajectories(measured: Measurement, counts: StepCounts, chunks: int, phase: str) -> int:
    """What all chunks of a policy gradient's batch hold until its one backward pass, beyond the peak of one's phase.

    That is what a drawn step is recomputed from, latents for further passes, and until they are scored pictures, twice.
    """
    if counts.kind != "policy":
        return 0
    one = measured.phases["replay"].start
    two = measured.phases.get("replay_next", measured.phases["replay"]).start
    held = one + (two - one) * (len(counts.plan.active) - 1) + measured.latents * counts.steps * (counts.passes > 1)
    if phase == "replay":
        return chunks * held - two
    return chunks * (held + 2 * measured.pictures)


def micro_batch(measured: Measurement, counts: StepCounts) -> dict[str, list[tuple[float, Record]]]:
    """Phases of the printed plan -> those that were measured, and how often a micro-batch has each."""
    own = counts.replays if "copied" in measured.phases else counts.network_calls
    often = {
        "encode": {"encode": counts.encodings},
        "text": {"text": counts.texts, "conditioning": 1},
        "rollout": {"call": own - counts.kept, "copied": counts.network_calls - own},
        "reference": {"reference": counts.references},
        "decode and reward": {"decode": counts.reads, "unread": 1},
        LEARNING[counts.kind == "preference"]: {"replay": 1, "replay_next": counts.replays - 1},
    }
    found = dict(measured.phases)
    if "replay" in found:
        found.setdefault("replay_next", found["replay"])
    return {
        name: [(times, found[phase]) for phase, times in phases.items() if phase in found and times]
        for name, phases in often.items()
    }


def estimate(
    settings: Settings, measured: Measurement, counts: StepCounts, layout: Layout, accumulation: int, machines: Machines
) -> StepEstimate:
    """Operations, bytes sent and seconds of an optimizer step."""
    flops: dict[str, float] = {}
    sent: Counter[str] = Counter()
    times: dict[str, PhaseTime] = {}
    for name, records in micro_batch(measured, counts).items():
        ops: Counter[Op] = Counter()
        time = PhaseTime()
        for often, record in records:
            for op, count in record.ops.items():
                ops[op] += often * count * accumulation  # type: ignore[assignment]
            for message, count in record.collectives.items():
                _add_message(time, sent, message, often * count * accumulation, layout, machines)
        if name == "rollout" and "fold" in measured.phases:
            ops.update(measured.phases["fold"].ops)
        add_device_time(time, ops, machines.gpu)
        flops[name] = sum(op.flops * count for op, count in ops.items())
        times[name] = time
    times["optimizer"] = update = PhaseTime()
    for message, count in measured.phases["average"].collectives.items():
        _add_message(update, sent, message, count, layout, machines)
    touched = 3 * measured.trained + 2 * measured.moments + 8 * measured.trained_elements
    update.bandwidth += touched / (machines.gpu.bandwidth * ASSUMED.bandwidth)
    return StepEstimate(flops, dict(sent), times)


def _add_message(
    time: PhaseTime, sent: Counter[str], message: Collective, count: float, layout: Layout, machines: Machines
) -> None:
    """A ring over n processes sends ``(n−1)/n`` of the whole for a gather or a scatter, twice that for a sum."""
    tensor = message.group == "tensor"
    ranks = layout.tensor if tensor else layout.data
    if ranks == 1 or not count:
        return
    rings = 2 if message.kind == "all_reduce" else 1
    bytes_sent = rings * (ranks - 1) / ranks * message.size * count
    what, cause = TRAFFIC[message.group, message.kind]
    sent[what] += bytes_sent  # type: ignore[assignment]
    seconds = bytes_sent / _link_rate(tensor, layout, machines) + count * ASSUMED.message_seconds
    setattr(time, cause, getattr(time, cause) + seconds)


def _link_rate(tensor: bool, layout: Layout, machines: Machines) -> float:
    """Bytes/s that one process sends at. Between servers, a group's members in one server share their links."""
    gpu, per_node = machines.gpu, machines.per_node
    neighbours = min(layout.tensor, per_node)
    inside = neighbours if tensor else max(1, min(layout.data, per_node // neighbours))
    spans = layout.tensor > per_node if tensor else layout.world_size > per_node
    return (min(gpu.link, gpu.network * inside) if spans else gpu.link) * ASSUMED.link


def add_device_time(time: PhaseTime, ops: Mapping[Op, float], gpu: GPU) -> None:
    """What operators take on the device, and on the host that launches them."""
    shares = {"matmul": ASSUMED.matmul, "conv": ASSUMED.conv, "attention": ASSUMED.attention}
    for op, count in ops.items():
        moving = op.moved / (gpu.bandwidth * ASSUMED.bandwidth)
        computing = op.flops / (gpu.flops[_rate(op)] * shares[op.kind]) if op.flops else 0.0
        if computing > moving:
            time.arithmetic += count * computing
        else:
            time.bandwidth += count * moving
        time.launches += count * (ASSUMED.cast_seconds if op.kind == "cast" else ASSUMED.launch_seconds)


def _rate(op: Op) -> str:
    """PyTorch's defaults: convolutions in float32 use TF32, matrix products don't."""
    if op.arithmetic in ("bfloat16", "float16"):
        return "bf16"
    if op.arithmetic == "float64":
        return "fp64"
    return "tf32" if op.kind == "conv" else "fp32"
