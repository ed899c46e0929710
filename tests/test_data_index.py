"""Samples by their position: the order of an epoch, and the index that says where each sample is."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from process_pool import ProcessPool
from tiny.prompts import ODD_PROMPTS, take, tar, uneven_shards

from nemo_aligner_diffusion.data import shard_index
from nemo_aligner_diffusion.data.epoch_order import LANES, SMALL_SOURCE, EpochOrder
from nemo_aligner_diffusion.data.prompts import PromptDataset
from nemo_aligner_diffusion.data.spans import Span
from nemo_aligner_diffusion.errors import DataError


def rows(counts: list[int], *args: int, start: int = 0) -> np.ndarray[Any, Any]:
    """Of an epoch from place ``start`` on."""
    order, place, found = EpochOrder(np.array(counts), *args), start, []
    while place < sum(counts):
        first, block = order.block(place)
        found.append(block[place - first :])
        place = first + len(block)
    return np.concatenate(found)


MANY = [1000] * 70 + [0, 1, 30_017, 2]  # 100,020 samples: more than a small source


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("buffer", [0, 1, 2, 5, 23, 24, 25, 1000])
def test_the_order_is_that_of_a_stream_through_a_shuffle_buffer(tmp_path: Path, buffer: int, mode: str) -> None:
    for number, size in enumerate((7, 1, 12, 4)):
        tar(tmp_path / f"{number}.tar", {f"{n}.txt": f"{number}.{n}" for n in range(size)}, mode)
    options: dict[str, Any] = {"micro_batch_size": 2, "seed": 5, "shuffle_buffer": buffer, "start_sample": 6}
    seen = [p for batch in take(tmp_path, 33, index_folder=tmp_path / "i", **options) for p in batch["prompts"]]
    expected: list[str] = []
    for epoch in range(3):
        shards = [[f"{number}.{n}" for n in range(size)] for number, size in enumerate((7, 1, 12, 4))]
        if buffer:
            random.Random(f"5/{epoch}/files").shuffle(shards)
        stream = iter([prompt for shard in shards for prompt in shard])
        shuffle = wds.shuffle(buffer, initial=buffer, rng=random.Random(f"5/{epoch}/prompts"))
        expected += shuffle(stream) if buffer else stream
    assert seen == expected[6:]


def test_compressed_shards_keep_the_order_of_a_stream_at_any_size() -> None:
    """That of runs from before there was an index of them."""
    counts, rng = np.array([SMALL_SOURCE, 5]), random.Random("1/0/prompts")
    shards = [(0, SMALL_SOURCE), (SMALL_SOURCE, SMALL_SOURCE + 5)]
    random.Random("1/0/files").shuffle(shards)
    stream = wds.shuffle(7, initial=7, rng=rng)(iter([row for shard in shards for row in range(*shard)]))
    assert EpochOrder(counts, 1, 0, 7, streamed=True).block(3)[1].tolist() == list(stream)


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
    return PromptDataset(folder, micro_batch_size=1, index_folder=cache, **options).index


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder with 24 prompts in 4 shards."""
    folder = tmp_path / "shards"
    folder.mkdir()
    uneven_shards(folder)
    return folder


def test_an_index_is_made_once_and_again_when_shards_change(tmp_path: Path, shards: Path) -> None:
    cache = tmp_path / "deep" / "cache"
    first = index_of(shards, cache)
    assert first.folder is not None
    made = first.folder.stat().st_ino
    again = index_of(shards, cache)
    assert again.folder == first.folder
    assert again.folder.stat().st_ino == made
    assert np.array_equal(again.records, first.records)
    tar(shards / "s1.tar", {"a.txt": "one", "b.txt": "two"})
    changed = index_of(shards, cache)
    assert changed.folder != first.folder
    assert (len(changed), changed.digest == first.digest) == (25, False)
    assert sorted(path.suffix for path in cache.iterdir()) == ["", "", ".lock", ".lock"]


@pytest.mark.parametrize("damaged", ["records", "index.json"])
@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"\xff" + data[1:], lambda data: b""])
def test_a_damaged_index_is_made_anew(tmp_path: Path, damaged: str, damage: Any) -> None:
    prompts = uneven_shards(tmp_path)
    folder = index_of(tmp_path, tmp_path / "cache").folder
    assert folder is not None
    whole = (folder / damaged).read_bytes()
    (folder / damaged).write_bytes(damage(whole))
    assert len(index_of(tmp_path, tmp_path / "cache")) == len(prompts)
    assert (folder / damaged).read_bytes() == whole


def test_small_sources_leave_no_file_but_large_and_compressed_ones_go_to_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    uneven_shards(tmp_path)
    take(tmp_path / "s0.tar", 1, micro_batch_size=1)
    assert not (tmp_path / "caches").exists()
    with (tmp_path / "large.txt").open("w") as stream:
        for number in range(600):
            stream.write(f"{number} {'x' * 60_000}\n")
    tar(tmp_path / "packed.tgz", {"0.txt": "p"}, "w:gz")
    for made, name in enumerate(("large.txt", "packed.tgz"), start=1):
        take(tmp_path / name, 1, micro_batch_size=1)
        assert len(list((tmp_path / "caches/nemo_aligner_diffusion/shard_index").glob("*/records"))) == made


def test_compressed_and_plain_shards_together(tmp_path: Path) -> None:
    for number, mode in enumerate(("w", "w:gz", "w", "w:gz")):
        tar(tmp_path / f"{number}.tar", {f"{n}.txt": f"{number}.{n}" for n in range(5)}, mode)
    options: dict[str, Any] = {"micro_batch_size": 2, "index_folder": tmp_path / "index", "shuffle_buffer": 6}
    whole = take(tmp_path, 20, **options)
    assert Counter(p for batch in whole for p in batch["prompts"]) == Counter(
        [f"{number}.{n}" for number in range(4) for n in range(5)] * 2
    )
    for workers in (0, 2):
        resumed = take(tmp_path, 13, start_sample=14, num_workers=workers, **options)
        assert [batch["prompts"] for batch in resumed] == [batch["prompts"] for batch in whole[7:]]


def test_a_compressed_bomb_does_not_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_index, "UNPACKED_BYTES", 0)
    tar(tmp_path / "a.tar", {f"{n}.txt": "x" * 60_000 for n in range(50)}, "w:gz")
    with pytest.raises(DataError, match=r"a\.tar: its samples have more than 100 times its size"):
        index_of(tmp_path / "a.tar", tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_compressed_shards_need_a_folder(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", {"0.txt": "p"}, "w:gz")
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        DataError, match=r"a\.tar is compressed and cannot be unpacked into .*model\.data\.index_folder"
    ):
        index_of(tmp_path / "a.tar", tmp_path / "file" / "cache")


def test_a_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompts = uneven_shards(tmp_path)
    (tmp_path / "file").write_text("x")
    with caplog.at_level(logging.WARNING):
        index = index_of(tmp_path / "s0.tar", tmp_path / "file" / "cache")
    assert index.folder is None
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


def test_a_killed_maker_of_an_index_keeps_nobody_waiting(shards: Path, tmp_path: Path) -> None:
    """Its lock goes with it, and what it left is removed."""
    made = index_of(shards, tmp_path / "cache").folder
    assert made is not None
    shutil.rmtree(made)
    left_over = made.parent / f".{made.name}-abc.partial"
    left_over.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(made) + ".lock"], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        killer = threading.Timer(1, holder.kill)
        killer.start()
        assert len(index_of(shards, made.parent)) == 24
        assert holder.wait(60) == -signal.SIGKILL
    assert made.exists()
    assert not left_over.exists()


def test_nobody_waits_for_ever(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = index_of(shards, tmp_path / "cache").folder
    assert made is not None
    shutil.rmtree(made)
    monkeypatch.setattr(shard_index, "LOCK_SECONDS", 0.5)
    with open(f"{made}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with caplog.at_level(logging.WARNING):
            assert len(index_of(shards, made.parent)) == 24
    assert "indexing here, whoever else does" in caplog.text


def test_times_of_files_are_compared_for_equality_only(tmp_path: Path, shards: Path) -> None:
    """A clock that was set forward and back leaves files from the future, and an index older than its shards."""
    cache = tmp_path / "cache"
    for number, moment in enumerate((0, 4102444800, 1, 2**31)):
        os.utime(shards / f"s{number}.tar", (moment, moment))
    first = index_of(shards, cache)
    assert first.folder is not None
    os.utime(first.folder / "records", (0, 0))
    assert index_of(shards, cache).folder == first.folder
    assert len(list(cache.glob("*/records"))) == 1


def test_too_large_a_sample_is_an_error(tmp_path: Path) -> None:
    def scan(file: Path, bad: Any) -> Any:
        yield Span(0, 1 << 32, 0, 0)

    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="expected less than 4 GiB"):
        shard_index.build_index([tmp_path / "a.txt"], scan, None)  # type: ignore[arg-type]
