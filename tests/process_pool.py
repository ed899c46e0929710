"""Four warm processes for tests of parallel code: a process group for each call, without a new start of Python."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

SIZE = 4
# Seen once in some hundred runs: a rank of FSDP2 over gloo that dies of a signal in the middle of a collective, without
# a word of Python. conftest.py has such a test repeated once; what fails in Python is not.
DIED_OF_A_SIGNAL = "the process ended with code -"


class ProcessPool:
    """Runs one function on several ranks at once, with gloo as default process group.

    The processes are started at the first call and import what takes long once. ``function`` must be importable by
    name (top level of a module), its arguments and its result must pickle.
    """

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, size: int, function: Callable[..., Any], *args: Any, timeout_seconds: float = 240.0) -> list[Any]:
        """``function(*args)`` on ``size`` ranks (at most 4); the results by rank.

        Raises:
            AssertionError: with the traceback of the first rank that failed; or no answer within the time (the
                processes are then killed and started anew for the next call).
        """
        if not 1 <= size <= SIZE:
            raise ValueError(f"size is {size}; expected 1 to {SIZE}")
        self._start()
        with tempfile.TemporaryDirectory() as folder:
            for rank in range(size):
                self._workers[rank][1].send((rank, size, os.path.join(folder, "store"), function, args))
            answers: list[tuple[bool, Any]] = []
            deadline = time.monotonic() + timeout_seconds
            for rank in range(size):
                connection = self._workers[rank][1]
                try:
                    answered = connection.poll(max(deadline - time.monotonic(), 0.1))
                    answers.append(connection.recv() if answered else (False, f"no answer in {timeout_seconds:.0f} s"))
                except (EOFError, ConnectionError):
                    process = self._workers[rank][0]
                    process.join(10)
                    answers.append((False, f"the process ended with code {process.exitcode}"))
        failed = [f"rank {rank}: {answer}" for rank, (good, answer) in enumerate(answers) if not good]
        if failed:
            self.close()  # ranks may be stuck in a collective that will never complete
            raise AssertionError("\n".join(failed))
        return [answer for _, answer in answers]

    def close(self) -> None:
        for process, connection in self._workers:
            process.kill()
            process.join()
            connection.close()
        self._workers = []

    def _start(self) -> None:
        if self._workers and all(process.is_alive() for process, _ in self._workers):
            return
        self.close()
        context = multiprocessing.get_context("spawn")
        for _ in range(SIZE):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()
            self._workers.append((process, here))


def _serve(connection: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    # A rank that has done its part and left, while others are still connecting, looks to them like one that crashed.
    os.environ["TORCH_DIST_INIT_BARRIER"] = "1"
    import faulthandler

    import torch
    import torch.distributed as dist

    faulthandler.enable()  # a crash says where
    torch.set_num_threads(1)
    while True:
        try:
            rank, size, store, function, args = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        os.environ.update(dict(zip(names, map(str, (rank, rank, size, size)), strict=True)))
        os.environ.update({"MASTER_ADDR": "nowhere", "MASTER_PORT": "1"})  # they have met already
        try:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store, size),
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=120),
            )
            try:
                answer = (True, function(*args))
            finally:
                dist.destroy_process_group()
                for name in (*names, "MASTER_ADDR", "MASTER_PORT"):
                    os.environ.pop(name, None)
        except BaseException:
            answer = (False, traceback.format_exc())
        try:
            connection.send(answer)
        except Exception:  # it does not pickle
            connection.send((False, traceback.format_exc()))
