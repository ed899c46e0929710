"""The processes of a run: starting them on one machine, and joining them before anything is loaded.

Lightning starts processes and makes the process group in ``trainer.fit``, after the model has been built: too late for
loading once per node. Here both happen at the start of the program. Under ``torchrun`` and ``srun`` the processes exist
already; without them, ``trainer.devices=N`` makes this process start N others like itself and look after them, before
it has imported torch. Lightning finds the launcher's variables and the process group, and uses both as they are.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.runtime.health.launch import CLAIMS_VARIABLE
from nemo_aligner_diffusion.runtime.health.messages import EXIT_CODE as RANK_LOST

if TYPE_CHECKING:
    import torch

# Exit codes of a process that ended as it should: finished, or closed after Ctrl-C, SIGUSR1 or SIGTERM.
ENDED_WELL = (0, 130, 138, 143)
# After an error of its own (exit codes of errors.py) a process may be exporting; after a crash nobody can go on.
SECONDS_TO_CLOSE = {2: 300.0, 3: 300.0}
SECONDS_AFTER_A_CRASH = 10.0  # then SIGTERM, and as long again until SIGKILL
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG, linux/prctl.h
_timeout = timedelta(minutes=30)  # torch's own default


def is_launched(environment: Mapping[str, str]) -> bool:
    """Whether ``torchrun``, ``srun``, or this module started this process as one of several."""
    if "LOCAL_RANK" in environment:
        return True
    # as Lightning decides: a shell inside an allocation has these variables, but nobody started its processes
    return "SLURM_NTASKS" in environment and environment.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def start_processes(
    devices: int, nodes: int, command: Sequence[str] | None = None, prepare: Callable[[], object] | None = None
) -> int | None:
    """Start the processes of this machine where nobody else has, and wait for them.

    Args:
        devices: processes a machine (``trainer.devices``).
        nodes: machines; with more than one each needs ``MASTER_ADDR``, ``MASTER_PORT`` and ``NODE_RANK``.
        command: what each process runs; by default what this one was started with.
        prepare: called before they are started; what it sets in the environment is set for all of them.

    Returns:
        ``None`` where this process is itself one of the run's (or the only one); else, after all have ended, the exit
        code for this process: 0, or that of the first that failed.

    Raises:
        ConfigurationError: several machines, and no launcher that knows them.
    """
    if devices * nodes == 1 or is_launched(os.environ):
        return None
    if nodes > 1 and not {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK"} <= os.environ.keys():
        raise ConfigurationError(
            f"trainer.num_nodes={nodes}: nothing says where the other machines are. Start the program with srun, or on "
            f"each machine with torchrun --nnodes={nodes} --nproc-per-node={devices} --rdzv-backend=c10d "
            "--rdzv-endpoint=HOST:PORT, or set MASTER_ADDR, MASTER_PORT and NODE_RANK"
        )
    if prepare is not None:
        prepare()
    node = int(os.environ.get("NODE_RANK", 0))
    shared = {
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": os.environ.get("MASTER_PORT") or str(free_port()),
        "NODE_RANK": str(node),
        "WORLD_SIZE": str(devices * nodes),
        "LOCAL_WORLD_SIZE": str(devices),
    }
    words = list(command) if command is not None else [sys.executable, *sys.orig_argv[1:]]
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="nad-") as claims, _forwarding(processes):
        shared[CLAIMS_VARIABLE] = claims
        for local in range(devices):
            ranks = {"RANK": str(node * devices + local), "LOCAL_RANK": str(local)}
            processes.append(
                subprocess.Popen(
                    words,
                    env={**os.environ, **shared, **ranks},
                    start_new_session=True,  # Ctrl-C comes to this process alone, which hands it on once
                    preexec_fn=_die_with_parent(),
                )
            )
        return _wait(processes)


def join(
    devices: int | Sequence[int], nodes: int, accelerator: str, timeout: timedelta = timedelta(minutes=30)
) -> torch.device:
    """Make the process group of all processes of the run, and say which device is this process's.

    Objects and CPU tensors travel by gloo, tensors on GPUs by NCCL. Nothing is made for one process, nor where
    Lightning will start the processes itself (a call of ``run_training`` from a program without a launcher).

    Args:
        devices, nodes, accelerator: as in section ``trainer``.
        timeout: after which a collective call that does not complete is an error; see :func:`collective_timeout`.

    Raises:
        ConfigurationError: this machine has not these devices.
    """
    import torch
    import torch.distributed as dist

    global _timeout
    _timeout = timeout
    indices = list(range(devices)) if isinstance(devices, int) else list(devices)
    cuda = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    if accelerator == "mps" and not torch.backends.mps.is_available():
        raise ConfigurationError(
            "trainer.accelerator = mps: PyTorch finds no Apple GPU here; expected auto, cpu or gpu"
        )
    if cuda and max(indices, default=0) >= torch.cuda.device_count():
        raise ConfigurationError(
            f"trainer.devices = {devices} with trainer.accelerator = {accelerator}: PyTorch sees "
            f"{torch.cuda.device_count()} GPUs here; ask for fewer, or set trainer.accelerator=cpu"
        )
    if not cuda and not isinstance(devices, int):
        raise ConfigurationError(
            f"trainer.devices = {list(devices)} with trainer.accelerator = {accelerator}: only GPUs have indices; "
            f"expected the number of processes, such as trainer.devices={len(indices)}"
        )
    several = len(indices) * nodes > 1 and is_launched(os.environ)
    rank, local = _rank(len(indices)) if several else (0, 0)
    device = torch.device("cuda", indices[local]) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if several and not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=_store_of_this_start(timeout),
            rank=rank,
            world_size=len(indices) * nodes,
            timeout=timeout,
        )
        # by gloo: a rank that ended before the others have reached all ranks (with an error that it has handed on,
        # say) would look to them like one that crashed: "connectFullMesh failed"
        dist.all_reduce(torch.zeros(1))
    return device


def collective_timeout() -> timedelta:
    """What :func:`join` was given. For each further process group: torch gives those a timeout of its own otherwise."""
    return _timeout


def end(code: int) -> None:
    """End this process at once if it has joined others; returns if not. For when nothing is left to be done.

    gloo's threads let go of Python objects after the last message: in an interpreter that is closing, they abort the
    process (exit code 134) or wait forever.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return
    for child in multiprocessing.active_children():  # data workers
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


class EndAtExit:
    """Calls :func:`end` behind all that is registered with ``atexit`` from now on: loggers, which send what they have.

    Attributes:
        code: the exit status; ``None``, or an exception that nobody caught, leaves the end to the interpreter.
    """

    def __init__(self) -> None:
        self.code: int | None = None
        atexit.register(self._end)

    def _end(self) -> None:
        if self.code is not None and getattr(sys, "last_type", None) is None:
            end(self.code)


def _rank(devices: int) -> tuple[int, int]:
    """This process's rank in the run and on its machine; sets what ``env://`` needs beside them."""
    from lightning_fabric.plugins.environments import SLURMEnvironment

    if "LOCAL_RANK" in os.environ:
        local = int(os.environ["LOCAL_RANK"])
        node = int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", 0)))
        return int(os.environ.get("RANK", node * devices + local)), local
    slurm = SLURMEnvironment(auto_requeue=False)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = slurm.main_address, str(slurm.main_port)
    return slurm.global_rank(), slurm.local_rank()


def _store_of_this_start(timeout: timedelta) -> Any:
    """torchrun's own store, which outlives the processes that ``--max-restarts`` starts again; None without one.

    Under a name of this start's own: else a process would look for another at the address that it had before.
    """
    import torch.distributed as dist

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
    return dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    """Until all have ended; when one fails, the others get a while and are then ended."""
    result, failed_at, allowed, terminated, lost = 0, 0.0, 0.0, False, False
    running = dict(enumerate(processes))
    while running:
        for number, process in list(running.items()):
            code = _exit_code(process)
            if code is None:
                continue
            del running[number]
            lost = lost or code == RANK_LOST
            result = result or code
            if code not in ENDED_WELL and not failed_at:
                result, failed_at = code, time.monotonic()
                allowed = SECONDS_TO_CLOSE.get(code, SECONDS_AFTER_A_CRASH)
                if code not in SECONDS_TO_CLOSE and code != RANK_LOST:
                    print(f"process {number} of {len(processes)} {_how(code)}; ending the others", file=sys.stderr)
        if failed_at and time.monotonic() - failed_at > allowed:
            for process in running.values():
                process.send_signal(signal.SIGKILL if terminated else signal.SIGTERM)
            terminated, allowed = True, allowed + SECONDS_AFTER_A_CRASH
        time.sleep(0.05)
    for process in processes:
        process.wait()
    return RANK_LOST if lost else result  # what the others say of a rank that was killed: try again


def _exit_code(process: subprocess.Popen[bytes]) -> int | None:
    """Of a child that has ended, as shells count; None while it runs.

    It stays a zombie, so that the other processes can read in /proc how it ended (health/processes.py).
    """
    code = process.returncode
    if code is None and hasattr(os, "waitid"):
        with contextlib.suppress(ChildProcessError):
            ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                return None
            return ended.si_status if ended.si_code == os.CLD_EXITED else 128 + ended.si_status
    code = process.poll()
    return 128 - code if code is not None and code < 0 else code


def _how(code: int) -> str:
    if code > 128:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(code - 128).name}"
    return f"failed with exit code {code}"


@contextlib.contextmanager
def _forwarding(processes: list[subprocess.Popen[bytes]]) -> Any:
    """Within, signals to this process go to ``processes`` instead."""

    def forward(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _die_with_parent() -> Callable[[], None] | None:
    """For a child between fork and exec: it is killed when this process is, which could then not hand on signals."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)  # loaded here: little may be done after a fork
    return lambda: libc.prctl(_PARENT_DEATH_SIGNAL, int(signal.SIGKILL))


def free_port() -> int:
    """A port of this machine that nobody listens at, for rank 0, which will when it has imported torch.

    Not one of those that the kernel hands out by itself: any connection might get it in the meantime.
    """
    handed_out = 32768  # and above
    with contextlib.suppress(OSError, ValueError), open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        handed_out = int(file.read().split()[0])
    candidates = range(10_000, max(handed_out, 10_000))
    drawn = random.SystemRandom().sample(candidates, min(len(candidates), 100))
    for port in [*drawn, 0]:
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return int(listener.getsockname()[1])
    raise ConfigurationError("this machine has no free port: set MASTER_PORT")
