"""One rank of a small run with the real watching and, instead of a process group, sockets that all ranks wait at.

Run with the words WHAT RANK SIZE FOLDER; imports no torch, so that a test takes seconds. Like gloo's, the
sockets break when a rank goes, and the main threads of the others then raise.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

# Seconds. Where no limit is to be met they are longer than any test waits: three processes on a busy machine may stand
# still for some, and who comes down meanwhile has not waited for a limit.
SILENCE = {"stop": 8.0, "hold": 8.0}
STANDSTILL = 3.0
LONG = 600.0
ENDLESS = 10**9


class Meeting:
    """Rank 0 hears a byte from every rank, then sends each one back."""

    def __init__(self, rank: int, size: int, folder: Path) -> None:
        if rank == 0:
            listener = socket.create_server(("127.0.0.1", 0))
            write(folder / "meeting", str(listener.getsockname()[1]))
            self.sockets = [listener.accept()[0] for _ in range(size - 1)]
        else:
            self.sockets = [socket.create_connection(("127.0.0.1", int(read(folder / "meeting"))))]
        self.rank = rank
        self.wait()  # as making a process group does

    def wait(self) -> None:
        if self.rank == 0:
            for other in self.sockets:
                hear(other)
            for other in self.sockets:
                other.sendall(b"x")
        else:
            self.sockets[0].sendall(b"x")
            hear(self.sockets[0])


def hear(other: socket.socket) -> None:
    if not other.recv(1):
        raise ConnectionError("Connection closed by peer")


def write(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(text)
    part.rename(path)


def read(path: Path) -> str:
    while not path.exists():
        time.sleep(0.01)
    return path.read_text()


def endless_loop() -> None:
    while True:
        time.sleep(0.001)


def hold_the_interpreter() -> None:
    import re

    re.match(r"(a+)+$", "a" * 64 + "b")  # years, in C, without a look at other threads


def start_worker(client: Any, file: Path) -> None:
    """A forked child that lives on for a while, as a data worker does."""
    client._settled.wait(60)
    if os.fork() == 0:
        write(file, str(os.getpid()))
        time.sleep(120)
        os._exit(0)
    read(file)


def work(seconds: float) -> None:
    end = time.thread_time() + seconds  # of computing: a process that is stopped takes longer
    while time.thread_time() < end:
        sum(range(1000))


def main(what: str, rank: int, size: int, folder: Path) -> int:
    import dataclasses
    import faulthandler
    import signal

    from nemo_aligner_diffusion.errors import NumericalError
    from nemo_aligner_diffusion.runtime.health import client as health_client
    from nemo_aligner_diffusion.runtime.health import server as health_server
    from nemo_aligner_diffusion.runtime.health.client import HealthClient
    from nemo_aligner_diffusion.runtime.health.messages import Fault
    from nemo_aligner_diffusion.runtime.health.progress import Progress, waiting
    from nemo_aligner_diffusion.runtime.health.server import HealthServer
    from nemo_aligner_diffusion.runtime.health.stragglers import StragglerWatch
    from nemo_aligner_diffusion.runtime.health.verdict import Watch
    from nemo_aligner_diffusion.runtime.process import Process
    from nemo_aligner_diffusion.runtime.settings import FaultToleranceSettings, StragglerSettings

    def write_down(fault: Fault) -> None:
        write(folder / "fault", "\n".join([str(rank), fault.headline, *fault.places]))

    if what == "raise everywhere":  # how much later others raise is up to the machine; that all have ends the waiting
        health_client._LINGER = health_server._SAME_ERROR_WITHIN = LONG
    silence = SILENCE.get(what, LONG)
    one_node = what != "wait, by network"
    process = Process(rank, size, rank, size if one_node else 1, launcher="torchrun")
    limits = FaultToleranceSettings(initial_rank_heartbeat_timeout=LONG, rank_heartbeat_timeout=LONG)
    progress = Progress(dataclasses.replace(limits, minimum_heartbeat_timeout=LONG))
    server = None
    watch = Watch(size, silence)
    if rank == 0:
        server = HealthServer(one_node, watch, 0.2, StragglerWatch(StragglerSettings(1.5, 0.5), time.monotonic()))
        server.start()
        write(folder / "address", server.address)
    client = HealthClient(process, read(folder / "address"), "127.0.0.1", progress, 0.2, silence, write_down)
    client.start()
    faulthandler.register(signal.SIGUSR2, all_threads=False)
    if what == "fork":
        start_worker(client, folder / f"worker_{rank}")

    def known() -> bool:
        """What verdicts are made of is here: everybody's name, and at rank 0 all places, elsewhere rank 0's."""
        if not client._members:
            return False
        if rank != 0:
            return client._rank0.in_training
        return len(watch.ranks) == size and all(entry.position.in_training for entry in watch.ranks.values())

    steps = ENDLESS if what in ("wait", "wait, by network", "fork", "stop", "straggler") else 40
    try:
        meeting = Meeting(rank, size, folder)
        announced = False
        for step in range(steps):
            if step == 30 and what == "loop":
                short = {"rank_heartbeat_timeout": STANDSTILL, "minimum_heartbeat_timeout": STANDSTILL}
                progress.limits = dataclasses.replace(limits, **short, safety_factor=1.0)
            progress.mark("data", step, in_training=True)
            progress.mark("forward pass", in_training=True)
            began = time.perf_counter()
            work(0.01)
            progress.add_work(time.perf_counter() - began)
            if not announced and known():
                announced = True
                write(folder / f"working_{rank}", "")
            if step == 30 and rank == 1:
                if what == "exit":
                    os._exit(7)
                if what == "loop":
                    endless_loop()
                if what == "hold":
                    hold_the_interpreter()
                if what == "raise":
                    raise ValueError("the reward is broken")
            if step == 30 and what in ("raise everywhere", "hand on"):
                if what == "hand on" and rank == 1:
                    time.sleep(1.5)  # whose error it is comes last, when the others have waited for each other
                raise NumericalError("the reward is NaN")
            with waiting():
                meeting.wait()
    except Exception as error:
        code = getattr(error, "exit_code", 1)
        reason = f"{type(error).__name__}: {error}"
        said = what == "hand on" and rank != 1
        if client.failed(reason, traceback.format_exc(), code, isinstance(error, ConnectionError), said):
            print(f"first: rank {rank}: {reason}", file=sys.stderr, flush=True)
        if what == "raise everywhere" and rank == 0:
            time.sleep(2.0)
            write(folder / "exported", "")
        client.wait_for_rank_0()
        return code
    finally:
        client.close()
        if server is not None:
            server.close()
    write(folder / f"done_{rank}", "")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])))
