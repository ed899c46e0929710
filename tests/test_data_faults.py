"""What goes wrong with data while a run uses it: real files that vanish or change, real workers that stop or die."""

from __future__ import annotations

import logging
import os
import random
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from process_pool import ProcessPool
from tiny.prompts import LONGER, prompts_of, tar, uneven_shards
from tiny.reward_training import blue_shards

from nemo_aligner_diffusion.data.datamodule import PromptDataModule
from nemo_aligner_diffusion.data.preferences.reward_pairs import PreferenceDataset
from nemo_aligner_diffusion.data.prompts import PromptDataset, build_prompt_loader
from nemo_aligner_diffusion.data.stream_loader import StreamLoader
from nemo_aligner_diffusion.errors import DataError
from nemo_aligner_diffusion.rewards import Preprocessing


def shards(folder: Path) -> list[str]:
    return uneven_shards(folder, LONGER)


def shard_of(prompt: str) -> str:
    return f"s{prompt.split()[1].split('.')[0]}.tar"


# --- shards that are unusable from the start: found while indexing, so decided once and for all ranks


def truncate(path: Path) -> None:
    os.truncate(path, 12_000)


def damage_a_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[10 * 1024 + 3] ^= 1
    path.write_bytes(data)


def no_tar(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04" + bytes(2000))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "said", "left"),
    [
        (truncate, "is truncated", 10),
        (damage_a_header, "is damaged after member", 9),  # the tenth waits for members of its name
        (no_tar, "is not a tar archive", 0),
        (empty, "is empty|holds nothing", 0),
    ],
)
def test_a_shard_that_is_bad_from_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Any, said: str, left: int
) -> None:
    shards(tmp_path)
    spoil(tmp_path / "s1.tar")
    with pytest.raises(DataError, match=rf"s1\.tar.*({said})|({said})"):
        PromptDataset(tmp_path, micro_batch_size=4)
    options: dict[str, Any] = {"micro_batch_size": 4, "on_bad_shard": "skip", "world_size": 2, "incomplete": "wrap"}
    with caplog.at_level(logging.WARNING):
        ranks = [list(PromptDataset(tmp_path, rank=rank, epochs=2, **options)) for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == -(-2 * (130 + left) // 8)
    seen = [p for pair in zip(*ranks, strict=True) for batch in pair for p in batch["prompts"]][: 130 + left]
    assert len(set(seen)) == 130 + left
    assert len([p for p in seen if shard_of(p) == "s1.tar"]) == left
    warnings = [record.getMessage() for record in caplog.records]
    assert sum("skipped: " in text and "s1.tar" in text for text in warnings) == 1
    for epoch in (0, 1):  # once an epoch, by rank 0 for all
        (line,) = (text for text in warnings if text.startswith(f"epoch {epoch}: skipped 1 unusable samples"))
        assert "1 of them shards" in line


def test_a_shard_without_permission(open_folder: Path) -> None:
    prompts = shards(open_folder)
    (open_folder / "s2.tar").chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(DataError, match=r"s2\.tar cannot be read: [Pp]ermission denied"):
            PromptDataset(open_folder, micro_batch_size=4)
        dataset = PromptDataset(open_folder, micro_batch_size=2, on_bad_shard="skip", epochs=1)
        assert sorted(prompts_of(dataset)) == sorted(p for p in prompts if shard_of(p) != "s2.tar")
    finally:
        if root:
            os.seteuid(0)


def test_a_missing_file_of_a_range(tmp_path: Path) -> None:
    prompts = shards(tmp_path)
    (tmp_path / "s3.tar").unlink()
    spec = f"{tmp_path}/s{{0..3}}.tar"
    with pytest.raises(DataError, match="names 4 files, of which 1 do not exist"):
        PromptDataset(spec, micro_batch_size=1)
    dataset = PromptDataset(spec, micro_batch_size=1, on_bad_shard="skip", epochs=1)
    assert sorted(prompts_of(dataset)) == sorted(p for p in prompts if shard_of(p) != "s3.tar")
    with pytest.raises(DataError, match="names 3 files, of which 3 do not exist"):
        PromptDataset(f"{tmp_path}/s{{5..7}}.tar", micro_batch_size=1, on_bad_shard="skip")


def test_samples_and_shards_have_a_key_each(tmp_path: Path) -> None:
    shards(tmp_path)
    tar(tmp_path / "t.tar", {"0.txt": "good", "1.txt": b"\xff"})
    with pytest.raises(DataError, match=r"'1\.txt' is not UTF-8"):  # one sample, and no shard, is unusable
        PromptDataset(tmp_path, micro_batch_size=1, on_bad_shard="skip")
    truncate(tmp_path / "s0.tar")
    with pytest.raises(DataError, match=r"s0\.tar is truncated"):
        PromptDataset(tmp_path, micro_batch_size=1, on_bad_sample="skip", on_bad_shard="error")
    index = PromptDataset(tmp_path, micro_batch_size=1, on_bad_sample="skip").index
    assert (index.left_out["samples"], index.left_out["shards"]) == (2, 1)
    with pytest.raises(DataError, match="on_bad_shard is 'ignore'"):
        PromptDataset(tmp_path, micro_batch_size=1, on_bad_shard="ignore")  # type: ignore[arg-type]


# --- shards that become unusable while the run uses them


def vanish(path: Path) -> None:
    path.unlink()


def overwrite(path: Path) -> None:
    """As long as before, and not one sample where it was."""
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def become_a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


FAULTS = {
    vanish: "cannot be read: No such file",
    truncate: "is truncated",
    overwrite: "is damaged or was changed since it was indexed",
    become_a_fifo: "it is no regular file",
    become_a_folder: "it is no regular file",
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("spoil", list(FAULTS))
def test_a_shard_lost_under_way_is_one_error(tmp_path: Path, spoil: Any, workers: int) -> None:
    shards(tmp_path)
    loader = build_prompt_loader(
        tmp_path, micro_batch_size=2, shuffle_buffer=0, rank=1, world_size=2, num_workers=workers
    )
    stream = iter(loader)
    next(stream)
    spoil(tmp_path / "s3.tar")  # not opened yet
    with pytest.raises(DataError) as caught:
        list(islice(stream, 60))
    message = str(caught.value)
    assert "s3.tar" in message
    assert FAULTS[spoil] in message
    assert re.search(r"data rank 1, worker [01]" if workers else r"\(data rank 1, sample \d+", message)
    assert "\n" not in message


@pytest.mark.parametrize("spoil", list(FAULTS))
def test_a_lost_shard_is_replaced_alike_under_every_layout(
    tmp_path: Path, spoil: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Two epochs of 160 by 1 rank of 8, 2 of 4 (one with two workers) and 4 of 2."""
    shards(tmp_path)
    options: dict[str, Any] = {"seed": 3, "shuffle_buffer": 30, "on_bad_shard": "skip", "epochs": 2}
    undisturbed = prompts_of(build_prompt_loader(tmp_path, micro_batch_size=8, **options))
    layouts = [(1, 0), (2, 0), (4, 0), (2, 2)]
    loaders: list[list[StreamLoader]] = [
        [
            build_prompt_loader(
                tmp_path, micro_batch_size=8 // size, rank=rank, world_size=size, num_workers=workers, **options
            )
            for rank in range(size)
        ]
        for size, workers in layouts
    ]
    spoil(tmp_path / "s2.tar")
    with caplog.at_level(logging.WARNING):
        runs = [[list(rank) for rank in ranks] for ranks in loaders]
    for ranks in runs:
        assert {len(rank) for rank in ranks} == {40}  # nobody ends early: nobody waits for ever
    merged = [[p for pair in zip(*ranks, strict=True) for b in pair for p in b["prompts"]] for ranks in runs]
    assert merged[1:] == merged[:1] * 3
    whole = {"s0.tar", "s1.tar", "s3.tar"}
    readable = 12 if spoil is truncate else 0  # what lies before the cut
    for before, now in zip(undisturbed, merged[0], strict=True):
        if shard_of(before) in whole:
            assert now == before
        else:
            assert shard_of(now) in whole or int(now.split(".")[1]) < readable
    lost = sum(before != now for before, now in zip(undisturbed, merged[0], strict=True))
    assert lost == loaders[0][0].stream.replaced == 2 * (50 - readable)
    texts = [record.getMessage() for record in caplog.records]
    for epoch in (0, 1):
        assert any(re.match(rf"epoch {epoch}: replaced \d+ prompts of 1 shards .*\(data rank 0\)", t) for t in texts)
    assert any("s2.tar" in text and "is replaced by other prompts" in text for text in texts)


def test_a_shard_that_comes_back_is_read_again_in_the_next_epoch(tmp_path: Path) -> None:
    prompts = shards(tmp_path)
    dataset = PromptDataset(tmp_path, micro_batch_size=4, on_bad_shard="skip")
    (tmp_path / "s2.tar").rename(tmp_path / "away")
    stream = iter(dataset)
    first = [p for _ in range(39) for p in next(stream)["prompts"]]
    assert not any(shard_of(p) == "s2.tar" for p in first)
    (tmp_path / "away").rename(tmp_path / "s2.tar")
    next(stream)
    assert sorted(p for _ in range(40) for p in next(stream)["prompts"]) == sorted(prompts)


def test_when_everything_is_lost(tmp_path: Path) -> None:
    shards(tmp_path)
    dataset = PromptDataset(tmp_path, micro_batch_size=4, on_bad_shard="skip")
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(DataError, match="4 of 4 files have become unreadable"):
        next(iter(dataset))


def test_a_compressed_shard_may_go_once_it_is_indexed(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar.gz", {f"{n}.txt": f"p{n}" for n in range(8)}, "w:gz")
    stream = iter(PromptDataset(path, micro_batch_size=1, shuffle_buffer=0, index_folder=tmp_path))
    path.unlink()
    assert [next(stream)["prompts"] for _ in range(16)] == [[f"p{n}"] for n in range(8)] * 2


def test_preference_pairs_are_replaced_too(tmp_path: Path) -> None:
    folder = blue_shards(tmp_path, 24, samples_per_shard=6)
    options: dict[str, Any] = {"prepare": Preprocessing(32).square, "micro_batch_size": 4, "epochs": 1, "seed": 1}
    before = list(PreferenceDataset(str(folder), **options))
    lenient = PreferenceDataset(str(folder), on_bad_shard="skip", **options)
    strict = PreferenceDataset(str(folder), **options)
    (folder / "preferences-0002.tar").unlink()
    after = list(lenient)
    changed = sum(
        not torch.equal(a, b)
        for old, new in zip(before, after, strict=True)
        for a, b in zip(old["images"], new["images"], strict=True)
    )
    assert changed == lenient.replaced == 6
    with pytest.raises(DataError, match=r"preferences-0002\.tar cannot be read: .*\(data rank 0"):
        list(strict)


# --- ranks


def disagree(folder: str) -> str:
    """Rank 1 lacks a shard."""
    rank = torch.distributed.get_rank()
    data = PromptDataModule(f"{folder}/{rank}", micro_batch_size=1, rank=rank, world_size=2)
    data.trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    data.setup("fit")
    try:
        data.train_dataloader()
    except DataError as error:
        return str(error)
    return "no error"


def test_ranks_that_see_other_files_stop_together(tmp_path: Path, processes: ProcessPool) -> None:
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        shards(tmp_path / rank)
    assert processes.run(2, disagree, str(tmp_path)) == ["no error"] * 2
    (tmp_path / "1" / "s3.tar").unlink()
    for answer in processes.run(2, disagree, str(tmp_path)):
        assert "the ranks do not see the same training files" in answer
        assert "'samples': 160" in answer


def batch_in_group(folder: str) -> tuple[list[str], list[str]]:
    """A shard vanishes after tensor rank 0 has read it and before rank 1 has: (read here, given to the model)."""
    from nemo_aligner_diffusion.parallel.layout import Layout
    from nemo_aligner_diffusion.parallel.strategy import ParallelStrategy

    rank = torch.distributed.get_rank()
    data = PromptDataModule(folder, micro_batch_size=8, on_bad_shard="skip", rank=0, world_size=1, shuffle_buffer=0)
    strategy = ParallelStrategy(Layout(data=1, tensor=2))
    strategy._device_mesh = torch.distributed.device_mesh.init_device_mesh(
        "cpu", (1, 2), mesh_dim_names=("data_parallel", "tensor_parallel")
    )
    data.trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_checkpointing=False)
    data.trainer.training = True
    stream = iter(data.train_dataloader())
    if rank == 1:
        torch.distributed.barrier()
        batch = next(stream)
    else:
        batch = next(stream)
        (Path(folder) / "s0.tar").unlink()
        torch.distributed.barrier()
    return batch["prompts"], data.on_before_batch_transfer(batch, 0)["prompts"]


def test_a_tensor_group_trains_on_one_batch(tmp_path: Path, processes: ProcessPool) -> None:
    prompts = shards(tmp_path)
    (read_0, given_0), (read_1, given_1) = processes.run(2, batch_in_group, str(tmp_path))
    assert read_0 == prompts[:8] != read_1
    assert given_0 == given_1 == read_0


def test_the_keys_reach_the_loader(tmp_path: Path) -> None:
    from nemo_aligner_diffusion.config.load import load_settings
    from nemo_aligner_diffusion.training.run import _build_data

    (tmp_path / "shards").mkdir()
    prompts = shards(tmp_path / "shards")
    (tmp_path / "shards" / "s0.tar").unlink()
    files = f"{tmp_path}/shards/s{{0..3}}.tar"
    overrides = {
        "train.webdataset.local_root_path": files,
        "on_bad_shard": "skip",
        "worker_timeout_seconds": 7,
        "index_folder": tmp_path / "index",
    }
    data = _build_data(load_settings("draftp_sd", [f"model.data.{key}={value}" for key, value in overrides.items()]))
    data.setup("fit")
    loader = data.train_dataloader()
    assert loader.worker_timeout_seconds == 7
    index = loader.stream.index
    assert (len(index), index.left_out["shards"]) == (120, 1)
    assert index.folder is not None
    assert index.folder.parent == tmp_path / "index"
    assert data.validation_prompts == [p for p in prompts if shard_of(p) != "s0.tar"][:24]
