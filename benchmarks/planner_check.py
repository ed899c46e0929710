"""The planner against what this machine does: operations, memory and bytes sent, planned and measured.

The measured side is the training step itself, the module's ``training_step`` and its backward pass, on the CPU:
operations by PyTorch's ``FlopCounterMode``, memory by the allocator's own events.

    python -m benchmarks.planner_check                   # operations and memory
    python -m benchmarks.planner_check --communication   # bytes sent, on two and four processes over gloo
    python -m benchmarks.planner_check --published       # seconds of plain inference, published and estimated
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory_vs_active_steps import peak_allocated_bytes
from nemo_aligner_diffusion.algorithms.preference.module import PreferenceTuning
from nemo_aligner_diffusion.config.load import load_settings
from nemo_aligner_diffusion.diffusion.generate import picture_size
from nemo_aligner_diffusion.diffusion.noise import plan_random
from nemo_aligner_diffusion.diffusion.plan import Plan
from nemo_aligner_diffusion.embedded_assets import embedded_model_path
from nemo_aligner_diffusion.parallel.layout import Layout
from nemo_aligner_diffusion.planner.estimate import PhaseTime, add_device_time, micro_batch, peaks_of
from nemo_aligner_diffusion.planner.gpus import GPUS
from nemo_aligner_diffusion.planner.measure import Measurement, measure
from nemo_aligner_diffusion.planner.presets import ModelSpec, model_spec
from nemo_aligner_diffusion.planner.schedule import StepCounts, step_counts
from nemo_aligner_diffusion.planner.settings import Case, case_of, settings_from
from nemo_aligner_diffusion.rewards import build_reward
from nemo_aligner_diffusion.training.build import build_model, build_module

PROMPTS = ["red apple", "dog", "rocket", "pizza", "cat face", "sunflower", "castle", "bicycle"]
SHORT = ["model.infer.inference_steps=4", "model.truncation_steps=2", "model.drtune.train_steps=2",
         "model.drtune.early_stop_steps=1", "trainer.draftp_sd.val_check_interval=0"]  # fmt: skip


@dataclass(frozen=True)
class Figures:
    """Of one micro-batch: floating-point operations, and the most bytes alive beyond what was there before."""

    flops: int
    peak: int


def load(recipe: str, overrides: Sequence[str], batch: int) -> Any:
    short = [text.replace("draftp_sd", recipe) for text in SHORT]
    sizes = [f"model.micro_batch_size={batch}", f"model.global_batch_size={batch}"]
    return load_settings(recipe, [*short, *sizes, *overrides])


class RealStep:
    """The training step of ``cfg`` on this process, which may be a rank of a process group."""

    def __init__(self, cfg: Any) -> None:
        model = build_model(cfg)
        self.module = build_module(cfg, model, build_reward(cfg.rm), max_steps=10)
        if dist.is_initialized():
            layout = self.module.parallel.layout
            names = ("data_parallel", "tensor_parallel")
            self.module._device_mesh = init_device_mesh("cpu", (layout.data, layout.tensor), mesh_dim_names=names)
        self.module.configure_model()
        self.module.on_train_start()
        own, method = cfg.model.micro_batch_size, cfg.method()
        if method.kind == "policy":
            own = cfg.model.global_batch_size // cfg.layout.data
        self.pairs: dict[str, Any] = {}
        if isinstance(self.module, PreferenceTuning):
            self.pairs = {"pictures": torch.rand(own, 2, 3, *picture_size(model, self.module.sampling)),
                          "labels": torch.tensor([[1.0, 0.0]] * own)}  # fmt: skip
            assert self.module.calls  # finds out how the network is called
        self.index = torch.arange(own) + own * self.module.parallel.data_rank

    def __call__(self) -> None:
        """Forward, backward and the averaging of gradients, as in a run: its prompts are new in every step."""
        for part in self.module.reward.modules():
            if hasattr(part, "text_rows"):
                part.text_rows.clear()
        batch = {"prompts": [PROMPTS[i % len(PROMPTS)] for i in self.index], "index": self.index, **self.pairs}
        self.module.training_step(batch, 0).backward()
        self.module.parallel.average_gradients(self.module.trainable_parameters())
        self.module._micro_batches.clear()
        self.module.model.denoiser.zero_grad(set_to_none=True)


class _NoModules:
    """One total. PyTorch's own tracker of modules hangs hooks on their inputs, which ``autograd.grad`` cannot bear
    where the input is what is differentiated by, as at the decoder's leaf."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *exception: Any) -> None: ...


def measured(cfg: Any) -> Figures:
    """The real step, twice: the first one counts operations and leaves nothing to be made for the first time."""
    step = RealStep(cfg)
    counter = FlopCounterMode(display=False)  # with the ledger's formula of the CPU's attention
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with counter:
        step()
    return Figures(counter.get_total_flops(), peak_allocated_bytes(step))


def planned(cfg: Any, layout: Layout | None = None) -> tuple[Figures, Measurement]:
    """The same step by the planner, for the plan that the run draws."""
    settings = settings_from(cfg, spec_of(cfg), on_gpu=False)
    counts, case = drawn_counts(cfg), case_of(cfg)
    if layout is not None:
        case = replace(case, layout=layout)
    result = measure(settings, case, counts.plan, prompts=PROMPTS[: case.micro_batch_size])
    result.phases.pop("validation", None)
    flops = sum(often * record.flops for part in micro_batch(result, counts).values() for often, record in part)
    flops += result.phases["fold"].flops if "fold" in result.phases else 0
    return Figures(round(flops), max(peaks_of(result, counts).values())), result


def spec_of(cfg: Any) -> ModelSpec:
    return model_spec(cfg.model.from_pretrained or str(embedded_model_path()))


def drawn_counts(cfg: Any) -> StepCounts:
    return step_counts(cfg, spec_of(cfg), plan_random(cfg.model.seed, 0))


def compare(title: str, recipe: str, overrides: Sequence[str], batch: int) -> None:
    cfg = load(recipe, overrides, batch)
    real, (plan, result) = measured(cfg), planned(cfg)
    peak_phase = max(result.phases, key=lambda name: result.phases[name].peak)
    print(
        f"| {title} | {batch} | {real.flops / 1e9:.3f} | {plan.flops / 1e9:.3f} | {plan.flops / real.flops - 1:+.2%} "
        f"| {real.peak / 1e6:.1f} | {plan.peak / 1e6:.1f} | {plan.peak / real.peak - 1:+.1%} | {peak_phase} |",
        flush=True,
    )


CASES: list[tuple[str, str, list[str], int]] = [
    ("DRaFT+, LoRA", "draftp_sd", [], 2),
    ("DRaFT+, LoRA", "draftp_sd", [], 8),
    ("DRaFT+, LoRA, no KL, K=1, g=1", "draftp_sd",
     ["model.kl_coeff=0", "model.truncation_steps=1", "model.infer.unconditional_guidance_scale=1"], 4),
    ("DRaFT+, LoRA, decoding 1 at a time", "draftp_sd", ["model.decode_micro_batch_size=1"], 8),
    ("the same, activation checkpointing", "draftp_sd",
     ["model.decode_micro_batch_size=1", "model.activation_checkpointing=true"], 8),
    ("DRaFT+, every weight", "draftp_sd", ["peft=none"], 2),
    ("DRaFT+, every weight", "draftp_sd", ["peft=none", "model.decode_micro_batch_size=1"], 8),
    ("the same, activation checkpointing", "draftp_sd",
     ["peft=none", "model.decode_micro_batch_size=1", "model.activation_checkpointing=true"], 8),
    ("DRTune, LoRA", "drtune_sd", [], 4),
    ("DRTune, every weight", "drtune_sd", ["peft=none"], 4),
    ("DRaFT-LV, LoRA", "draft_lv_sd", [], 2),
    ("DRaFT+, LoRA, 128 × 128 pixels", "draftp_sd", ["model.infer.height=128", "model.infer.width=128"], 2),
]  # fmt: skip


# Layouts of the communication check: processes, and what they do
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "DP2": (2, []),
    "FSDP2 on 2": (2, ["model.fsdp=true"]),
    "TP2": (2, ["model.tensor_model_parallel_size=2"]),
    "FSDP2 on 2 × TP2": (4, ["model.fsdp=true", "model.tensor_model_parallel_size=2"]),
}


# functions of torch.distributed -> the kind of message, and where among their arguments the whole tensor is. What FSDP2
# calls has got another name in PyTorch 2.13.
MESSAGES: dict[str, tuple[str, str, int]] = {
    "all_reduce": ("all_reduce", "tensor", 0),
    "all_gather_single": ("all_gather", "output_tensor", 0),
    "all_gather_into_tensor": ("all_gather", "output_tensor", 0),
    "reduce_scatter_single": ("reduce_scatter", "input", 1),
    "reduce_scatter_tensor": ("reduce_scatter", "input", 1),
}


@contextmanager
def counted_messages(groups: Mapping[Any, str]) -> Iterator[Counter[str]]:
    """Bytes of the whole tensors handed to each kind of collective of each group, e.g. ``"data all_reduce"``.

    Counted where ``torch.distributed`` is called, not where the planner counts (PyTorch's dispatcher).
    """
    handed: Counter[str] = Counter()

    def counting(original: Callable[..., Any], kind: str, name: str, place: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            whole = kwargs[name] if name in kwargs else args[place]
            handed[f"{groups[kwargs['group']]} {kind}"] += whole.nbytes
            return original(*args, **kwargs)

        return call

    originals = {name: getattr(dist, name) for name in MESSAGES if hasattr(dist, name)}
    for name, original in originals.items():
        setattr(dist, name, counting(original, *MESSAGES[name]))
    try:
        yield handed
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def parallel_step(recipe: str, overrides: Sequence[str], batch: int) -> dict[str, int]:
    """A real step on this rank of a gloo group: bytes handed to each kind of collective, and the peak of memory."""
    step = RealStep(load(recipe, overrides, batch))
    parallel = step.module.parallel
    step()  # FSDP2 lays out its buffers in the first one
    with counted_messages({parallel.data_group: "data", parallel.tensor_group: "tensor"}) as handed:
        peak = peak_allocated_bytes(step)
    return {**handed, "peak": peak}


def planned_step(recipe: str, overrides: Sequence[str], batch: int) -> dict[str, int]:
    """The same by the planner."""
    cfg = load(recipe, overrides, batch)
    figures, result = planned(cfg)
    parts = micro_batch(result, drawn_counts(cfg)) | {"optimizer": [(1, result.phases["average"])]}
    handed: Counter[str] = Counter()
    for often, record in chain.from_iterable(parts.values()):
        for message, count in record.collectives.items():
            handed[f"{message.group} {message.kind}"] += round(often * count * message.size)
    return {**handed, "peak": figures.peak}


def _rank(rank: int, size: int, store: str, queue: Any, *arguments: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    outcome = parallel_step(*arguments)
    if rank == 0:
        queue.put(outcome)
    dist.destroy_process_group()


def communication() -> None:
    """Bytes handed to collectives and peak memory on gloo processes, against the plan."""
    context = multiprocessing.get_context("spawn")
    print("| layout | trained | what | measured | planned | difference |")
    print("| --- | --- | --- | --- | --- | --- |")
    for layout, (size, more) in LAYOUTS.items():
        for what, words in (("LoRA", []), ("every weight", ["peft=none"])):
            tensor = 2 if "TP2" in layout else 1
            overrides = [*more, *words, f"trainer.devices={size}", f"model.global_batch_size={2 * size // tensor}",
                         "trainer.accelerator=cpu"]  # fmt: skip
            queue = context.Queue()
            with tempfile.TemporaryDirectory() as folder:
                ranks = [context.Process(target=_rank, args=(rank, size, f"{folder}/store", queue, "draftp_sd",
                                                             overrides, 2)) for rank in range(size)]  # fmt: skip
                for rank in ranks:
                    rank.start()
                real = queue.get(timeout=500)
                for rank in ranks:
                    rank.join()
            plan = planned_step("draftp_sd", overrides, 2)
            for kind in sorted({*real, *plan}):
                a, b = real.get(kind, 0), plan.get(kind, 0)
                difference = f"{b / a - 1:+.2%}" if a else "-"
                print(f"| {layout} | {what} | {kind} | {a:,} | {b:,} | {difference} |", flush=True)


# Plain inference of one picture in 16 bits, guidance on (FLUX: its own, without a second pass), without compiling:
# model, GPU, steps, seconds, who measured
PUBLISHED: list[tuple[str, str, int, float, str]] = [
    ("sd15", "a100-80gb", 50, 1.604, "fal-ai/stable-diffusion-benchmarks, Diffusers (torch 2.1, SDPA)"),
    ("sdxl", "a100-80gb", 30, 3.704, "stabilityai/stable-diffusion-xl-1.0-tensorrt, baseline"),
    ("sdxl", "h100-80gb", 30, 2.496, "the same"),
    ("flux1", "h100-80gb", 50, 12.339, "microsoft/onnxruntime #22986, Torch 2.5.1 (eager)"),
]


def published() -> None:
    """The roofline against published timings: what the assumed shares were set by."""
    print("| model | GPU | steps | seconds published | estimated | ratio | TFLOP a call | who measured |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    counted: dict[str, Measurement] = {}
    for name, gpu, steps, seconds, who in PUBLISHED:
        if name not in counted:
            scale = 1 if name == "flux1" else 5
            cfg = load("draftp_sd", ["trainer.precision=bf16-true", "peft=none", "model.kl_coeff=0",
                       f"model.infer.unconditional_guidance_scale={scale}"], 1)  # fmt: skip
            settings = replace(settings_from(cfg, model_spec(name)), validation_batch_size=1)
            case = Case(Layout(), 1, False, None)
            counted[name] = measure(settings, case, Plan(active=(0,)), only=("text", "call", "validation"))
        phases, time = counted[name].phases, PhaseTime()
        ops: Counter[Any] = Counter()
        for often, phase in ((1, "text"), (steps, "call"), (1, "validation")):
            for op, count in phases[phase].ops.items():
                ops[op] += often * count
        add_device_time(time, ops, GPUS[gpu])
        print(f"| {name} | {gpu} | {steps} | {seconds} | {time.device:.2f} | {time.device / seconds:.2f} "
              f"| {phases['call'].flops / 1e12:.2f} | {who} |", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the cases to run, from 0")
    parser.add_argument("--published", action="store_true", help="published timings against the roofline")
    parser.add_argument("--communication", action="store_true", help="bytes sent, on processes over gloo")
    arguments = parser.parse_args()
    if arguments.communication:
        communication()
        return
    if arguments.published:
        published()
        return
    print(
        "| step | pictures | GFLOP measured | planned | difference | peak MB measured | planned | difference | peak |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for number, case in enumerate(CASES):
        if arguments.only is None or number in arguments.only:
            compare(*case)


if __name__ == "__main__":
    main()
