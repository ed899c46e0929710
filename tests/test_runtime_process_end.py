"""The end of a process that has joined others: loggers are heard, the interpreter's teardown never begins."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A process group of one, which is enough to have gloo's threads; the words say what follows the run.
PROGRAM = f"""
import atexit, sys
sys.path.insert(0, {str(ROOT)!r})
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.runtime.ending import command

class Teardown:
    def __del__(self): print("teardown", flush=True)

kept = Teardown()
joined, words = sys.argv[1] == "joined", sys.argv[2:]

@command(interrupted="")
def run(argv):
    if joined:
        import torch.distributed as dist
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(print, "logger closed", flush=True)
    if "refuse" in words: raise ConfigurationError("no such key")
    return 75 if "requeue" in words else 0

code = run(words if "embedded" in words else None)
print("not flushed", end=" ")
if "mistake" in words: raise ValueError("behind the run")
sys.exit(5 if "embedded" in words else code)
"""


def end_of(*words: str) -> tuple[int, list[str]]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, timeout=120)
    return done.returncode, [line.removeprefix("not flushed ") for line in done.stdout.splitlines()]


@pytest.mark.parametrize(("word", "code"), [("finish", 0), ("requeue", 75)])
def test_it_ends_after_the_loggers_and_before_the_teardown(word: str, code: int) -> None:
    assert end_of("joined", word) == (code, ["logger closed"])


def test_alone_the_interpreter_closes_as_ever() -> None:
    assert end_of("alone", "finish") == (0, ["logger closed", "teardown"])


@pytest.mark.parametrize(("word", "code"), [("embedded", 5), ("mistake", 1)])
def test_a_program_around_the_run_keeps_its_own_exit_code(word: str, code: int) -> None:
    assert end_of("joined", word) == (code, ["logger closed", "teardown"])


def test_an_error_of_the_users_ends_at_once() -> None:
    assert end_of("joined", "refuse") == (2, [])
