"""Training steps of the embedded model beside TRL's ``AlignPropTrainer`` and a plain ``diffusers`` call, on a CPU.

Every program is a process that waits for its turn; a round gives each of them one step. All have the same model,
reward, prompts, sampling, batch, LoRA layers and optimizer settings; that they agree on the base model's reward and on
the number of trained parameters is checked. ``make bench`` makes the peers' environment; without one they are left out.

    make bench ARGS="--out /tmp/bench"
    python -m benchmarks.bench --peers .venv/peers/bin/python --pairs 9
    python -m benchmarks.bench --peers .venv/peers/bin/python --to-reward 14.1 --out /tmp/bench   # hours
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
from safetensors.torch import save_file

from benchmarks.judge import table
from benchmarks.turns import PHASES, Worker, mean_reward
from nemo_aligner_diffusion.config.load import load_settings
from nemo_aligner_diffusion.data.prompts import read_prompts
from nemo_aligner_diffusion.diffusion.families import UNET_LORA
from nemo_aligner_diffusion.diffusion.network.rollout_network import fast_in_bf16
from nemo_aligner_diffusion.diffusion.trajectory import sample
from nemo_aligner_diffusion.embedded_assets import embedded_model_path, embedded_prompts_path, embedded_reward_path
from nemo_aligner_diffusion.rewards import restore_reward
from nemo_aligner_diffusion.runtime.signals import Interruption
from nemo_aligner_diffusion.training.run import Given, train

BATCH = 8
FLOOR = "diffusers, no gradient"
Ask = Callable[[str], dict[str, Any]]  # a command -> a worker's answer
Table = tuple[list[str], list[list[object]]]


@dataclass(frozen=True)
class Program:
    """A recipe of ours with further words, or one of the peers: ``trl`` or ``diffusers``.

    Attributes:
        beside: the program whose steps its own are compared with.
        active: steps with gradient, counted from the last, of ``trl``.
    """

    recipe: str
    words: tuple[str, ...] = ()
    beside: str = ""
    active: int = 0


PROGRAMS = {  # in the order of their turns
    "DRaFT-1": Program("draft_k_sd", ("model.truncation_steps=1",), "TRL AlignProp, K = 1"),
    "TRL AlignProp, K = 1": Program("trl", active=1),
    "DRaFT+, K = 5": Program("draftp_sd", ("model.truncation_steps=5",), "TRL AlignProp, K = 5"),
    "TRL AlignProp, K = 5": Program("trl", active=5),
    "DRTune, K = 5": Program(  # all steps are made, as by the others
        "drtune_sd", ("model.drtune.train_steps=5", "model.drtune.early_stop_steps=0"), "TRL AlignProp, K = 5"
    ),
    FLOOR: Program("diffusers"),
}


class Turns(pl.Callback):
    """Makes a training run of ours a worker: it waits before each step."""

    def __init__(self, worker: Worker, validation: list[str]) -> None:
        self.worker, self.validation = worker, validation

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.worker.watch(module.model.networks["vae"].decoder)
        if self.worker.next_step(lambda: self._validate(module)):
            module.kept_steps = None

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
        self.worker.enter("optimizer")

    def _validate(self, module: Any) -> dict[str, Any]:
        model = module.model

        def pictures(prompts: list[str], generators: list[torch.Generator]) -> torch.Tensor:
            return sample(model, generators, model.inputs(prompts, **vars(module.sampling)))

        trained = sum(p.numel() for _, p in model.trainable_parameters())
        return {"reward": mean_reward(self.validation, pictures, module.reward), "trained": trained}


def ours(given: Mapping[str, Any]) -> None:
    """The program itself, without checkpoints, export and report."""
    recipe = given["recipe"]
    words = [
        *given["words"], f"model.global_batch_size={BATCH}", f"model.seed={given['seed']}", "sched=constant",
        f"model.optim.lr={given['rate']}", f"trainer.{recipe}.max_steps=1000000", "trainer.accelerator=cpu",
        f"trainer.{recipe}.val_check_interval=0", "report.enable=false", "exp_manager.create_tensorboard_logger=false",
        f"exp_manager.explicit_log_dir={tempfile.mkdtemp(dir=given['folder'])}",
    ]  # fmt: skip
    turns = Turns(Worker.on_standard_streams(), given["validation"])
    train(load_settings(recipe, words), Interruption(), Given(silent=True, keep=False, callbacks=[turns]))


@contextmanager
def running(name: str, python: str | None, given: Mapping[str, Any]) -> Iterator[Ask]:
    """The process of a program: what asks it."""
    program = PROGRAMS[name]
    module = ["benchmarks.bench", "--as-worker"] if program.recipe.endswith("_sd") else ["benchmarks.peers"]
    command = [str(python) if program.recipe == "trl" else sys.executable, "-m", *module]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}  # accelerate would take a GPU
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    root = Path(__file__).resolve().parents[1]
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, cwd=root, env=environment, stderr=said, **pipes) as process,
    ):
        streams: Any = process

        def ask(command: str) -> dict[str, Any]:
            streams.stdin.write(f"{command}\n")
            answer = streams.stdout.readline()
            if not answer:
                said.seek(0)
                raise SystemExit(f"{name} ended with status {process.wait()}:\n{said.read()[-3000:]}")
            return dict(json.loads(answer))

        try:
            streams.stdin.write(json.dumps({**given, **asdict(program)}) + "\n")
            yield ask
        finally:
            process.kill()


def given_to_all(folder: Path) -> dict[str, Any]:
    """What programs are told, and the embedded reward in files that peers can read."""
    settings = load_settings("draft_k_sd").model
    reward: Any = restore_reward(embedded_reward_path())
    prompts = {split: read_prompts(str(embedded_prompts_path(split))) for split in ("train", "validation")}
    reward.model.save_pretrained(folder / "clip")
    texts = list(dict.fromkeys([*prompts["train"], *prompts["validation"]]))
    rows = reward.embed_texts(texts).unbind()
    save_file({text: row.clone() for text, row in zip(texts, rows, strict=True)}, folder / "texts.safetensors")
    tuning = settings.peft.lora_tuning
    return {
        "folder": str(folder), "model": str(embedded_model_path()), "prompts": prompts["train"], "batch": BATCH,
        "validation": prompts["validation"], "mean": reward.preprocessing.mean, "std": reward.preprocessing.std,
        "steps": settings.infer.inference_steps, "guidance": settings.infer.unconditional_guidance_scale,
        "lora": {"r": tuning.adapter_dim, "lora_alpha": tuning.alpha, "target_modules": list(UNET_LORA)},
    }  # fmt: skip


def base_rewards(ask: Mapping[str, Ask]) -> dict[str, float]:
    """By program the validation reward before the first step.

    Raises:
        SystemExit: they differ, or the numbers of trained parameters do.
    """
    answers = {name: program("validate") for name, program in ask.items()}
    rewards = {name: answer["reward"] for name, answer in answers.items()}
    trained = {answer["trained"] for name, answer in answers.items() if name != FLOOR}
    if max(rewards.values()) - min(rewards.values()) > 1e-3 or len(trained) > 1:
        raise SystemExit(f"the programs do not train the same: {answers}")
    return rewards


def matmul_peak(size: int = 1536, repeats: int = 5) -> float:
    """Operations a second of float32 matrix products, the best of some."""
    a, b = torch.randn(2, size, size)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


def compare(ask: Mapping[str, Ask], pairs: int, minutes: float) -> dict[str, Any]:
    """``rounds``: by program the answer to a step, and the matmul peak; ``operations``: by program, of a step."""
    began, rounds = time.monotonic(), []
    base_rewards(ask)
    for number in range(pairs + 1):  # the first warms up
        if number > 1 and time.monotonic() - began > 60 * minutes:
            break
        rounds.append({"peak": matmul_peak(), **{name: program("step") for name, program in ask.items()}})
        print(f"round {number} of {pairs}", *(f"{n} {rounds[-1][n]['seconds']:.2f} s" for n in ask), sep="; ")
    return {"rounds": rounds[1:], "operations": {name: program("count")["operations"] for name, program in ask.items()}}


def spread(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f}–{max(values):.2f})" if values else ""


def table_of_steps(measured: Mapping[str, Any]) -> Table:
    """Medians over the rounds; ratios are within a round."""
    rounds = measured["rounds"]
    columns = ["program", "pictures/s", *(f"{phase}, s" for phase in PHASES), "peak, GB", "Tflop a step",
               "of matmul peak", "step / TRL's of this K", "in processor time", "rollout / plain call's"]  # fmt: skip
    rows: list[list[object]] = []
    for name, operations in measured["operations"].items():
        beside = PROGRAMS[name].beside
        share = median(operations / one[name]["seconds"] / one["peak"] for one in rounds)
        steps, processor = ([one[name][clock] / one[beside][clock] for one in rounds if beside in one]
                            for clock in ("seconds", "processor"))  # fmt: skip
        rollouts = [one[name]["phases"]["rollout"] / one[FLOOR]["phases"]["rollout"]
                    for one in rounds if FLOOR in one and name != FLOOR]  # fmt: skip
        rows.append([
            name,
            f"{median(BATCH / one[name]['seconds'] for one in rounds):.2f}",
            *(f"{median(one[name]['phases'][phase] for one in rounds):.2f}" for phase in PHASES),
            f"{max(one[name]['peak'] for one in rounds) / 1e9:.2f}",
            f"{operations / 1e12:.3f}", f"{100 * share:.0f} %", spread(steps), spread(processor), spread(rollouts),
        ])  # fmt: skip
    return columns, rows


def climb(ask: Mapping[str, Ask], reward: float, limit: float, every: int) -> dict[str, list[tuple[float, float]]]:
    """By program ``(seconds of training, validation reward)`` until ``reward`` or ``limit``; steps in alternation."""
    points = {name: [(0.0, base)] for name, base in base_rewards(ask).items()}
    if (base := max(at for ((_, at),) in points.values())) >= reward:
        raise SystemExit(f"--to-reward {reward:g}: expected more than the base model's {base:.4g}")
    seconds, going = dict.fromkeys(ask, 0.0), list(ask)
    while going:
        for _, name in itertools.product(range(every), going):
            seconds[name] += ask[name]("step")["seconds"]
        for name in going:
            points[name].append((seconds[name], ask[name]("validate")["reward"]))
        going = [name for name in going if points[name][-1][1] < reward and seconds[name] < limit]
    return points


def seconds_until(points: Sequence[tuple[float, float]], reward: float) -> float:
    """When ``reward`` is reached, between two of ``(seconds, reward)`` on the line that joins them; infinite: never."""
    for (before, low), (after, high) in itertools.pairwise(points):
        if low < reward <= high:
            return before + (after - before) * (reward - low) / (high - low)
    return math.inf


def table_of_times(runs: Sequence[Mapping[str, Any]], reward: float) -> Table:
    """Each program at the rate with which it is there first, by the median over seeds; ratios are within a seed."""
    best: dict[str, tuple[float, list[float]]] = {}
    for name in runs[0]["points"]:
        by_rate: dict[float, list[float]] = {}
        for run in runs:
            by_rate.setdefault(run["rate"], []).append(seconds_until(run["points"][name], reward))
        best[name] = min(by_rate.items(), key=lambda found: median(found[1]))
    (last, (_, theirs)), columns = list(best.items())[-1], ["program", "best rate", f"seconds to {reward:g}"]
    rows: list[list[object]] = [
        [
            name,
            f"{rate:g}",
            spread(times),
            # a rate may be under way, with fewer seeds yet
            spread([a / b for a, b in zip(times, theirs, strict=False) if a + b < math.inf]),
        ]
        for name, (rate, times) in best.items()
    ]
    return [*columns, f"seconds / those of {last}"], rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=os.path.abspath, help="Python of benchmarks/peers.txt's environment, for TRL's")
    parser.add_argument("--out", type=Path, help="folder for bench.md and bench.json; without: printed only")
    parser.add_argument(
        "--programs",
        nargs="+",
        choices=PROGRAMS,
        help="default: all; to a reward the first two, the last is compared with",
    )
    parser.add_argument("--pairs", type=int, default=9, help="steps of each program that count (default 9)")
    parser.add_argument("--minutes", type=float, default=10.0, help="after which no further ones begin (default 10)")
    parser.add_argument("--to-reward", type=float, metavar="R", help="train until the validation reward is R")
    parser.add_argument("--rates", type=float, nargs="+", default=[4e-4, 1.2e-3, 3e-3], help="learning rates for that")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="for that, too")
    parser.add_argument("--every", type=int, default=3, help="steps between validations, whose time is not counted")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of training after which a run is given up")
    parser.add_argument("--as-worker", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.as_worker:
        return ours(json.loads(sys.stdin.readline()))
    target, names = chosen.to_reward, chosen.programs or list(PROGRAMS)[: None if chosen.to_reward is None else 2]
    names = [name for name in names if chosen.peers or PROGRAMS[name].recipe != "trl"]
    machine = {
        "torch": torch.__version__, "threads": torch.get_num_threads(),
        "kernels": torch.backends.cpu.get_cpu_capability(), "bf16 rollouts": fast_in_bf16(torch.device("cpu")),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="nad-bench-") as folder:
        given = given_to_all(Path(folder))

        def measure(what: Callable[[dict[str, Ask]], Any], rate: float, seed: int, **more: Any) -> Any:
            told = {**given, **more, "rate": rate, "seed": seed}
            with ExitStack() as stack:
                return what({name: stack.enter_context(running(name, chosen.peers, told)) for name in names})

        def write(found: Table, measured: Any) -> None:
            text = "\n".join([table(*found), *(f"{key}: {value}" for key, value in machine.items()), ""])
            print(text)
            if chosen.out is not None:
                chosen.out.mkdir(parents=True, exist_ok=True)
                (chosen.out / "bench.md").write_text(text, encoding="utf-8")
                written = {"machine": machine, "arguments": vars(chosen), "measured": measured}
                (chosen.out / "bench.json").write_text(json.dumps(written, indent=1, default=str), encoding="utf-8")

        if target is None:
            few, pairs, minutes = given["validation"][:BATCH], chosen.pairs, chosen.minutes
            steps = measure(lambda ask: compare(ask, pairs, minutes), chosen.rates[0], 1, validation=few)
            return write(table_of_steps(steps), steps)
        runs = []
        for rate, seed in itertools.product(chosen.rates, chosen.seeds):
            points = measure(lambda ask: climb(ask, target, chosen.limit, chosen.every), rate, seed)
            runs.append({"rate": rate, "seed": seed, "points": points})
            write(table_of_times(runs, target), runs)  # of what there is: the whole takes hours


if __name__ == "__main__":
    main()
