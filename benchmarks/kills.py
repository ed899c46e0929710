"""Runs that are killed at random moments and resumed, compared with one that was not: byte for byte.

    python -m benchmarks.kills                        # 20 kills of one process
    python -m benchmarks.kills --kills 5 --processes 2 --words model.fsdp=true

Each case starts the program of examples/mm/stable_diffusion/train_sd_draftp.py (embedded model, few steps, small
pictures, adapters with dropout, averages, accumulation, warm-up) and sends SIGKILL to its whole process group at a
moment drawn at random: somewhere in a step, while the folder of a checkpoint is being written, just after it has got
its name, in a validation, in the export. Then it is started again with resume_if_exists. Half of the cases save in the
background. The processes are real; they are forked from this one, which has done the imports, because importing takes
longer than the run.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

STEPS, SAVE_EVERY, VALIDATE_EVERY = 8, 2, 3
TIMES = {"images_per_second", "peak_memory_bytes", "seconds"}  # columns that differ from run to run
WORDS = [
    "trainer.accelerator=cpu",
    f"trainer.draftp_sd.max_steps={STEPS}",
    f"trainer.draftp_sd.save_interval={SAVE_EVERY}",
    f"trainer.draftp_sd.val_check_interval={VALIDATE_EVERY}",
    "exp_manager.create_tensorboard_logger=false",
    "exp_manager.ema.enable=true",
    "exp_manager.ema.decay=0.7",
    "exp_manager.resume_if_exists=true",
    "model.infer.inference_steps=2",
    "model.infer.height=32",
    "model.infer.width=32",
    "model.truncation_steps=1",
    "model.kl_coeff=0.1",
    "model.micro_batch_size=1",
    "model.global_batch_size=2",
    "model.peft.lora_tuning.dropout=0.2",
    "model.optim.lr=1e-3",
    "model.optim.weight_decay=0.1",
    "sched=warmup_hold",
    "model.optim.sched.warmup_steps=3",
    "model.data.validation.max_prompts=2",
    "model.data.validation.seeds=[0]",
    "report.enable=false",
]
SECONDS_A_RUN = 900.0
MOST_EARLY = 10


@dataclass
class Case:
    """One run that is killed once, or not at all.

    Attributes:
        moment: what was aimed at, in words.
        in_background: whether checkpoints were written while training went on.
        early: runs that ended before the moment came, and were not killed.
        done: optimizer steps in metrics.csv when it was killed.
        newest: the newest complete checkpoint at that time.
        unfinished: whether a checkpoint was under way.
        wrong: files that are not those of the undisturbed run.
    """

    moment: str
    in_background: bool
    early: int = 0
    done: int = 0
    newest: str = ""
    unfinished: bool = False
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)


class Program:
    """The training program in processes of one process group.

    Args:
        processes: how many; each gets a launcher's variables, as from torchrun.
        words: the command line.
        log_file: gets what they print.
    """

    def __init__(self, processes: int, words: list[str], log_file: Path) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()  # a group of its own, which can be killed at once
            output = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os._exit(_lead(processes, words))

    def exit_code(self) -> int | None:
        """None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return None if pid == 0 else os.waitstatus_to_exitcode(status)

    def wait(self, seconds: float) -> int:
        deadline = time.monotonic() + seconds
        while (code := self.exit_code()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"a run took more than {seconds:.0f} s")
            time.sleep(0.02)
        return code

    def kill(self) -> bool:
        """SIGKILL to all of them in one call; False: they had ended before."""
        os.killpg(self.pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) == -signal.SIGKILL


def _lead(processes: int, words: list[str]) -> int:
    if processes == 1:
        return _train(words)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    ranks = []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            size = str(processes)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os._exit(_train(words))
        ranks.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
    return next((code for code in codes if code), 0)


def _train(words: list[str]) -> int:
    from nemo_aligner_diffusion.cli.train import main

    code = 1
    try:
        code = main("draftp_sd", words)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


# Moments: each waits until it has come and returns True, or returns False when the run has ended before.

Moment = Callable[[Path, Program, random.Random], bool]


def _until(condition: Callable[[], bool], program: Program) -> bool:
    deadline = time.monotonic() + SECONDS_A_RUN
    while not condition():
        if program.exit_code() is not None:
            return False
        if time.monotonic() > deadline:
            program.kill()
            raise TimeoutError("the moment to kill a run did not come")
        time.sleep(0.0005)
    return True


def rows(run: Path) -> int:
    """Optimizer steps in metrics.csv."""
    try:
        return max((run / "metrics.csv").read_text().count("\n") - 1, 0)
    except OSError:
        return 0


def in_a_step(run: Path, program: Program, dice: random.Random) -> bool:
    """Anywhere: after a step drawn at random, as much later as a step takes at most."""
    wanted = dice.randrange(STEPS)
    started = time.monotonic()
    if not _until(lambda: rows(run) >= wanted, program):
        return False
    longest = (time.monotonic() - started) / max(wanted, 1)
    time.sleep(dice.uniform(0.0, longest if wanted else 8.0))
    return True


def _a_save(dice: random.Random) -> str:
    return f"step_{dice.randrange(SAVE_EVERY, STEPS + 1, SAVE_EVERY):06d}"


def while_saving(run: Path, program: Program, dice: random.Random) -> bool:
    """The hidden folder of a checkpoint exists, and it is not complete yet, or just about."""
    folder = run / "checkpoints" / f".{_a_save(dice)}.tmp"
    if not _until(folder.exists, program):
        return False
    time.sleep(dice.uniform(0.0, 0.03))
    return True


def after_saving(run: Path, program: Program, dice: random.Random) -> bool:
    """A checkpoint has got its name: the marker, older checkpoints' removal and the validation are still to come."""
    folder = run / "checkpoints" / _a_save(dice)
    if not _until(folder.exists, program):
        return False
    time.sleep(dice.uniform(0.0, 0.02))
    return True


def in_validation(run: Path, program: Program, dice: random.Random) -> bool:
    """The step before a validation is written down, the pictures of the validation are being made or written."""
    wanted = dice.randrange(VALIDATE_EVERY, STEPS + 1, VALIDATE_EVERY)
    picture = run / "samples" / f"step_{wanted:06d}.png"
    if dice.random() < 0.5:
        came = _until(lambda: rows(run) >= wanted, program)
        time.sleep(dice.uniform(0.0, 0.5))
        return came
    came = _until(picture.exists, program)  # figures and table come next
    time.sleep(dice.uniform(0.0, 0.005))
    return came


def while_exporting(run: Path, program: Program, dice: random.Random) -> bool:
    """The last checkpoint is complete, or the last validation too: that validation or the export are under way."""
    checkpoint, validation = run / "checkpoints" / f"step_{STEPS:06d}", run / "validation.csv"

    def validated() -> bool:
        return validation.exists() and f"\n{STEPS}," in validation.read_text()

    if not _until(dice.choice((checkpoint.exists, validated)), program):
        return False
    time.sleep(dice.uniform(0.0, 0.1))
    return True


MOMENTS: dict[str, Moment] = {
    "in a step": in_a_step,
    "while saving": while_saving,
    "after saving": after_saving,
    "in validation": in_validation,
    "at the end": while_exporting,
}


def comparable(run: Path) -> Iterator[tuple[str, bytes]]:
    """What a run leaves that does not depend on the clock: name and content."""
    for name in ("validation.csv", "validation_samples.json"):
        yield name, (run / name).read_bytes()
    yield "export", weights(run / "export" / "pytorch_lora_weights.safetensors")
    with open(run / "metrics.csv", newline="") as file:
        table = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]))
    writer.writeheader()
    writer.writerows(table)
    yield "metrics.csv", text.getvalue().encode()
    for picture in sorted((run / "samples").iterdir()):
        yield f"samples/{picture.name}", picture.read_bytes()
    last = run / "checkpoints" / f"step_{STEPS:06d}"
    for file in sorted(last.iterdir()):
        yield f"checkpoints/{file.name}", file.read_bytes()
    yield "checkpoints", " ".join(sorted(path.name for path in (run / "checkpoints").iterdir())).encode()


def weights(file: Path) -> bytes:
    """Names, types, shapes and bytes of a safetensors file's tensors, and its other entries: in the order of names.

    The library that writes the export puts its entries in an order that differs from process to process.
    """
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    parts = [json.dumps(header.pop("__metadata__", {}), sort_keys=True).encode()]
    for name in sorted(header):
        begin, end = header[name].pop("data_offsets")
        parts += [name.encode(), json.dumps(header[name], sort_keys=True).encode()]
        parts.append(content[8 + length + begin : 8 + length + end])
    return b"\n".join(parts)


def play(case: Case, moment: Moment | None, run: Path, processes: int, words: list[str], dice: random.Random) -> None:
    """Start, kill at the moment, start again until it ends.

    Raises:
        RuntimeError: a run ended with an error.
    """
    settings = [*WORDS, f"trainer.devices={processes}", f"exp_manager.explicit_log_dir={run}", *words]
    if case.in_background:
        settings.append("exp_manager.checkpoint_callback_params.async_save=true")
    log_file = run.with_suffix(".log")
    started = time.monotonic()
    program = Program(processes, settings, log_file)
    if moment is not None:
        while not (moment(run, program, dice) and program.kill()):
            case.early += 1  # it had ended before: another run, another draw
            if case.early == MOST_EARLY:
                raise RuntimeError(f"{case.early} runs ended before they were killed:\n{log_file.read_text()[-4000:]}")
            shutil.rmtree(run)
            program = Program(processes, settings, log_file)
        case.done = rows(run)
        complete = sorted(path.name for path in run.glob("checkpoints/step_??????"))
        case.newest = complete[-1] if complete else "none"
        case.unfinished = any(run.glob("checkpoints/.*"))
        program = Program(processes, settings, log_file)
    code = program.wait(SECONDS_A_RUN)
    if code != 0:
        raise RuntimeError(f"the run ended with {code}; its output:\n{log_file.read_text()[-4000:]}")
    case.seconds = time.monotonic() - started


def run_cases(kills: int, processes: int, words: list[str], seed: int, folder: Path) -> list[Case]:
    """``kills`` cases, compared with an undisturbed run; prints a line for each."""
    whole = folder / "whole"
    undisturbed = Case("none", in_background=False)
    play(undisturbed, None, whole, processes, words, random.Random(seed))
    expected = dict(comparable(whole))
    print(f"undisturbed run: {undisturbed.seconds:.1f} s, {len(expected)} files compared", flush=True)
    print(f"{'':>3} {'moment':<14} {'saves':<10} {'steps':>5} {'newest':<12} {'half-written':<12} result", flush=True)
    cases = []
    for number in range(kills):
        dice = random.Random(f"{seed} {processes} {number}")
        moment = list(MOMENTS)[number % len(MOMENTS)]
        case = Case(moment, in_background=number // len(MOMENTS) % 2 == 1)
        run = folder / f"killed_{number:02d}"
        play(case, MOMENTS[moment], run, processes, words, dice)
        found = dict(comparable(run))
        case.wrong = sorted(name for name in expected | found if expected.get(name) != found.get(name))
        cases.append(case)
        print(
            f"{number + 1:>3} {moment:<14} {'behind' if case.in_background else 'at once':<10} "
            f"{case.done:>5} {case.newest:<12} "
            f"{'yes' if case.unfinished else '':<12} "
            f"{'equal' if not case.wrong else 'DIFFERENT: ' + ', '.join(case.wrong)} ({case.seconds:.0f} s)",
            flush=True,
        )
        if not case.wrong:
            shutil.rmtree(run)
    equal = sum(not case.wrong for case in cases)
    early = sum(case.early for case in cases)
    print(f"{kills} killed, {equal} equal to the undisturbed run in every byte compared", flush=True)
    print(f"{early} more had ended before the moment came, and were started anew", flush=True)
    return cases


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs go; by default a temporary folder")
    parser.add_argument("--words", nargs="*", default=[], help="further words of the training's command line")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # and no threads in the process that forks
    import nemo_aligner_diffusion.training.run  # noqa: F401  what the forked processes need

    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        cases = run_cases(arguments.kills, arguments.processes, arguments.words, arguments.seed, folder)
    return 1 if any(case.wrong for case in cases) else 0


if __name__ == "__main__":
    sys.exit(main())
