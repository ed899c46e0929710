"""The order of prompts: the same under every layout and worker count, each once an epoch, exact after resuming."""

from __future__ import annotations

import logging
import random
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny.prompts import take, tar, uneven_shards

from nemo_aligner_diffusion.data.prompts import PromptDataset, build_prompt_loader, read_prompts
from nemo_aligner_diffusion.errors import DataError


def flat(batches: list[dict[str, Any]]) -> list[str]:
    return [prompt for batch in batches for prompt in batch["prompts"]]


def test_each_prompt_once_an_epoch_and_another_order_in_the_next(tmp_path: Path) -> None:
    prompts = uneven_shards(tmp_path)  # 24 of them
    batches = take(tmp_path, 18, micro_batch_size=4, shuffle_buffer=5)
    epochs = [flat(batches[start : start + 6]) for start in (0, 6, 12)]
    for number, epoch in enumerate(epochs):
        assert Counter(epoch) == Counter(prompts)
        assert [batch["epoch"] for batch in batches[6 * number : 6 * number + 6]] == [number] * 6
    assert len({tuple(epoch) for epoch in [prompts, *epochs]}) == 4
    assert torch.equal(torch.cat([batch["index"] for batch in batches]), torch.arange(72))
    assert batches[0]["index"].dtype == torch.int64


def test_the_seed_decides_the_order(tmp_path: Path) -> None:
    uneven_shards(tmp_path)
    first, again, other = (flat(take(tmp_path, 6, micro_batch_size=4, seed=seed)) for seed in (3, 3, 4))
    assert first == again != other


def test_the_order_is_fixed_for_good(tmp_path: Path) -> None:
    """Runs resumed with a later version of the package must not see another order."""
    uneven_shards(tmp_path, (3, 2))
    order = [prompt.split()[1] for prompt in flat(take(tmp_path, 2, micro_batch_size=5, seed=1, shuffle_buffer=3))]
    assert order == ["0.1", "0.0", "1.1", "1.0", "0.2", "1.0", "0.1", "0.2", "1.1", "0.0"]


def test_shuffling_reaches_beyond_shards(tmp_path: Path) -> None:
    uneven_shards(tmp_path, (50, 50))
    first_half = flat(take(tmp_path, 50, micro_batch_size=1, shuffle_buffer=60))
    assert 5 < sum(prompt.startswith("prompt 0.") for prompt in first_half) < 45


def test_buffer_0_keeps_the_order_and_1_shuffles_files_only(tmp_path: Path) -> None:
    prompts = uneven_shards(tmp_path)
    assert flat(take(tmp_path, 6, micro_batch_size=4, shuffle_buffer=0)) == prompts
    by_file = flat(take(tmp_path, 6, micro_batch_size=4, shuffle_buffer=1, seed=2))
    assert by_file != prompts
    assert sorted(by_file, key=lambda p: int(p.split()[1].split(".")[0])) == prompts  # sorted() is stable


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_layout_sees_the_same_global_batches(tmp_path: Path, world_size: int, workers: int) -> None:
    """A global batch of 8 as 8, 2×4 or 4×2; 6 of them: two epochs of 24 prompts."""
    prompts = uneven_shards(tmp_path)
    expected = take(tmp_path, 6, micro_batch_size=8, seed=5, shuffle_buffer=9)
    ranks = [
        take(
            tmp_path,
            6,
            micro_batch_size=8 // world_size,
            seed=5,
            shuffle_buffer=9,
            rank=rank,
            world_size=world_size,
            num_workers=workers,
        )
        for rank in range(world_size)
    ]
    for number, whole in enumerate(expected):
        shares = [rank[number] for rank in ranks]
        assert flat(shares) == whole["prompts"]
        assert torch.equal(torch.cat([share["index"] for share in shares]), whole["index"])
        assert {share["epoch"] for share in shares} == {whole["epoch"]}
    assert Counter(flat(expected)) == Counter(prompts * 2)


def test_accumulation_in_place_of_ranks_gives_the_same_micro_batches(tmp_path: Path) -> None:
    uneven_shards(tmp_path)
    alone = take(tmp_path, 8, micro_batch_size=3, global_batch_size=12)
    two = [take(tmp_path, 4, micro_batch_size=3, rank=r, world_size=2, global_batch_size=12) for r in (0, 1)]
    assert flat(alone) == flat([two[number % 2][number // 2] for number in range(8)])


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_workers_do_not_change_the_stream(tmp_path: Path, workers: int) -> None:
    uneven_shards(tmp_path)
    options: dict[str, Any] = {"micro_batch_size": 2, "shuffle_buffer": 4, "rank": 1, "world_size": 3, "seed": 9}
    expected = take(tmp_path, 11, **options)
    assert flat(take(tmp_path, 11, num_workers=workers, **options)) == flat(expected)


@pytest.mark.parametrize("start", [2, 22, 24, 26, 48, 120, 1002])
def test_resuming_at_any_sample(tmp_path: Path, start: int) -> None:
    """Within the first epoch, at its very end, and many epochs on."""
    uneven_shards(tmp_path)
    options: dict[str, Any] = {"micro_batch_size": 2, "shuffle_buffer": 7, "seed": 1}
    whole = take(tmp_path, start // 2 + 15, **options)[start // 2 :]
    resumed = take(tmp_path, 15, start_sample=start, **options)
    assert [b["prompts"] for b in resumed] == [b["prompts"] for b in whole]
    assert [b["epoch"] for b in resumed] == [b["epoch"] for b in whole]
    assert all(torch.equal(a["index"], b["index"]) for a, b in zip(resumed, whole, strict=True))


def test_resuming_under_another_layout(tmp_path: Path) -> None:
    uneven_shards(tmp_path)
    before = take(tmp_path, 5, micro_batch_size=4)  # 20 samples on one rank, then two ranks of 2
    after = [take(tmp_path, 4, micro_batch_size=2, rank=r, world_size=2, start_sample=20) for r in (0, 1)]
    merged = flat([after[number % 2][number // 2] for number in range(8)])
    assert flat(before) + merged == flat(take(tmp_path, 9, micro_batch_size=4))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("incomplete", "length"), [("drop", 4), ("wrap", 6)])
def test_the_end_of_a_finite_stream(tmp_path: Path, workers: int, incomplete: str, length: int) -> None:
    """21 prompts in global batches of 8 (2 ranks × 2 × 2): two are dropped to 16, or three wrap to 24."""
    prompts = uneven_shards(tmp_path, (10, 11))
    options: dict[str, Any] = {"micro_batch_size": 2, "world_size": 2, "global_batch_size": 8, "shuffle_buffer": 3}
    ranks = [
        list(build_prompt_loader(tmp_path, rank=r, epochs=1, incomplete=incomplete, num_workers=workers, **options))
        for r in (0, 1)
    ]
    assert [len(rank) for rank in ranks] == [length, length]
    seen = flat([batch for pair in zip(*ranks, strict=True) for batch in pair])
    endless = [take(tmp_path, length, rank=r, **options) for r in (0, 1)]
    assert seen == flat([batch for pair in zip(*endless, strict=True) for batch in pair])
    index = torch.cat([batch["index"] for rank in ranks for batch in rank])
    assert sorted(index.tolist()) == list(range(4 * length))
    if incomplete == "wrap":
        assert Counter(seen[:21]) == Counter(prompts)
    else:
        assert max(Counter(seen).values()) == 1


def test_epochs_count_together(tmp_path: Path) -> None:
    uneven_shards(tmp_path, (5,))
    assert len(list(build_prompt_loader(tmp_path, micro_batch_size=4, epochs=4))) == 5
    assert len(list(build_prompt_loader(tmp_path, micro_batch_size=4, epochs=4, start_sample=12))) == 2
    assert list(build_prompt_loader(tmp_path, micro_batch_size=4, epochs=4, start_sample=20)) == []


def test_every_iteration_starts_anew_and_leaves_torch_alone(tmp_path: Path) -> None:
    uneven_shards(tmp_path)
    loader = build_prompt_loader(tmp_path, micro_batch_size=4, epochs=1)
    state = torch.get_rng_state()
    random_state = random.getstate()
    assert flat(list(loader)) == flat(list(loader))
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == random_state


def test_text_file_and_shards_give_one_stream(tmp_path: Path) -> None:
    prompts = uneven_shards(tmp_path, (6,))
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    options: dict[str, Any] = {"micro_batch_size": 3, "shuffle_buffer": 4}
    assert take(tmp_path / "p.txt", 2, **options)[1]["prompts"] == take(tmp_path / "s0.tar", 2, **options)[1]["prompts"]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_an_unusable_prompt_anywhere_is_found_at_the_start(tmp_path: Path, mode: str) -> None:
    uneven_shards(tmp_path)
    tar(tmp_path / "z.tar", {f"{n}.txt": f"p{n}" for n in range(5)} | {"bad.txt": b"\xff"}, mode)
    with pytest.raises(DataError, match=r"z\.tar: member 'bad\.txt' is not UTF-8"):
        PromptDataset(tmp_path, micro_batch_size=1, index_folder=tmp_path / "index")


def test_skipping(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tar(tmp_path / "a.tar", {"0.txt": b"\xff", "1.txt": "one", "2.txt": "", "3.txt": "three"})
    tar(tmp_path / "b.tar", {"0.jpg": "no prompt"})
    tar(tmp_path / "c.tar", {"0.txt": "four"})
    dataset = PromptDataset(tmp_path, micro_batch_size=1, epochs=2, on_bad_sample="skip")
    with caplog.at_level(logging.WARNING):
        assert Counter(flat(list(dataset))) == Counter(["one", "three", "four"] * 2)  # type: ignore[arg-type]
    assert dataset.index.left_out["samples"] == 3
    assert "epoch 1: skipped 3 unusable samples beside 3 prompts" in caplog.text
    caplog.clear()
    list(PromptDataset(tmp_path, micro_batch_size=1, epochs=1, on_bad_sample="skip", rank=1, world_size=3))
    assert caplog.text == ""  # rank 0 meets the same and speaks


def test_nothing_usable_is_always_an_error(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", {"0.txt": b"\xff"})
    with pytest.raises(DataError, match=r"not one usable prompt \(1 unusable\); set on_bad_sample=error"):
        PromptDataset(tmp_path, micro_batch_size=1, on_bad_sample="skip")
    with pytest.raises(DataError, match="not one usable prompt"):
        read_prompts(tmp_path, on_bad_sample="skip")


def test_what_is_wrong_with_the_first_shard_is_said_at_once(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", {"0.jpg": "x"})
    with pytest.raises(DataError, match=r"holds no prompt: found 1 \.jpg"):
        build_prompt_loader(tmp_path, micro_batch_size=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch_size": 0}, "micro_batch_size is 0; expected a whole number of at least 1"),
        ({"micro_batch_size": True}, "micro_batch_size is True"),
        ({"shuffle_buffer": -1}, "shuffle_buffer is -1"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"epochs": 0}, "epochs is 0"),
        ({"rank": 2, "world_size": 2}, "rank is 2; expected less than world_size 2"),
        ({"incomplete": "pad"}, "incomplete is 'pad'; expected 'drop' or 'wrap'"),
        ({"world_size": 2, "global_batch_size": 6}, "global_batch_size is 6; expected a multiple of .* 2 × 2 = 4"),
        ({"start_sample": 3}, "start_sample is 3; expected a multiple of .* 2 × 1 = 2"),
    ],
)
def test_numbers_that_do_not_fit(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    uneven_shards(tmp_path, (9,))
    with pytest.raises(DataError, match=message):
        build_prompt_loader(tmp_path, **({"micro_batch_size": 2} | options))


def test_too_few_prompts_for_one_batch(tmp_path: Path) -> None:
    uneven_shards(tmp_path, (3,))
    with pytest.raises(DataError, match=r"3 prompts in 1 epoch\(s\) do not fill one global batch of 4"):
        list(build_prompt_loader(tmp_path, micro_batch_size=4, epochs=1))
    assert len(take(tmp_path, 3, micro_batch_size=4)) == 3  # without an end the stream goes round


def test_nothing_is_loaded_whole(tmp_path: Path) -> None:
    """A shard of 15 MB through a buffer of 10 prompts."""
    tar(tmp_path / "a.tar", {f"{number}.txt": "x" * 5000 for number in range(3000)})
    stream = iter(build_prompt_loader(tmp_path, micro_batch_size=4, shuffle_buffer=10))
    tracemalloc.start()
    try:
        for _ in range(800):
            next(stream)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_read_prompts(tmp_path: Path) -> None:
    prompts = uneven_shards(tmp_path)
    assert read_prompts(tmp_path) == prompts
    assert read_prompts(tmp_path, limit=9) == prompts[:9]
