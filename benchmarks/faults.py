"""Seconds from a fault on one of two ranks to the end of the last process, and what the watching for faults costs.

    python -m benchmarks.faults                 # every fault; some minutes
    python -m benchmarks.faults kill raise      # only these
    python -m benchmarks.faults --cost 40       # time of a step with the watching and without it, 40 rounds; 10 minutes

Real runs of examples/mm/stable_diffusion/train_sd_draftp.py on the embedded model. A reward of the user's own
(tests/faulty_reward.py) commits the fault in its rank and notes the moment.

For the cost, two runs of two processes stand side by side, and all but one of them are stopped (SIGSTOP): each gets
some seconds, then the next one. So all of them meet the same machine, however busy it is. Steps are as short as they
can be, so that the cost is more than anybody's.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = str(ROOT / "examples" / "mm" / "stable_diffusion" / "train_sd_draftp.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
LIMIT = 20  # seconds: of silence and without progress, so that the table shows what comes on top
# name -> (launcher's words, the reward's settings)
FAULTS = {
    "raise": ([], "what:raise"),
    "raise, torchrun": (TORCHRUN, "what:raise"),
    "kill": ([], "what:kill"),
    "kill, torchrun": (TORCHRUN, "what:kill"),
    "kill rank 0": ([], "what:kill,rank:0"),
    "exit": ([], "what:exit"),
    "stop": ([], "what:stop"),
    "loop": ([], "what:loop"),
    "loop, torchrun": (TORCHRUN, "what:loop"),
}
RUN = [
    "trainer.accelerator=cpu",
    "trainer.devices=2",
    "trainer.draftp_sd.val_check_interval=0",
    "trainer.draftp_sd.save_interval=0",
    "model.infer.inference_steps=4",
    "model.truncation_steps=1",
    "exp_manager.create_tensorboard_logger=false",
]
WORDS = [
    *RUN,
    "rm=custom",
    "rm.import_path=faulty_reward:FaultyReward",
    "trainer.draftp_sd.max_steps=20",
    "model.micro_batch_size=2",
    "model.global_batch_size=4",
    f"exp_manager.fault_tolerance.silence_timeout={LIMIT}",
    f"exp_manager.fault_tolerance.rank_heartbeat_timeout={LIMIT}",
    f"exp_manager.fault_tolerance.minimum_heartbeat_timeout={LIMIT}",
]
WARM_UP = 20  # steps
TURN = 5.0  # seconds
COST = [
    *RUN,
    "trainer.draftp_sd.max_steps=1000000",
    "model.micro_batch_size=1",
    "model.global_batch_size=2",
]
WATCHING = {"nothing": "false", "faults": "true"}  # name -> both keys: of faults, and of slow ranks


def commit(name: str, folder: Path) -> tuple[float, int, str]:
    """One fault: seconds until all processes are gone, the exit code, the screen from the fault on."""
    launcher, reward = FAULTS[name]
    once = folder / "fault"
    command = [sys.executable, *launcher, PROGRAM]
    command += [*WORDS, f"+rm.kwargs={{{reward},at:6,once:{once}}}", f"exp_manager.explicit_log_dir={folder / 'run'}"]
    # both streams into one file whose last holder is the last process: it outlives the launcher
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)
    ended = time.monotonic()
    began = float(once.read_text())
    screen = done.stdout
    return ended - began, done.returncode, screen[max(screen.find("error on rank"), 0) :]


class Training:
    """A run of two processes that can be stopped and continued."""

    def __init__(self, name: str, folder: Path) -> None:
        self.run = folder / name.replace(" ", "_")
        keys = ("create_fault_tolerance_callback", "create_straggler_detection_callback")
        words = [f"exp_manager.{key}={WATCHING[name]}" for key in keys]
        words += [f"exp_manager.explicit_log_dir={self.run}"]
        self.output = open(folder / f"{self.run.name}.log", "wb")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, PROGRAM, *COST, *words],
            stdout=self.output,
            stderr=self.output,
            env=ENVIRONMENT,
        )

    def processes(self) -> list[psutil.Process]:
        """The launcher and the ranks."""
        launcher = psutil.Process(self.process.pid)
        return [launcher, *launcher.children(recursive=True)]

    def signal(self, number: signal.Signals) -> None:
        for process in self.processes():
            process.send_signal(number)

    def processor_seconds(self) -> float:
        """Of all threads so far."""
        return sum(times.user + times.system for times in (process.cpu_times() for process in self.processes()))

    def steps(self) -> list[float]:
        """Seconds of every step so far."""
        file = self.run / "metrics.csv"
        if self.process.poll() is not None:
            raise SystemExit(f"a run has ended: {Path(self.output.name).read_text()[-2000:]}")
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
        complete = [line for line in lines if line.endswith("\n")]
        return [float(row["images"]) / float(row["images_per_second"]) for row in csv.DictReader(complete)]

    def turn(self) -> float:
        """Mean seconds of the steps that began and ended within a turn."""
        before = len(self.steps())
        self.signal(signal.SIGCONT)
        time.sleep(TURN)
        while len(self.steps()) < before + 3:
            time.sleep(0.2)
        self.signal(signal.SIGSTOP)
        return statistics.mean(self.steps()[before + 1 :])  # the first one was stopped in its middle

    def close(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.signal(signal.SIGKILL)
        self.process.wait()
        self.output.close()


def cost(rounds: int) -> None:
    """Each round gives every run its turn, in an order that changes; ratios are taken within a round."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        runs = {}
        for kind in WATCHING:
            runs[kind] = Training(kind, Path(name))
            stack.callback(runs[kind].close)
        while any(len(run.steps()) < WARM_UP for run in runs.values()):
            time.sleep(1)
        for run in runs.values():
            run.signal(signal.SIGSTOP)
        seconds: dict[str, list[float]] = {kind: [] for kind in runs}
        begun = {kind: (len(run.steps()), run.processor_seconds()) for kind, run in runs.items()}
        for number in range(rounds):
            order = list(runs)[number % 2 :] + list(runs)[: number % 2]
            for kind in order:
                seconds[kind].append(runs[kind].turn())
            print(", ".join(f"{kind} {1000 * values[-1]:.1f} ms" for kind, values in seconds.items()), flush=True)
        steps = {kind: len(run.steps()) - begun[kind][0] for kind, run in runs.items()}
        used = {kind: (run.processor_seconds() - begun[kind][1]) / steps[kind] for kind, run in runs.items()}
    print("\nratios to the run that watches for nothing: time of a step, by round, and processor time, of all steps\n")
    print("| watching for | steps | time: median | quartiles | least, most | processor time |\n|" + " --- |" * 6)
    for kind, values in seconds.items():
        ratios = [value / nothing for value, nothing in zip(values, seconds["nothing"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        spread = f"{low:.3f}, {high:.3f} | {min(ratios):.3f}, {max(ratios):.3f}"
        print(f"| {kind} | {steps[kind]} | {middle:.3f} | {spread} | {used[kind] / used['nothing']:.3f} |")


def main(names: list[str]) -> None:
    rows = []
    for name in names or list(FAULTS):
        with tempfile.TemporaryDirectory() as folder:
            seconds, code, screen = commit(name, Path(folder))
        ours = screen.split("Traceback (most recent call last)")[0].splitlines()[:14]
        print(f"--- {name}: {seconds:.1f} s, exit code {code}\n" + "\n".join(ours), flush=True)
        told = re.findall(r"^error on rank (\d)", screen, re.MULTILINE)
        rows.append(f"| {name} | {seconds:.1f} | {code} | {' '.join(told)} |")
    print("\n| fault | seconds until down | exit code | ranks named |\n| --- | --- | --- | --- |")
    print("\n".join(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "faults", nargs="*", metavar="FAULT", help=f"of {', '.join(FAULTS)}; all of them if none is given"
    )
    parser.add_argument("--cost", type=int, metavar="ROUNDS", help="what the watching costs, in so many rounds")
    arguments = parser.parse_args()
    if arguments.cost:
        cost(arguments.cost)
    else:
        main(arguments.faults)
