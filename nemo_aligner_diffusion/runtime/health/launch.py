"""How this process was started, and where it finds rank 0's health server."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

ADDRESS_VARIABLE = "NAD_HEALTH_ADDRESS"
CLAIMS_VARIABLE = "NAD_CLAIMS"  # a folder of the processes that one launcher of ours has started
_KEY = "nemo_aligner_diffusion/health"


@dataclass(frozen=True)
class Launch:
    """This process among those of the run.

    Attributes:
        launcher: ``torchrun``, ``srun`` or ``lightning`` (rank 0 of each node starts the others of its node).
        restart: how often torchrun has started the processes again.
    """

    rank: int
    world_size: int
    local_rank: int
    launcher: str
    restart: int = 0


def find_launch(world_size: int, devices_per_node: int, environment: Mapping[str, str] = os.environ) -> Launch:
    """From the launcher's environment, as Lightning reads it.

    Args:
        world_size: processes of the run, from the configuration.
    """
    number = lambda name: int(environment.get(name) or 0)  # noqa: E731
    if "TORCHELASTIC_RUN_ID" in environment or ("RANK" in environment and "WORLD_SIZE" in environment):
        restart = number("TORCHELASTIC_RESTART_COUNT")
        return Launch(number("RANK"), world_size, number("LOCAL_RANK"), "torchrun", restart)
    if environment.get("SLURM_NTASKS") == str(world_size) and "SLURM_PROCID" in environment:
        return Launch(number("SLURM_PROCID"), world_size, number("SLURM_LOCALID"), "srun")
    local = number("LOCAL_RANK")
    return Launch(number("NODE_RANK") * devices_per_node + local, world_size, local, "lightning")


def announce(port: int, token: str) -> None:
    """For the processes that this one starts."""
    os.environ[ADDRESS_VARIABLE] = f"{port} {token}"


def publish(launch: Launch, port: int, token: str, stopped: Callable[[], bool]) -> None:
    """Rank 0: let the others know the server. Blocks until the store is up; run it in a thread.

    It is in the store of the launcher (torchrun) or of the process group, which is there as soon as training's own
    communication is.
    """
    store = _store(launch, stopped)
    if store is not None:
        store.set(f"{_KEY}/{launch.restart}", f"{port} {token}")


def look_up(launch: Launch, stopped: Callable[[], bool]) -> tuple[str, int, str] | None:
    """Host, port and token of rank 0's server. Blocks until it is known; None: stopped before that."""
    known = os.environ.get(ADDRESS_VARIABLE)
    if launch.launcher == "lightning" and known:
        port, token = known.split()
        return "127.0.0.1", int(port), token
    store = _store(launch, stopped)
    key = f"{_KEY}/{launch.restart}"
    while store is not None and not stopped():
        if store.check([key]):
            port, token = store.get(key).decode().split()
            return os.environ["MASTER_ADDR"], int(port), token
        time.sleep(0.1)
    return None


def agree_on_version(launch: Launch, version: str) -> str:
    """The same name of the run directory on all of torchrun's processes, also after it has started them again."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return version
    store = _connect()
    key = f"{_KEY}/version"
    if launch.rank == 0 and not store.check([key]):
        store.set(key, version)
    return str(store.get(key).decode())


def _store(launch: Launch, stopped: Callable[[], bool]) -> Any:
    import torch.distributed as dist

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        while not (dist.is_available() and dist.is_initialized()):  # its store is served by rank 0
            if stopped():
                return None
            time.sleep(0.1)
    return _connect()


def _connect() -> Any:
    """A client of our own: one that waits in a call holds its lock, which the process group's must not."""
    import torch.distributed as dist

    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(minutes=10),
    )


def host_name() -> str:
    return socket.gethostname()


def write_error_file(message: str, local_rank: int | None = None) -> None:
    """Tell torchrun why: its summary then shows the reason instead of "To enable traceback see …".

    Args:
        local_rank: of the process of this machine that failed, if it is not this one. What it wrote itself stands.
    """
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not own:
        return
    path = Path(own) if local_rank is None else Path(own).parent.parent / str(local_rank) / Path(own).name
    if path.exists():
        return
    # torchrun's form: https://pytorch.org/docs/stable/elastic/errors.html; it sorts by the time of day
    extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
    text = json.dumps({"message": {"message": message, "extraInfo": extra}})
    with contextlib.suppress(OSError):  # a courtesy: the reason is on the screen already
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)


def claim_first_word(text: str) -> bool:
    """True for one of the processes of this machine that have the same to say.

    Under torchrun and our own launcher; elsewhere (srun) always.
    """
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    folder = os.environ.get(CLAIMS_VARIABLE) if not own else Path(own).parent.parent
    if not folder:
        return True
    try:
        (Path(folder) / f"said-{hashlib.sha256(text.encode()).hexdigest()[:16]}").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def note(word: str) -> None:
    """Leave a word that a later start by the same torchrun finds; elsewhere nothing is left."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        _connect().set(f"{_KEY}/noted/{word}", "1")


def is_noted(word: str) -> bool:
    """Whether :func:`note` was called with it, in this or an earlier start by the same torchrun."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    return bool(_connect().check([f"{_KEY}/noted/{word}"]))
