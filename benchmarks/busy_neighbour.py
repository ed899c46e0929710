"""A training step, quiet and beside one busy process, by how many threads it has and how they wait for one another.

    python -m benchmarks.busy_neighbour --rounds 5

Every way is a process with the embedded model and DRaFT+, which waits for its turn; a round gives each of them a step
quiet and a step beside the busy process. Nothing else may run; the busy process is started and ended here.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.bench import Ask, given_to_all, running, spread
from benchmarks.judge import table
from nemo_aligner_diffusion.runtime.launch import cores

PROGRAM = "DRaFT+, K = 5"
WAYS = {  # variables of libgomp (gcc.gnu.org/onlinedocs/libgomp) that torch's CPU build reads when it is imported
    "libgomp's own": {},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"):
        os.environ.pop(name, None)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="that count; one more warms up")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    arguments = parser.parse_args()
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in arguments.ways}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        told = {**given_to_all(Path(folder)), "seed": 1, "rate": 4e-4}
        ask: dict[str, Ask] = {}
        for way in arguments.ways:
            with environment(WAYS[way]):
                ask[way] = stack.enter_context(running(PROGRAM, None, told))
        for worker in ask.values():  # builds, and warms up
            worker("step")
        for number in range(arguments.rounds):
            quiet = {way: worker("step")["seconds"] for way, worker in ask.items()}
            with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:
                beside = {way: worker("step")["seconds"] for way, worker in ask.items()}
                neighbour.kill()
            for way in ask:
                seconds[way].append((quiet[way], beside[way]))
            print(
                f"round {number + 1}",
                *(f"{way} {quiet[way]:.2f} {beside[way]:.2f}" for way in ask),
                sep="; ",
                flush=True,
            )
    first = seconds[arguments.ways[0]]
    rows = [
        [
            way,
            spread([quiet for quiet, _ in mine]),
            spread([quiet / base for (quiet, _), (base, _) in zip(mine, first, strict=True)]),
            spread([beside for _, beside in mine]),
            spread([beside / quiet for quiet, beside in mine]),
            spread([beside / base for (_, beside), (base, _) in zip(mine, first, strict=True)]),
        ]
        for way, mine in seconds.items()
    ]
    columns = ["way to wait", "quiet, s", "/ libgomp's own", "beside, s", "/ its own quiet", "/ libgomp's own quiet"]
    print(f"{cores()} cores\n" + table(columns, rows))


if __name__ == "__main__":
    main()
