"""Samples by their position: the order of an epoch, and the index that says where each sample is."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from process_pool import ProcessPool
from tiny.prompts import ODD_PROMPTS, take, tar, uneven_shards

from nemo_aligner_diffusion.data import shard_index
from nemo_aligner_diffusion.data.epoch_order import LANES, SMALL_SOURCE, epoch_rows
from nemo_aligner_diffusion.data.prompts import PromptDataset
from nemo_aligner_diffusion.errors import DataError


def rows(counts: list[int], *args: int, **options: int) -> np.ndarray[Any, Any]:
    return np.concatenate(list(epoch_rows(np.array(counts), *args, **options)))


MANY = [1000] * 70 + [0, 1, 30_017, 2]  # 100,020 samples: more than a small source


@pytest.mark.parametrize("buffer", [0, 1, 2, 5, 23, 24, 25, 1000])
def test_the_index_gives_the_order_of_a_stream(tmp_path: Path, buffer: int) -> None:
    """Compressed shards are streamed through webdataset's shuffle buffer; the same shards, plain, are not."""
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    for folder, mode in ((plain, "w"), (packed, "w:gz")):
        folder.mkdir()
        for number, size in enumerate((7, 1, 12, 4)):
            tar(folder / f"{number}.tar", {f"{n}.txt": f"{number}.{n}" for n in range(size)}, mode)
    options: dict[str, Any] = {"micro_batch_size": 2, "seed": 5, "shuffle_buffer": buffer, "start_sample": 6}
    batches = [[batch["prompts"] for batch in take(folder, 40, **options)] for folder in (plain, packed)]
    assert batches[0] == batches[1]


@pytest.mark.parametrize("counts", [[3, 0, 5], MANY, [SMALL_SOURCE], [SMALL_SOURCE + 1]])
@pytest.mark.parametrize("buffer", [0, 1, 10, 10_000, 200_000])
def test_every_row_once_and_any_start(counts: list[int], buffer: int) -> None:
    whole = rows(counts, 7, 2, buffer)
    assert np.array_equal(np.sort(whole), np.arange(sum(counts)))
    for start in {1, sum(counts) // 3, sum(counts) - 2, sum(counts) // LANES * LANES}:
        assert np.array_equal(rows(counts, 7, 2, buffer, start=start), whole[start:])


def test_seed_and_epoch_decide_the_order_of_large_sources() -> None:
    orders = {rows(MANY, seed, epoch, 10_000).tobytes() for seed in (1, 2) for epoch in (0, 1)}
    assert len(orders) == 4


def test_the_order_of_large_sources_is_fixed_for_good() -> None:
    """Runs resumed with a later version of the package must not see another order."""
    digest = hashlib.sha256(rows(MANY, 1, 0, 10_000).astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "4b314bf62d1b4011"


def test_large_sources_are_well_mixed() -> None:
    order = rows([1000] * 200, 0, 0, 10_000)
    shards = order // 1000
    batch = shards[64_000:64_064]
    assert len(set(batch.tolist())) == 64  # a batch of 64 comes from 64 places
    lane = order[5::LANES][:156]  # one window of one lane
    assert not np.array_equal(np.sort(lane), lane)
    assert abs(np.corrcoef(np.arange(156), lane)[0, 1]) < 0.3


@pytest.mark.parametrize("micro", [1, 8])
def test_ranks_split_the_shards(micro: int) -> None:
    """Eight ranks: each opens an eighth of 512 shards, but for those that lie on two lanes."""
    shards = rows([1000] * 512, 3, 1, 10_000) // 1000
    positions = np.arange(len(shards))
    opened = [set(shards[positions // micro % 8 == rank].tolist()) for rank in range(8)]
    assert [len(mine) for mine in opened] == [64] * 8
    assert len(set.union(*opened)) == 512


def count_lines(path: Path, count: int) -> list[str]:
    lines = [f"prompt {number}" for number in range(count)]
    path.write_text("\n".join(lines))
    return lines


def test_a_large_source_under_any_layout(tmp_path: Path) -> None:
    """More samples than a small source has, through the files: 1 × 24, and 3 ranks of 4 with accumulation 2."""
    lines = count_lines(tmp_path / "a.txt", SMALL_SOURCE + 33)
    one = PromptDataset(tmp_path, micro_batch_size=24, epochs=1, incomplete="wrap")
    whole = [prompt for batch in one for prompt in batch["prompts"]]
    assert Counter(whole[: len(lines)]) == Counter(lines)
    start = len(lines) // 24 * 24 - 4800
    three = [
        PromptDataset(
            tmp_path,
            micro_batch_size=4,
            rank=rank,
            world_size=3,
            global_batch_size=24,
            epochs=1,
            incomplete="wrap",
            start_sample=start,
        )
        for rank in range(3)
    ]
    merged = [p for batches in zip(*three, strict=True) for batch in batches for p in batch["prompts"]]
    assert merged == whole[start:]


def test_odd_prompts_by_their_places(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(ODD_PROMPTS).encode() + b"\n\n")
    tar(tmp_path / "s.tar", {f"{'é' * 150}{number}.txt": text for number, text in enumerate(ODD_PROMPTS)})
    tar(
        tmp_path / "j.tar",
        {"0.jpg": "x", "0.json": '\ufeff{"caption": "c", "prompt": "p"}', "1.png": "y", "1.txt": "q"},
    )
    for name, expected in (("p.txt", ODD_PROMPTS), ("s.tar", ODD_PROMPTS), ("j.tar", ["p", "q"])):
        batches = take(tmp_path / name, len(expected), micro_batch_size=1, shuffle_buffer=0)
        assert [batch["prompts"][0] for batch in batches] == expected


def index_of(folder: Path, cache: Path, **options: Any) -> shard_index.ShardIndex:
    shard_index._recent.clear()  # as another process would see it
    index = PromptDataset(folder, micro_batch_size=1, index_folder=cache, **options).index
    assert index is not None
    return index


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder with 24 prompts in 4 shards."""
    folder = tmp_path / "shards"
    folder.mkdir()
    uneven_shards(folder)
    return folder


@pytest.fixture
def missing(shards: Path, tmp_path: Path) -> Path:
    """Where the index file of ``shards`` will be; its lock is there already."""
    path = index_of(shards, tmp_path / "cache").path
    assert path is not None
    path.unlink()
    return path


def test_an_index_file_is_made_once_and_again_when_shards_change(tmp_path: Path, shards: Path) -> None:
    cache = tmp_path / "deep" / "cache"
    first = index_of(shards, cache)
    assert first.path is not None
    status = first.path.stat()
    again = index_of(shards, cache)
    assert again.path == first.path
    assert again.path.stat().st_ino == status.st_ino
    assert np.array_equal(again.records, first.records)
    tar(shards / "s1.tar", {"a.txt": "one", "b.txt": "two"})
    changed = index_of(shards, cache)
    assert changed.path != first.path
    assert (len(changed), changed.digest == first.digest) == (25, False)
    assert sorted(path.suffix for path in cache.iterdir()) == [".index", ".index", ".lock", ".lock"]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "header"])
def test_a_damaged_index_file_is_made_anew(tmp_path: Path, damage: str) -> None:
    prompts = uneven_shards(tmp_path)
    path = index_of(tmp_path, tmp_path / "cache").path
    assert path is not None
    whole = path.read_bytes()
    damaged = {
        "cut": whole[:-1],
        "flip": whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:],
        "empty": b"",
        "header": whole[:16] + b"\xff" + whole[17:],
    }[damage]
    path.write_bytes(damaged)
    assert len(index_of(tmp_path, tmp_path / "cache")) == len(prompts)
    assert path.read_bytes() == whole


def test_small_sources_leave_no_file_and_large_ones_go_to_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    uneven_shards(tmp_path)
    take(tmp_path / "s0.tar", 1, micro_batch_size=1)
    assert not (tmp_path / "caches").exists()
    with (tmp_path / "large.txt").open("w") as stream:
        for number in range(600):
            stream.write(f"{number} {'x' * 60_000}\n")
    take(tmp_path / "large.txt", 1, micro_batch_size=1)
    assert [path.suffix for path in (tmp_path / "caches/nemo_aligner_diffusion/shard_index").glob("*.index")]


def test_a_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompts = uneven_shards(tmp_path)
    (tmp_path / "file").write_text("x")
    with caplog.at_level(logging.WARNING):
        index = index_of(tmp_path / "s0.tar", tmp_path / "file" / "cache")
    assert index.path is None
    assert len(index) == sum(prompt.startswith("prompt 0.") for prompt in prompts)
    assert "every process makes its own" in caplog.text


def test_an_index_travels_as_its_path(tmp_path: Path) -> None:
    """To workers that are started anew instead of forked."""
    count_lines(tmp_path / "a.txt", 20_000)
    index = index_of(tmp_path / "a.txt", tmp_path / "cache")
    packed = pickle.dumps(index)
    assert len(packed) < 5000
    assert np.array_equal(pickle.loads(packed).records, index.records)


class Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def build_in_rank(shards: str, cache: str) -> tuple[int, int, str]:
    """(times this process read the shards, samples, digest)."""
    listener = Listener()
    shard_index.logger.addHandler(listener)
    shard_index.logger.setLevel(logging.INFO)
    index = index_of(Path(shards), Path(cache))
    shard_index.logger.removeHandler(listener)
    return sum(message.startswith("indexed") for message in listener.messages), len(index), index.digest


def test_one_of_four_processes_makes_the_index(tmp_path: Path, processes: ProcessPool) -> None:
    count_lines(tmp_path / "a.txt", 50_000)
    answers = processes.run(4, build_in_rank, str(tmp_path / "a.txt"), str(tmp_path / "cache"))
    assert sum(built for built, _, _ in answers) == 1
    assert {(samples, digest) for _, samples, digest in answers} == {(50_000, answers[0][2])}


HOLD = """
import fcntl, os, sys, time
descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(descriptor, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(100)
"""


def test_a_killed_maker_of_an_index_keeps_nobody_waiting(
    shards: Path, missing: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left_over = missing.parent / f".{missing.name}-abc.partial"
    left_over.write_text("half")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(missing.with_suffix(".lock"))], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"

        def killed_when_waited_for(record: logging.LogRecord) -> bool:
            if "another process indexes the prompt files; waiting for it" in record.getMessage():
                holder.kill()
            return True

        with caplog.at_level(logging.INFO, shard_index.logger.name), caplog.filtering(killed_when_waited_for):
            assert len(index_of(shards, missing.parent)) == 24
        assert holder.wait(60) == -signal.SIGKILL
    assert missing.exists()
    assert not left_over.exists()


def test_nobody_waits_for_ever(
    shards: Path, missing: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import fcntl

    monkeypatch.setattr(shard_index, "LOCK_SECONDS", 0.5)
    with open(missing.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with caplog.at_level(logging.WARNING):
            assert len(index_of(shards, missing.parent)) == 24
    assert "indexing here, too" in caplog.text


def test_times_of_files_are_compared_for_equality_only(tmp_path: Path, shards: Path) -> None:
    """A clock that was set forward and back leaves files from the future, and an index older than its shards."""
    cache = tmp_path / "cache"
    for number, moment in enumerate((0, 4102444800, 1, 2**31)):
        os.utime(shards / f"s{number}.tar", (moment, moment))
    first = index_of(shards, cache)
    assert first.path is not None
    os.utime(first.path, (0, 0))
    assert index_of(shards, cache).path == first.path
    assert len(list(cache.glob("*.index"))) == 1


def test_too_large_a_sample_is_an_error(tmp_path: Path) -> None:
    def scan(file: Path, bad: Any) -> Any:
        yield shard_index.Span(0, 1 << 32, 0, 0)

    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="expected less than 4 GiB"):
        shard_index.build_index([tmp_path / "a.txt"], scan, None)  # type: ignore[arg-type]
