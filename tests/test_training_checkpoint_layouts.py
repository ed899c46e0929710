"""A checkpoint is one thing under every layout: what one wrote another reads, to the last bit, and goes on from."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_parallel_layouts import LAYOUTS, WHAT

SAVED_AT = 2
PATIENCE = 600.0  # seconds for one run: four processes on two cores that others use, too
WORDS = [
    "trainer.accelerator=cpu",
    "model.micro_batch_size=1",
    "model.global_batch_size=4",
    "model.infer.inference_steps=2",
    "model.infer.height=32",
    "model.infer.width=32",
    "model.truncation_steps=1",
    "model.rollout_precision=same",
    "sched=warmup_hold",
    "model.optim.sched.warmup_steps=4",
    "model.optim.weight_decay=0.1",
    "model.seed=11",
]


def train(devices: int, words: list[str], folder: str, steps: int, resume_from: str | None = None) -> Any:
    """Train to ``steps`` with a checkpoint at the end, and one of the state that was restored, at the beginning."""
    import pytorch_lightning as pl

    from nemo_aligner_diffusion.config.load import load_settings
    from nemo_aligner_diffusion.data.datamodule import PromptDataModule
    from nemo_aligner_diffusion.embedded_assets import embedded_prompts_path
    from nemo_aligner_diffusion.parallel.strategy import ParallelStrategy
    from nemo_aligner_diffusion.rewards import build_reward
    from nemo_aligner_diffusion.training.build import build_model, build_module
    from nemo_aligner_diffusion.training.callbacks.ema import EMACallback
    from nemo_aligner_diffusion.training.callbacks.settings import EMASettings
    from nemo_aligner_diffusion.training.checkpoints.callback import TrainingCheckpoint
    from nemo_aligner_diffusion.training.checkpoints.resume import find_resume_point

    cfg = load_settings("draftp_sd", [*WORDS, f"trainer.devices={devices}", *words])
    layout = cfg.layout
    module = build_module(cfg, build_model(cfg), build_reward(cfg.rm), 4)
    resume = find_resume_point(Path(resume_from)) if resume_from is not None else None
    checkpoint = TrainingCheckpoint(Path(folder), resume=resume)
    losses: list[float] = []

    class Watch(pl.Callback):
        begun = False

        def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:  # once the schedule has its say, too
            if resume is not None and not self.begun:
                self.begun = True
                assert checkpoint._io is not None
                checkpoint._io.bytes_a_writer = 100_000  # so that all of them write, a small model's pieces too
                checkpoint.save(trainer)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            if len(losses) + (resume.step if resume else 0) < trainer.global_step:
                losses.append(pl_module.last_metrics["loss"])

    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=ParallelStrategy(layout) if layout.world_size > 1 else "auto",
        max_steps=steps,
        accumulate_grad_batches=cfg.accumulation,
        limit_val_batches=0,
        callbacks=[EMACallback(EMASettings(decay=0.9)), Watch(), checkpoint],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    data = PromptDataModule(
        embedded_prompts_path("train"), micro_batch_size=cfg.model.micro_batch_size, global_batch_size=4, seed=11
    )
    trainer.fit(module, datamodule=data, ckpt_path=str(resume.path) if resume is not None else None)
    return losses


def train_and_listen(*arguments: Any) -> list[str]:
    """What the package warned of meanwhile."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("nemo_aligner_diffusion")
    logger.addHandler(handler)
    try:
        train(*arguments)
    finally:
        logger.removeHandler(handler)
    return said


def content(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], int]:
    """(document, tensors, number of files that hold them) of a checkpoint, less what belongs to a layout."""
    state = json.loads((folder / "state.json").read_text())["tree"]
    files = sorted(folder.glob("*.safetensors"))
    tensors = {name: value for file in files for name, value in load_file(file).items()}
    own = state.pop("nemo_aligner_diffusion")
    del tensors[own["random_states"]["$tensor"]]
    del state["loops"]  # counts micro-batches, of which a rank has more or fewer
    return state, tensors, len(files)


@pytest.fixture(scope="module")
def saved(processes, tmp_path_factory):
    """Checkpoints of step 2 by layout and way of tuning, each made once."""
    known: dict[tuple[str, str], Path] = {}

    def get(layout: str, what: str) -> Path:
        if (layout, what) not in known:
            folder = tmp_path_factory.mktemp("saved") / "checkpoints"
            folder.mkdir()
            size, more = LAYOUTS.get(layout, (1, []))
            processes.run(size, train, size, [*WHAT[what], *more], str(folder), SAVED_AT, timeout_seconds=PATIENCE)
            known[layout, what] = folder
        return known[layout, what]

    return get


PAIRS = [
    ("TP2", "DP4"),
    ("TP2", "one"),
    ("one", "FSDP2 TP2"),
    ("FSDP2 TP2", "one"),
    ("FSDP2", "TP2 DP2"),
    ("TP2 DP2", "FSDP2"),
]


def _mark(before: str, after: str, what: str) -> tuple[pytest.MarkDecorator, ...]:
    if (after, what) == ("DP4", "LoRA"):
        return ()
    in_ci = [("TP2", "DP4", "full"), ("TP2", "one", "LoRA"), ("TP2", "one", "full")]
    in_ci += [("one", "FSDP2 TP2", "LoRA"), ("FSDP2 TP2", "one", "full")]
    return (pytest.mark.slow,) if (before, after, what) in in_ci else (pytest.mark.nightly,)


@pytest.mark.parametrize(
    ("before", "after", "what"),
    [pytest.param(*pair, what, marks=_mark(*pair, what)) for pair in PAIRS for what in WHAT],
)
def test_what_one_layout_wrote_another_reads_exactly(processes, saved, tmp_path: Path, before, after, what):
    source = saved(before, what)
    size, more = LAYOUTS.get(after, (1, []))
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    words = [*WHAT[what], *more]
    losses = processes.run(size, train, size, words, str(folder), SAVED_AT + 1, str(source), timeout_seconds=PATIENCE)
    document, tensors, files = content(folder / f"step_{SAVED_AT:06d}")
    expected_document, expected, _ = content(source / f"step_{SAVED_AT:06d}")
    assert document == expected_document
    assert tensors.keys() == expected.keys()
    assert len([name for name in tensors if name.endswith("exp_avg_sq")]) >= 8
    assert len([name for name in tensors if name.startswith("callbacks/EMACallback/average/")]) >= 8
    for name, value in expected.items():
        assert tensors[name].dtype == value.dtype, name
        assert torch.equal(tensors[name], value), name
    assert files == size  # every process wrote its share

    folder = tmp_path / "alone"
    folder.mkdir()
    alone = processes.run(1, train, 1, WHAT[what], str(folder), SAVED_AT + 1, str(source), timeout_seconds=PATIENCE)
    assert losses[0] == pytest.approx(alone[0], rel=1e-5)
    _, ours, _ = content(tmp_path / "checkpoints" / f"step_{SAVED_AT + 1:06d}")
    _, theirs, _ = content(folder / f"step_{SAVED_AT + 1:06d}")
    for kind in ("", "/exp_avg", "callbacks/"):
        names = [
            name
            for name in theirs
            if (kind and (name.endswith(kind) or name.startswith(kind))) or (not kind and "/" not in name)
        ]
        assert names
        apart = sum(float((ours[name].double() - theirs[name]).square().sum()) for name in names)
        whole = sum(float(theirs[name].double().square().sum()) for name in names)
        assert apart <= 1e-8 * whole, (kind, (apart / whole) ** 0.5)


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ("TP2", []),
        pytest.param("DP2", ["2 processes what ran on 2 processes (tensor parallelism 2)"], marks=pytest.mark.slow),
        pytest.param("FSDP2", ["2 processes (FSDP) what ran on 2 processes (tensor parallelism 2)"],
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_another_layout_of_as_many_processes_is_said_once(processes, saved, tmp_path: Path, after, said):
    source = saved("TP2", "LoRA")
    words = [*WHAT["LoRA"], *LAYOUTS[after][1]]
    heard = processes.run(
        2, train_and_listen, 2, words, str(tmp_path), SAVED_AT + 1, str(source), timeout_seconds=PATIENCE
    )
    assert [line.partition(":")[0] for line in heard[0]] == [f"resuming on {line}" for line in said]
    assert heard[1] == []
