"""Command lines of small training runs, and what such a run leaves."""

from __future__ import annotations

import csv
from pathlib import Path


def overrides(pipeline: Path, prompts: Path, directory: Path, *more: str, loop: str = "draftp_sd") -> list[str]:
    """Four steps of the tiny pipeline with the reward of symmetry; a validation and a checkpoint at every second."""
    return [
        "rm=symmetry",
        f"model.from_pretrained={pipeline}",
        "family=embedded",
        f"model.data.train.webdataset.local_root_path={prompts}",
        f"model.data.validation.webdataset.local_root_path={prompts}",
        "model.data.validation.max_prompts=3",
        "model.infer.inference_steps=4",
        "model.infer.unconditional_guidance_scale=2",
        "model.micro_batch_size=2",
        "model.global_batch_size=4",
        "model.optim.lr=0.01",
        "model.truncation_steps=1",
        "sched=warmup_hold",
        "trainer.accelerator=cpu",
        f"trainer.{loop}.max_steps=4",
        f"trainer.{loop}.val_check_interval=2",
        f"trainer.{loop}.save_interval=2",
        f"exp_manager.explicit_log_dir={directory}",
        "report.enable=false",  # its charts take a third of so short a run
        *more,
    ]


def rows(file: Path) -> list[dict[str, str]]:
    """Those of a CSV file, as text."""
    with file.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))
