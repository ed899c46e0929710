"""The data module under a real trainer: layout, position in checkpoints, validation."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from tiny.prompts import take, tar, uneven_shards

from nemo_aligner_diffusion.data.datamodule import PromptDataModule
from nemo_aligner_diffusion.data.prompts import build_prompt_loader
from nemo_aligner_diffusion.errors import DataError


class Recorder(pl.LightningModule):
    """Trains one number and notes the prompts it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[str] = []
        self.validated: list[str] = []

    def training_step(self, batch: dict[str, Any], _: int) -> torch.Tensor:
        self.seen += batch["prompts"]
        return (self.weight - 1) ** 2

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        self.validated += batch["prompts"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(data: PromptDataModule, steps: int, ckpt_path: str | None = None, **options: Any) -> Recorder:
    recorder = Recorder()
    pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False} | options,
    ).fit(recorder, datamodule=data, ckpt_path=ckpt_path)
    return recorder


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_sees_what_an_undisturbed_one_sees(tmp_path: Path, workers: int) -> None:
    """24 prompts, 3 micro-batches of 2 a step: the checkpoint after step 5 lies in the second epoch."""
    shards = tmp_path / "shards"
    shards.mkdir()
    prompts = uneven_shards(shards)

    def data() -> PromptDataModule:
        return PromptDataModule(
            shards, micro_batch_size=2, global_batch_size=6, seed=3, shuffle_buffer=7, num_workers=workers
        )

    accumulate = {"accumulate_grad_batches": 3}
    whole = fit(data(), 8, **accumulate).seen
    assert Counter(whole) == Counter(prompts * 2)
    saving = ModelCheckpoint(tmp_path / "saved", save_last=True, every_n_train_steps=5)
    first = fit(data(), 5, callbacks=[saving], enable_checkpointing=True, **accumulate).seen
    module = data()
    rest = fit(module, 8, ckpt_path=str(tmp_path / "saved" / "last.ckpt"), **accumulate).seen
    assert first + rest == whole
    assert module.samples_consumed == 48

    state = torch.load(tmp_path / "saved" / "last.ckpt", weights_only=True)["PromptDataModule"]
    assert state.pop("contents")["samples"] == 24
    assert state == {"samples_consumed": 30, "order": {"seed": 3, "shuffle_buffer": 7}}
    other_layout = [
        PromptDataModule(shards, micro_batch_size=1, rank=r, world_size=2, seed=3, shuffle_buffer=7) for r in (0, 1)
    ]
    for module in other_layout:
        module.load_state_dict(state)
    streams = [iter(module.train_dataloader()) for module in other_layout]
    assert [prompt for _ in range(9) for stream in streams for prompt in next(stream)["prompts"]] == rest


def test_a_loader_made_anew_goes_on(tmp_path: Path) -> None:
    uneven_shards(tmp_path)
    data = PromptDataModule(tmp_path, micro_batch_size=3, seed=2)
    seen = fit(data, 6, limit_train_batches=2, reload_dataloaders_every_n_epochs=1).seen
    assert seen == [p for batch in take(tmp_path, 6, micro_batch_size=3, seed=2) for p in batch["prompts"]]


def test_start_sample_and_epochs(tmp_path: Path) -> None:
    uneven_shards(tmp_path)
    data = PromptDataModule(tmp_path, micro_batch_size=4, epochs=2, start_sample=32)
    assert len(fit(data, 100, max_epochs=1).seen) == 48 - 32


def test_validation_is_in_order_and_wraps(tmp_path: Path) -> None:
    uneven_shards(tmp_path)
    (tmp_path / "v.txt").write_text("a\nb\nc\n")
    data = PromptDataModule(tmp_path / "s0.tar", tmp_path / "v.txt", micro_batch_size=1, validation_batch_size=2)
    recorder = fit(data, 2, val_check_interval=2, check_val_every_n_epoch=None, num_sanity_val_steps=0)
    assert recorder.validated == ["a", "b", "c", "a"]


def test_without_validation(tmp_path: Path) -> None:
    uneven_shards(tmp_path)
    recorder = fit(PromptDataModule(tmp_path, micro_batch_size=1), 2)
    assert len(recorder.seen) == 2
    assert recorder.validated == []


def test_a_subclass_may_bring_its_own_validation(tmp_path: Path) -> None:
    class Own(PromptDataModule):
        def val_dataloader(self) -> Any:
            return build_prompt_loader(tmp_path / "s1.tar", micro_batch_size=1, epochs=1)

    uneven_shards(tmp_path)
    options: dict[str, Any] = {"val_check_interval": 2, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    assert fit(Own(tmp_path, micro_batch_size=1), 2, **options).validated == ["prompt 1.0"]


def test_layout_comes_from_the_trainer(tmp_path: Path) -> None:
    """Two nodes of three processes; the strategy knows its rank before any of them is launched."""
    uneven_shards(tmp_path)
    data = PromptDataModule(tmp_path, micro_batch_size=2)
    assert data.data_parallel == (0, 1)
    data.trainer = pl.Trainer(accelerator="cpu", devices=3, num_nodes=2, strategy="ddp", logger=False)
    assert data.data_parallel == (0, 6)
    data.setup("fit")
    assert data.train_dataloader().stream.step_size == 12
    assert PromptDataModule(tmp_path, micro_batch_size=2, rank=1, world_size=4).data_parallel == (1, 4)


def test_another_order_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    uneven_shards(tmp_path)
    state = PromptDataModule(tmp_path, micro_batch_size=1, seed=1, start_sample=5).state_dict()
    with caplog.at_level(logging.WARNING):
        PromptDataModule(tmp_path, micro_batch_size=1, seed=1).load_state_dict(state)
        assert caplog.text == ""
        changed = PromptDataModule(tmp_path, micro_batch_size=1, seed=2)
        changed.load_state_dict(state)
    assert "written with seed 1 and this run has 2" in caplog.text
    assert changed.samples_consumed == 5


def test_bad_input_is_found_at_setup(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no prompt file"):
        PromptDataModule(tmp_path, micro_batch_size=1).setup("fit")
    tar(tmp_path / "a.tar", {"a.txt": "p"})
    tar(tmp_path / "b.tar", {"a.txt": b"\xff"})
    with pytest.raises(DataError, match=r"b\.tar: member 'a.txt' is not UTF-8"):
        PromptDataModule(tmp_path / "a.tar", tmp_path / "b.tar", micro_batch_size=1).setup("fit")
    with pytest.raises(DataError, match="expected both or neither"):
        PromptDataModule(tmp_path, micro_batch_size=1, rank=0)
