"""Joining the other processes of a run, before anything is loaded: where they meet, and torch's process group.

Lightning would make the process group in ``trainer.fit``, after the model has been built: too late for loading once per
node. It finds the one made here, and uses it as it is.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nemo_aligner_diffusion.errors import ConfigurationError, RankLostError
from nemo_aligner_diffusion.runtime.launch import STORE_VARIABLE, cores, free_cores
from nemo_aligner_diffusion.runtime.process import LOCAL_HOSTS, Process
from nemo_aligner_diffusion.runtime.watch import RunWatch

log = logging.getLogger(__name__)

_SAID_AFTER = 10.0  # seconds of waiting; then again after four times as long, and so on
_KEY = "nemo_aligner_diffusion"
_timeout = timedelta(minutes=30)  # torch's own default


def find_device(process: Process, devices: int | Sequence[int], accelerator: str) -> torch.device:
    """This process's device.

    Args:
        devices, accelerator: as in section ``trainer``.

    Raises:
        ConfigurationError: this machine has not these devices.
    """
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
    if not cuda:
        return torch.device("cpu")
    device = torch.device("cuda", indices[process.local_rank if process.world_size > 1 else 0])
    torch.cuda.set_device(device)
    return device


def choose_threads(asked: int | None, before: int | None, device: torch.device, process: Process) -> None:
    """How many threads an operator takes on a CPU: as asked, else what ``OMP_NUM_THREADS`` says (of several processes
    a launcher does), else those of the run that is resumed, else one for each core that other programs leave.

    Args:
        asked: ``trainer.threads``.
        before: of the start whose checkpoint this one goes on from.
    """
    if asked is None and device.type == "cpu" and process.world_size == 1 and "OMP_NUM_THREADS" not in os.environ:
        asked = before or min(free_cores(), torch.get_num_threads())  # torch's own is of cores, not of hyperthreads
        if asked < min(cores(), torch.get_num_threads()):
            why = "as the run began" if before else "others are busy"
            log.info("%d of %d cores: %s (trainer.threads, OMP_NUM_THREADS)", asked, cores(), why)
    if asked is not None:
        torch.set_num_threads(asked)


def meet(process: Process, timeout: timedelta, greeting: str = "") -> tuple[Any, str]:
    """The store that all processes of the run share, once all of them are there, and rank 0's greeting to them.

    Waits in Python, so that signals are heard, and says for whom. With one node nothing listens on the network.

    Args:
        timeout: for this, and for collective calls that do not complete.

    Raises:
        ConfigurationError: the launcher has left no usable address, or the port is taken.
        RankLostError: somebody has not come within ``timeout``.
    """
    host, port = _address(process)
    wait = _Wait(process, timeout, f"{host}:{port}")
    store = _agents_store(process, host, port, timeout)
    if store is None and process.is_rank_zero:
        store = _serve(process, host, port, timeout)
    elif store is None:
        while not _answers(host, port):
            wait.once_more("rank 0")
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    # by a name of this run's own: two steps of a Slurm job may have been given one port
    step = (
        [os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")] if process.launcher == "srun" else []
    )
    store = dist.PrefixStore("/".join([_KEY, *step, f"start_{process.restart}"]), store)
    try:
        store.set(f"here/{process.rank}", "1")
        if process.is_rank_zero:
            missing = list(range(1, process.world_size))
            while missing := [rank for rank in missing if not store.check([f"here/{rank}"])]:
                wait.once_more(_ranks(missing))
            store.set("all", greeting)
        while not store.check(["all"]):
            wait.once_more("other ranks; rank 0 says which")
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise RankLostError(f"rank 0 ended before all processes had come ({host}:{port})") from error
    return store, store.get("all").decode()


def join(process: Process, device: torch.device, watch: RunWatch) -> None:
    """Meet the others, have them watched, and make the process group; nothing where there is one, or one process."""
    global _timeout
    _timeout = watch.collective_timeout
    if process.world_size == 1 or dist.is_initialized():
        return
    store, address = meet(process, _timeout, watch.serve())
    watch.begin(address, _address(process)[0])
    make_process_group(process, device, store, _timeout)


def make_process_group(process: Process, device: torch.device, store: Any, timeout: timedelta) -> None:
    """Objects and CPU tensors travel by gloo, tensors on GPUs by NCCL."""
    if process.is_one_node and os.path.isdir("/sys/class/net/lo"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo knows no passwords
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("process_group", store),
        rank=process.rank,
        world_size=process.world_size,
        timeout=timeout,
    )
    # by gloo: a rank that ended before the others have reached all ranks (with an error that it has handed on,
    # say) would look to them like one that crashed: "connectFullMesh failed"
    dist.all_reduce(torch.zeros(1))


def collective_timeout() -> timedelta:
    """What :func:`join` has taken. For each further process group: torch gives those a timeout of its own otherwise."""
    return _timeout


class AgentNotes:
    """What one start by torchrun leaves for the next (``--max-restarts``), in its own store, which outlives both.

    Under other launchers there is no next start: nothing is kept.
    """

    def __init__(self, process: Process, timeout: timedelta = timedelta(minutes=10)) -> None:
        self._store = _agents_store(process, *_address(process), timeout) if process.world_size > 1 else None

    def get(self, key: str) -> str | None:
        if self._store is None or not self._store.check([f"{_KEY}/{key}"]):
            return None
        return str(self._store.get(f"{_KEY}/{key}").decode())

    def set(self, key: str, value: str) -> None:
        if self._store is not None:
            self._store.set(f"{_KEY}/{key}", value)


def _address(process: Process) -> tuple[str, int]:
    """Where rank 0 is, or torchrun's agent."""
    text = os.environ.get("MASTER_PORT", "")
    if process.launcher == "srun":
        from lightning_fabric.plugins.environments import SLURMEnvironment

        nodes = os.environ.get("SLURM_JOB_NODELIST") or os.environ.get("SLURM_NODELIST", "")
        host = os.environ.get("MASTER_ADDR") or SLURMEnvironment.resolve_root_node_address(nodes)
        if process.is_one_node:
            host = "127.0.0.1"
        if not text:
            job, step = (os.environ.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
            text = str(15000 + (int(job) + 101 * int(step)) % 10000 if (job + step).isdigit() else 15000)
    else:
        host = os.environ.get("MASTER_ADDR", "")
    if not host or not text.isdigit() or not 0 < int(text) < 65536:
        raise ConfigurationError(
            f"MASTER_ADDR={host[:100]!r}, MASTER_PORT={text[:40]!r} in the environment: expected the host of rank 0 "
            "and a port from 1 to 65535, as the launcher sets them"
        )
    return host, int(text)


def _agents_store(process: Process, host: str, port: int, timeout: timedelta) -> Any:
    if process.launcher != "torchrun" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)


def _serve(process: Process, host: str, port: int, timeout: timedelta) -> Any:
    """Rank 0's own store; it listens on this machine only, unless there are others. torch alone would listen on all."""
    inherited = os.environ.pop(STORE_VARIABLE, "") if process.launcher == "nad-train" else ""
    if inherited:
        descriptor = int(inherited)
    else:
        only_here = process.is_one_node or host in LOCAL_HOSTS
        try:
            with socket.socket() as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(("127.0.0.1" if only_here else "", port))
                descriptor = listener.detach()
        except OSError as error:
            raise ConfigurationError(
                f"port {port} of this machine cannot be used to meet the other processes: {error.strerror}; another "
                "run may have it: set MASTER_PORT to a free one"
            ) from error
    return dist.TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=descriptor
    )


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2.0).close()
    except OSError:
        return False
    return True


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{f' and {len(ranks) - 8} more' if len(ranks) > 8 else ''}"


class _Wait:
    """Time passed in waiting, and what is said about it: by rank 0, and for it by one process of each node."""

    def __init__(self, process: Process, timeout: timedelta, place: str) -> None:
        self._process, self._timeout, self._place = process, timeout.total_seconds(), place
        self._speaks = process.local_rank == 0 or process.rank == 1
        self._started, self._due = time.monotonic(), _SAID_AFTER

    def once_more(self, for_whom: str) -> None:
        time.sleep(0.1)
        waited, process = time.monotonic() - self._started, self._process
        what = f"{for_whom} of {process.world_size} ({process.launcher or 'no launcher'}, at {self._place})"
        if waited > self._timeout:
            raise RankLostError(f"{what} did not come within {waited:.0f} s")
        if waited > self._due:
            self._due *= 4
            if self._speaks:
                log.warning("rank %d has waited %.0f s for %s; Ctrl-C or SIGTERM ends it", process.rank, waited, what)
