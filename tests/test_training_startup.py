"""Whole runs: the start of one process and of several, what it writes down, and a start that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny.stable_diffusion import save_tiny_pipeline

from nemo_aligner_diffusion.config.load import load_config
from nemo_aligner_diffusion.evaluation.report import write_report
from nemo_aligner_diffusion.training.run import run_training

SCRIPT = Path(__file__).resolve().parents[1] / "examples/mm/stable_diffusion/train_sd_draftp.py"
PHASES = (
    *("building", "reading weights", "reward", "parallelising", "resume", "first batch", "first rollout"),
    *("first replay", "first optimizer step"),
)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    save_tiny_pipeline(folder / "pipeline")
    (folder / "prompts.txt").write_text("".join(f"p{i}\n" for i in range(8)), encoding="utf-8")
    return [
        "rm=symmetry",
        f"model.from_pretrained={folder / 'pipeline'}",
        "family=embedded",
        f"model.data.train.webdataset.local_root_path={folder / 'prompts.txt'}",
        "model.infer.inference_steps=4",
        "model.truncation_steps=1",
        "model.global_batch_size=4",
        "trainer.accelerator=cpu",
        "trainer.draftp_sd.max_steps=2",
        "trainer.draftp_sd.val_check_interval=0",
        "report.enable=false",
    ]


def start(*words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)


def figures(directory: Path) -> list[list[str]]:
    header, *rows = [line.split(",") for line in (directory / "metrics.csv").read_text().splitlines()]
    return [[row[header.index(name)] for name in ("step", "reward", "images")] for row in rows]


def test_one_process_writes_its_start_down(words, tmp_path, caplog):
    directory = tmp_path / "run"
    run_training(
        load_config("draftp_sd", [*words, "model.micro_batch_size=2", f"exp_manager.explicit_log_dir={directory}"])
    )
    found = json.loads((directory / "startup.json").read_text())
    assert set(PHASES) <= set(found["phases"])
    assert found["first_step_seconds"] == pytest.approx(sum(found["phases"].values()), abs=0.02)
    for name in ("reading weights", "first rollout", "first replay"):
        assert found["phases"][name] > 0
    assert found["line"] in caplog.text
    assert found["line"] in write_report(directory).read_text(encoding="utf-8")


@pytest.mark.slow
def test_several_processes_are_started_load_once_and_train_as_one(words, tmp_path):
    done = start(
        *words, "trainer.devices=2", "model.micro_batch_size=2", f"exp_manager.explicit_log_dir={tmp_path / 'two'}"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run_training(
        load_config(
            "draftp_sd", [*words, "model.micro_batch_size=4", f"exp_manager.explicit_log_dir={tmp_path / 'one'}"]
        )
    )
    for ours, theirs in zip(figures(tmp_path / "one"), figures(tmp_path / "two"), strict=True):
        assert [float(value) for value in ours] == pytest.approx([float(value) for value in theirs], rel=1e-5)
    found = json.loads((tmp_path / "two" / "startup.json").read_text())
    assert {"imports", "process group", "handing on", *PHASES} <= set(found["phases"])
    output = done.stdout + done.stderr
    assert output.count("first step after") == 1
    assert "Traceback" not in output


@pytest.mark.slow
def test_weights_that_cannot_be_read_end_all_processes_with_one_message(words, tmp_path):
    (tmp_path / "unet.ckpt").write_bytes(b"PK\x03\x04 and then nothing")
    more = [
        "trainer.devices=2",
        "model.micro_batch_size=2",
        f"model.unet_config.from_pretrained={tmp_path / 'unet.ckpt'}",
    ]
    done = start(*words, *more, f"exp_manager.explicit_log_dir={tmp_path / 'run'}")
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    assert output.count("unet.ckpt: a checkpoint that is cut off") == 1, output
    assert "Traceback" not in output
    assert not (tmp_path / "run" / "config.yaml").exists()
