"""DRaFT+ on two nodes of a real Slurm, preempted, requeued, at its time limit: the result is the undisturbed run's.

    python tests/slurm/run.py [--keep FOLDER]        (or: make test-slurm)

Needs this package with its dependencies, and Slurm, or apt to fetch it (cluster.py). Ends with 0 if every check held, 1
if not, and 0 with a printed reason where Slurm is not to be had at all (2 with NAD_REQUIRE_SLURM=1).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from cluster import Cluster, Unavailable
from compare import differences

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = REPOSITORY / "examples" / "mm" / "slurm"
STEPS = 16
# Small pictures of the embedded model; one process a node, each with a data worker, which Slurm's signals reach, too.
SETTINGS = [
    "trainer.accelerator=cpu",
    f"trainer.draftp_sd.max_steps={STEPS}",
    "trainer.draftp_sd.val_check_interval=8",
    "trainer.draftp_sd.save_interval=5",
    "model.data.validation.max_prompts=2",
    "model.micro_batch_size=1",
    "model.global_batch_size=4",
    "model.infer.inference_steps=4",
    "model.truncation_steps=2",
    "model.data.num_workers=1",
    "exp_manager.create_tensorboard_logger=False",
    "exp_manager.ema.enable=True",
]
OVER = ("COMPLETED", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT", "CANCELLED", "BOOT_FAIL", "DEADLINE")


class Job:
    """One submitted job and its run directory."""

    def __init__(self, cluster: Cluster, name: str, folder: Path, script: str, *options: str, tasks: int = 1) -> None:
        self.cluster, self.name = cluster, name
        self.run = folder / name
        self.log = folder / f"{name}.log"
        shrunk = ["--nodes=2", f"--ntasks-per-node={tasks}", "--gpus-per-node=0", "--cpus-per-task=1"]
        for variable, value in {"RUN": str(self.run), "PYTHON": sys.executable}.items():
            cluster.environment[variable] = value
        places = [f"--job-name={name}", f"--output={self.log}", f"--chdir={REPOSITORY}"]
        words = ["sbatch", "--parsable", *places, *shrunk, *options]
        self.id = cluster.run(*words, str(SCRIPTS / script), *SETTINGS).strip()
        self.submitted = time.monotonic()
        say(f"{name}: job {self.id}")

    @property
    def state(self) -> dict[str, str]:
        return self.cluster.job(self.id)

    @property
    def restarts(self) -> int:
        return int(self.state["Restarts"])

    def steps(self) -> int:
        with contextlib.suppress(OSError):
            return max(sum(1 for _ in open(self.run / "metrics.csv")) - 1, 0)
        return 0

    def wait(self, what: str, condition: Callable[[], bool], seconds: float = 600) -> None:
        end = time.monotonic() + seconds
        while True:
            state = self.state["JobState"]  # before the condition: what was so when the job ended stays so
            if condition():
                break
            if state in OVER:
                raise Failure(f"{self.name}: job {state}, waiting for {what}")
            if time.monotonic() > end:
                raise Failure(f"{self.name}: not within {seconds:.0f} s: {what} (job {state})")
            time.sleep(0.3)
        say(f"{self.name}: {what} after {time.monotonic() - self.submitted:.0f} s")

    def wait_for_step(self, step: int) -> None:
        self.wait(f"step {step}", lambda: self.steps() >= step)

    def wait_for_log(self, words: str) -> None:
        self.wait(f"{words!r} in its log", lambda: words in self.log.read_text(errors="replace"))

    def wait_for_restart(self, number: int) -> None:
        self.wait(f"restart {number} in the queue", lambda: self.restarts >= number)

    def wait_for_end(self) -> None:
        self.wait("the end", lambda: self.state["JobState"] == "COMPLETED")

    def hold(self) -> None:
        """Stop its processes where they are, so that what is to disturb the job finds it at work, however fast it is.

        Whatever Slurm sends in the end, it sends SIGCONT before it; but only once it knows that they are stopped.
        """
        self.cluster.run("scancel", "--signal=STOP", self.id)
        self.wait("stopped", lambda: self.state["JobState"] == "STOPPED")


class Failure(Exception):
    """A check did not hold."""


def check(condition: bool, text: str) -> None:
    if not condition:
        raise Failure(text)
    say(f"ok: {text}")


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:5.0f} s] {text}", flush=True)


def same(job: Job, reference: Job, restarts: int) -> None:
    """The disturbed run ended as the undisturbed one, after so many restarts that its log tells of."""
    check(job.restarts == restarts, f"{job.name}: Slurm restarted it {job.restarts} times, expected {restarts}")
    log, state = job.log.read_text(errors="replace"), json.loads((job.run / "run.json").read_text())
    check(state["status"] == "finished", f"{job.name}: run.json says {state['status']}, expected finished")
    ends = [entry["status"] for entry in state["history"]]
    check(ends == ["interrupted"] * restarts, f"{job.name}: its earlier starts ended {ends}")
    steps = [entry["step"] for entry in state["history"]]
    check(steps == sorted(steps) and steps[0] > 0 and steps[-1] < STEPS, f"{job.name}: they ended at steps {steps}")
    for number in range(1, restarts + 1):
        text = f"restarted {number} time"
        check(text in log, f"{job.name}: the log says {text!r}")
    # torchrun's agents say with a traceback that one of them left the last barrier before another: all has ended well
    log = re.sub(r"^E\d{4} .*torch/distributed/elastic/agent/server/api\.py:\d+\] .*\n", "", log, flags=re.MULTILINE)
    traceback = log[log.find("Traceback") :][:3000] if "Traceback" in log else ""
    check(not traceback, f"{job.name}: no traceback in the log {traceback}".rstrip())
    found = differences(job.run, reference.run, STEPS)
    for line in [line for lines in found.values() for line in lines]:
        say(f"    {line}")
    for what, lines in found.items():
        check(not lines, f"{job.name}: {what} as in {reference.name}")


def run(folder: Path) -> None:
    # Preempted without grace, a job has KillWait for its step and its checkpoint: generous, for busy test machines.
    with Cluster(folder / "cluster", kill_wait=120) as cluster:
        # Both nodes are this machine, and no name server knows their names; elsewhere the scripts find the first one.
        cluster.environment.update(MASTER_ADDR="127.0.0.1", HF_HUB_OFFLINE="1", OMP_WAIT_POLICY="PASSIVE")
        cluster.environment.update(PYTHONPATH=str(REPOSITORY), IMAGE="image.sif", GPUS="1")
        cluster.environment["PATH"] = f"{_stand_in(folder)}:{cluster.environment['PATH']}"
        say("two nodes are up")
        try:
            _scenarios(cluster, folder)
        except BaseException:
            print(cluster.run("squeue", check=False), cluster.logs(), sep="\n")
            for log in sorted(folder.glob("*.log")):
                print(f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-60:], sep="\n", flush=True)
            raise


def _scenarios(cluster: Cluster, folder: Path) -> None:
    safe = "--partition=high"
    reference = Job(cluster, "undisturbed", folder, "many_nodes.sub", safe)
    preempted = Job(cluster, "preempted", folder, "many_nodes.sub")
    limited = Job(cluster, "time_limit", folder, "many_nodes.sub", safe, "--signal=USR1@150")

    # Another job with more priority takes processors; there are enough of them only if `preempted` gives up its own.
    limited.wait_for_step(1)
    limited.hold()
    preempted.wait_for_step(2)
    preempted.hold()
    other = _urgent(cluster, processors=2)

    # The time limit comes near: Slurm sends SIGUSR1 (it looks every 30 s, and does so up to 30 s early), the program
    # itself goes back into the queue.
    cluster.run("scontrol", "update", f"JobId={limited.id}", f"TimeLimit={_minutes(limited) + 2}")
    preempted.wait_for_restart(1)
    limited.wait_for_log("SIGUSR1: stopping")
    cluster.run(
        "scontrol", "update", f"JobId={limited.id}", "TimeLimit=60"
    )  # before the next start, which is to finish
    limited.wait_for_restart(1)
    preempted.wait("the other job's end", lambda: cluster.job(other)["JobState"] == "COMPLETED")

    # An administrator requeues it.
    preempted.wait_for_step(STEPS // 2)
    preempted.hold()
    cluster.run("scontrol", "requeue", preempted.id)
    preempted.wait_for_restart(2)

    reference.wait_for_end()
    check(reference.steps() == STEPS, f"undisturbed: {reference.steps()} steps in metrics.csv, expected {STEPS}")
    check(any((reference.run / "export").rglob("*.safetensors")), "undisturbed: it exported weights")
    for job, restarts in ((preempted, 2), (limited, 1)):
        job.wait_for_end()
        same(job, reference, restarts)

    # Two more job scripts. Preemption with a warning: the job still runs, and puts itself back before its time is up.
    # (No hold: torchrun counts on the signs of life that the nodes give each other.)
    launched = Job(cluster, "torchrun", folder, "many_nodes_torchrun.sub", "--partition=grace")
    contained = Job(cluster, "container", folder, "many_nodes_apptainer.sub", safe)
    contained.wait_for_step(2)
    contained.hold()
    launched.wait_for_step(1)
    _urgent(cluster, processors=3)
    launched.wait_for_log("SIGTERM: stopping")

    # Without Slurm's help: SIGUSR1 by hand, and a container in which there is no scontrol.
    cluster.run("scancel", "--signal=USR1", contained.id)
    cluster.run("scancel", "--signal=CONT", contained.id)
    for job in (launched, contained):
        job.wait_for_restart(1)
    for job in (launched, contained):
        job.wait_for_end()
        same(job, reference, restarts=1)


def _urgent(cluster: Cluster, processors: int) -> str:
    """Submit a short job that takes so many processors of each node, from others if need be; its number."""
    options = ["--parsable", "--partition=high", "--nodes=2", "--ntasks-per-node=1", f"--cpus-per-task={processors}"]
    return cluster.run("sbatch", *options, "--output=/dev/null", "--wrap", "srun sleep 1").strip()


def _stand_in(folder: Path) -> Path:
    """A program ``apptainer`` that runs the command as a container would in what matters here: without scontrol."""
    program = folder / "bin" / "apptainer"
    program.parent.mkdir(exist_ok=True)
    program.write_text(
        "#!/bin/bash\n"
        '[ "$1" = exec ] || exit 1\n'
        'while [ "$1" != image.sif ]; do shift || exit 1; done\n'
        "shift\n"
        "export PATH=/nonexistent\n"
        'exec "$@"\n'
    )
    program.chmod(0o755)
    return program.parent


def _minutes(job: Job) -> int:
    """How long the job has run, in whole minutes, rounded up."""
    hours, minutes, seconds = (int(part) for part in job.state["RunTime"].split(":"))
    return hours * 60 + minutes + (seconds > 0)


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(f"ended by {signal.Signals(number).name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work in this folder, and keep it")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)  # the daemons end also when CI's time is up
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="nad-slurm-"))
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    try:
        run(folder.resolve())
    except Unavailable as reason:
        required = os.environ.get("NAD_REQUIRE_SLURM") == "1"
        print(f"{'FAILED' if required else 'SKIPPED'}: no Slurm on this machine: {reason}")
        return 2 if required else 0
    except Failure as failure:
        print(f"FAILED: {failure}")
        return 1
    finally:
        if arguments.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    say("passed")
    return 0


STARTED = time.monotonic()

if __name__ == "__main__":
    sys.exit(main())
