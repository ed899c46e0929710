"""How much memory this process may still take. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nemo_aligner_diffusion.errors import AlignerError, first_line

_ADVICE = "nad-plan, given the words of this command, says what the run needs and with which settings it fits"


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that the machine and the process's control groups (a container's, a Slurm job's) can still give; file pages
    that they would let go of count as free. ``None``: nobody says (no Linux).

    Args:
        root: of the file system.
    """
    try:
        machine = _fields(root / "proc/meminfo")
        return min((machine["MemAvailable"] + machine["SwapFree"]) * 1024, *_left_by_groups(root))
    except (OSError, KeyError, ValueError):
        return None


def check_room(size: int, what: str) -> None:
    """Refuse ``size`` bytes that memory does not hold, before the system ends the process for them.

    Raises:
        AlignerError: says what is too large, what is free, and what to do.
    """
    free = free_memory()
    if free is not None and size > free:
        raise AlignerError(
            f"{what}: takes {size / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free here; free some, halve it "
            f"by model.frozen_precision=bf16 (with peft=sdlora), or take a larger machine. {_ADVICE}"
        )


def out_of_memory(error: Exception) -> AlignerError | None:
    """What an error of torch's allocators means to the user; ``None``: it is no such error."""
    if type(error).__name__ != "OutOfMemoryError" and "DefaultCPUAllocator" not in str(error):
        return None
    return AlignerError(f"memory does not suffice: {first_line(error)}. {_ADVICE}")


def _left_by_groups(root: Path) -> Iterator[int]:
    """Of cgroup v2; the group's own limit and those of the groups around it hold."""
    yield 2**63
    lines = (root / "proc/self/cgroup").read_text().splitlines()
    own = next((line[3:] for line in lines if line.startswith("0::")), "/")
    folder = root / "sys/fs/cgroup" / own.lstrip("/")
    while folder != root / "sys/fs":
        limit = folder / "memory.max"
        if limit.is_file() and (most := limit.read_text().strip()) != "max":
            held = int((folder / "memory.current").read_text())
            yield int(most) - held + _fields(folder / "memory.stat")["file"]
        folder = folder.parent


def _fields(file: Path) -> dict[str, int]:
    """Names and numbers, one of each a line."""
    words = (line.split() for line in file.read_text().splitlines())
    return {each[0].rstrip(":"): int(each[1]) for each in words}
