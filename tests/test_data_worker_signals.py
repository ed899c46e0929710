"""Data workers under signals: real workers, real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import os, signal, sys, time
from torch.utils.data import DataLoader, IterableDataset
from nemo_aligner_diffusion.data.stream_loader import leave_signals_to_the_parent

class Numbers(IterableDataset):
    def __iter__(self):
        for number in range(10**6):
            if number == 200:  # stuck, as in a read from a file server that does not answer
                time.sleep(1000)
            yield number

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    loader = iter(DataLoader(Numbers(), num_workers=1, batch_size=None, worker_init_fn=leave_signals_to_the_parent))
    print(next(loader), loader._workers[0].pid, flush=True)
    for line in sys.stdin:
        print(next(loader), loader._workers[0].is_alive(), flush=True)
    for _ in range(int(sys.argv[1])):
        next(loader)
    print("ending", flush=True)
    loader._workers[0].terminate()  # as torch and Python do at the end; the worker may be stuck
    loader._workers[0].join(30)
    print(loader._workers[0].exitcode, flush=True)
"""


@pytest.mark.alone
@pytest.mark.parametrize("taken", [0, 196])  # 196: it is stuck
def test_a_worker_survives_all_signals_but_its_parents(taken: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(taken)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            first, worker = process.stdout.readline().split()
            assert first == "0"
            for expected, number in enumerate((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT), start=1):
                os.kill(int(worker), number)
                time.sleep(0.2)
                process.stdin.write("next\n")
                process.stdin.flush()
                assert process.stdout.readline().split() == [str(expected), "True"]
            out, _ = process.communicate(timeout=300)
        finally:
            process.kill()
    assert out.split() == ["ending", "0"]
