"""A million prompts in a thousand shards for eight data-parallel ranks of four workers: each once, in bounded memory.

    python -m benchmarks.data_throughput

Writes the shards into a temporary folder (1.1 GB, removed afterwards) and reads one epoch as all ranks of a run would:
the ranks one after the other, the workers of a rank as processes at the same time. Every prompt carries its number, so
that it can be counted.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nemo_aligner_diffusion.data import shard_index
from nemo_aligner_diffusion.data.prompts import build_prompt_loader
from nemo_aligner_diffusion.data.shards import WrittenShards, write_prompt_shards
from nemo_aligner_diffusion.data.stream_loader import StreamLoader

WORDS = "a painting of the sea at night with small boats, lanterns and a lighthouse, oil on canvas, warm light"


@dataclass
class Passage:
    """One rank's way through (a part of) the epoch."""

    prompts: int
    seconds: float
    processor_seconds: float  # of this process and its workers
    memory: list[tuple[int, int]] = field(default_factory=list)  # (proportional, own) bytes, most of each worker

    @property
    def rate(self) -> float:
        return self.prompts / self.seconds

    @property
    def cost(self) -> float:
        """Processor time a prompt, seconds."""
        return self.processor_seconds / self.prompts


@dataclass
class Result:
    """Seconds and counts; ``shards_a_rank``: how many different shards each rank read from."""

    written: WrittenShards
    writing: float
    indexing: float
    index_bytes: int
    first_cold: float
    first_warm: float
    first_resumed: float
    ranks: list[Passage]
    times_seen: tuple[int, int]  # fewest and most, over all prompts
    shards_a_rank: tuple[int, int]
    same_order: int  # samples whose order was compared with 1 rank without workers, all equal
    alone: Passage


def numbered_prompts(count: int) -> Iterator[str]:
    return (f"{number:08d} {WORDS}"[: 80 + number % 40] for number in range(count))


def measure(folder: Path, prompts: int, shards: int, ranks: int, workers: int, micro: int, compared: int) -> Result:
    """Everything, in ``folder``.

    Args:
        compared: samples of the epoch that one rank without workers reads, too.

    Raises:
        AssertionError: a prompt was not seen exactly once, or the order differs.
    """
    started = time.perf_counter()
    written = write_prompt_shards(numbered_prompts(prompts), folder / "shards", -(-prompts // shards))
    writing = time.perf_counter() - started
    options: dict[str, Any] = {"seed": 1, "index_folder": folder / "index"}

    def loader(rank: int, size: int, count: int, start: int = 0, each: int = micro, **more: Any) -> StreamLoader:
        shard_index._recent.clear()  # as another process would find it
        return build_prompt_loader(
            folder / "shards",
            micro_batch_size=each,
            rank=rank,
            world_size=size,
            num_workers=count,
            start_sample=start,
            **options | more,
        )

    for path in written.paths:  # out of the page cache: the index is made from a cold disk
        _forget(path)
    started = time.perf_counter()
    cold = loader(0, ranks, workers)
    indexing = time.perf_counter() - started
    first_cold = _first_batch(cold, started)
    started = time.perf_counter()
    first_warm = _first_batch(loader(0, ranks, workers), started)
    step = micro * ranks
    middle = int(2.5 * prompts) // step * step
    started = time.perf_counter()
    first_resumed = _first_batch(loader(0, ranks, workers, middle), started)

    seen = np.zeros(prompts, dtype=np.int64)
    order = np.full(prompts, -1, dtype=np.int64)
    passages, opened = [], []
    for rank in range(ranks):
        before = seen.copy()
        passages.append(_pass(loader(rank, ranks, workers, epochs=1), prompts // ranks, seen, order))
        opened.append(len(np.unique(np.flatnonzero(seen - before) * shards // prompts)))
    whole = prompts // step * step
    assert seen.sum() == whole, f"{seen.sum()} prompts were read, expected {whole} (whole global batches of {prompts})"

    other = np.full(prompts, -1, dtype=np.int64)
    one = loader(0, 1, 0, each=step, epochs=1)
    alone = _pass(one, compared, np.zeros_like(seen), other, limit=compared)
    same = int((other >= 0).sum())
    assert np.array_equal(other[:same], order[:same]), "the order under this layout is not that of one rank"

    return Result(
        written=written,
        writing=writing,
        indexing=indexing,
        index_bytes=sum(file.stat().st_size for file in (folder / "index").glob("*/*")),
        first_cold=first_cold,
        first_warm=first_warm,
        first_resumed=first_resumed,
        ranks=passages,
        times_seen=(int(seen.min()), int(seen.max())),
        shards_a_rank=(min(opened), max(opened)),
        same_order=same,
        alone=alone,
    )


def _pass(loader: StreamLoader, expected: int, seen: Any, order: Any, limit: int | None = None) -> Passage:
    """Iterate; count each prompt in ``seen`` and note which one came at each global index in ``order``."""
    looks = iter([int(expected * share) for share in (0.3, 0.6, 0.95)] + [1 << 60])
    look = next(looks)
    memory: dict[int, tuple[int, int]] = {}
    count, processor, started = 0, _processor_seconds(), time.perf_counter()
    stream = iter(loader)
    for batch in stream:
        numbers = [int(prompt[:8]) for prompt in batch["prompts"]]
        np.add.at(seen, numbers, 1)
        order[batch["index"].numpy()] = numbers
        count += len(numbers)
        if count >= look:
            look = next(looks)
            for process in loader.worker_processes or [os.getpid()]:
                now, before = _memory(process), memory.get(process, (0, 0))
                memory[process] = (max(now[0], before[0]), max(now[1], before[1]))
        if limit is not None and count >= limit:
            break
    seconds = time.perf_counter() - started
    stream.close()  # type: ignore[attr-defined]  # ends the workers, whose time counts from then on
    return Passage(count, seconds, _processor_seconds() - processor, list(memory.values()))


def _memory(process: int) -> tuple[int, int]:
    """(proportional set size, unique set size) in bytes."""
    lines = (line.split() for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:])
    sizes = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines}
    return sizes["Pss"], sizes["Private_Clean"] + sizes["Private_Dirty"]


def _processor_seconds() -> float:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _first_batch(loader: StreamLoader, started: float) -> float:
    """Seconds from ``started`` to the loader's first batch."""
    stream = iter(loader)
    next(stream)
    seconds = time.perf_counter() - started
    stream.close()  # type: ignore[attr-defined]
    return seconds


def _forget(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def report(result: Result, workers: int) -> str:
    ranks, alone = result.ranks, result.alone
    total = sum(passage.prompts for passage in ranks)
    cost = sum(passage.processor_seconds for passage in ranks) / total
    rate = total / sum(passage.seconds for passage in ranks)
    memory = [sizes for passage in ranks for sizes in passage.memory]

    def row(name: str, rate: float, cost: float) -> str:
        return f"{name:<28}{rate:18,.0f}{cost * 1e6:25.1f} µs"

    def most(sizes: list[tuple[int, int]]) -> str:
        proportional, own = (max(column) / (1 << 20) for column in zip(*sizes, strict=True))
        return f"{proportional:.0f} MB proportional, {own:.0f} MB its own"

    return "\n".join(
        [
            f"{result.written.samples:,} prompts in {len(result.written.paths):,} shards, "
            f"{result.written.bytes / 1e6:,.0f} MB; {len(ranks)} ranks (in turn) x {workers} workers (at once)",
            f"written in {result.writing:.1f} s; indexed in {result.indexing:.1f} s from a cold disk "
            f"({result.index_bytes / 1e6:.1f} MB)",
            f"first batch: {result.first_cold:.2f} s without an index, {result.first_warm:.2f} s with it, "
            f"{result.first_resumed:.2f} s in the middle of epoch 3",
            f"each prompt seen {result.times_seen[0]} to {result.times_seen[1]} times an epoch by all ranks; the first "
            f"{result.same_order:,} in the order of 1 rank without workers",
            f"different shards a rank: {result.shards_a_rank[0]} to {result.shards_a_rank[1]}",
            "",
            f"{'':<28}{'prompts/s a rank':>18}{'processor time a prompt':>28}",
            row(f"by position, {workers} workers", rate, cost),
            row("by position, no workers", alone.rate, alone.cost),
            "",
            f"memory of a worker, most of {len(memory)}: {most(memory)}",
        ]
    )


def main(arguments: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=1_000)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--compared", type=int, default=200_000, help="samples that one rank reads, too")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made; the system's by default")
    given = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        result = measure(
            folder,
            given.prompts,
            given.shards,
            given.ranks,
            given.workers,
            given.micro_batch_size,
            min(given.compared, given.prompts),
        )
    finally:
        shutil.rmtree(folder)
    print(report(result, given.workers))
    return result


if __name__ == "__main__":
    main()
