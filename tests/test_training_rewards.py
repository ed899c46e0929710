"""Whole runs on a tiny model with the rewards that have a memory or a dice: exact after a resume, under any layout."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny.stable_diffusion import save_tiny_pipeline

from nemo_aligner_diffusion.config.load import load_config
from nemo_aligner_diffusion.errors import RewardError
from nemo_aligner_diffusion.rewards.support.parted import STATISTICS_FILE
from nemo_aligner_diffusion.training.checkpoints.files import record_of, write_manifest
from nemo_aligner_diffusion.training.run import run_training

ROOT = Path(__file__).resolve().parents[1]
TIMING = {"images_per_second", "peak_memory_bytes", "seconds"}
PARTS = (
    "rm.parts={symmetry:{weight:2.0,normalize:base,clip:[-3,3],clip_mode:smooth},"
    "size:{name:compressibility,weight:0.5,normalize:base,augment:{noise_std:0.05}},"
    "mine:{name:custom,import_path:mine_in_training:redness,weight:0.1}}"
)
REWARD = ["rm=composite", "~rm.parts.clip", PARTS]
REWARD += ["rm.augment.crop_scale=0.6", "rm.augment.flip_probability=0.5", "rm.augment.colour_jitter=0.2"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current directory while these tests run: a model, prompts, and a reward of the user's."""
    folder = tmp_path_factory.mktemp("workplace")
    save_tiny_pipeline(folder / "pipeline")
    (folder / "prompts.txt").write_text("".join(f"p{i}\n" for i in range(12)), encoding="utf-8")
    (folder / "mine_in_training.py").write_text(
        "def redness(images, prompts):\n    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))\n",
        encoding="utf-8",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        yield folder


def overrides(directory: Path, *more: str, recipe: str = "draftp_sd") -> list[str]:
    return [
        *REWARD,
        "model.from_pretrained=pipeline",
        "family=embedded",
        "model.data.train.webdataset.local_root_path=prompts.txt",
        "model.data.validation.max_prompts=3",
        "model.infer.inference_steps=3",
        "model.infer.unconditional_guidance_scale=2",
        "model.truncation_steps=1",
        "model.micro_batch_size=2",
        "model.global_batch_size=4",
        "model.optim.lr=0.01",
        "model.kl_coeff=0",
        "model.rollout_precision=same",  # in bfloat16 pictures depend on how many are made at once
        "sched=warmup_hold",
        "trainer.accelerator=cpu",
        f"trainer.{recipe}.max_steps=4",
        f"trainer.{recipe}.val_check_interval=2",
        f"trainer.{recipe}.save_interval=2",
        f"exp_manager.explicit_log_dir={directory}",
        "report.enable=false",
        *more,
    ]


def run(directory: Path, *more: str, recipe: str = "draftp_sd") -> None:
    assert run_training(load_config(recipe, overrides(directory, *more, recipe=recipe))) == 0


def table(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as handle:
        return [{k: v for k, v in row.items() if k not in TIMING} for row in csv.DictReader(handle)]


def statistics(directory: Path) -> dict[str, Any]:
    return json.loads((directory / STATISTICS_FILE).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "run"
    run(directory)
    return directory


def test_a_resumed_run_with_measured_scales_and_dice_is_the_uninterrupted_one(whole: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    run(parts, "trainer.draftp_sd.max_steps=2")
    assert statistics(parts) == statistics(whole)
    (parts / STATISTICS_FILE).unlink()  # the checkpoint has the figures, too
    run(parts, "exp_manager.resume_if_exists=true")
    assert table(parts / "metrics.csv") == table(whole / "metrics.csv")
    assert table(parts / "validation.csv") == table(whole / "validation.csv")
    assert statistics(parts) == statistics(whole)
    metrics = table(whole / "metrics.csv")
    assert {"reward_symmetry", "reward_size", "reward_mine"} <= set(metrics[0])
    assert set(statistics(whole)) == {"rm.parts.symmetry", "rm.parts.size"}
    # normalised by the base model's own pictures: its mean is what is not normalised, up to the smooth clip's bend
    assert abs(float(table(whole / "validation.csv")[0]["base_reward"])) < 0.5


def test_figures_of_another_model_would_change_the_run(whole: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    run(parts, "trainer.draftp_sd.max_steps=2")
    checkpoint = parts / "checkpoints" / "step_000002"
    content = json.loads((checkpoint / "state.json").read_text())
    callbacks = content["tree"]["callbacks"]
    (key,) = [key for key in callbacks if "RewardNormalization" in key]
    assert callbacks[key]["statistics"] == statistics(whole)
    callbacks[key]["statistics"]["rm.parts.symmetry"]["std"] *= 2
    (checkpoint / "state.json").write_text(json.dumps(content))
    write_manifest(checkpoint, {file.name: record_of(file) for file in checkpoint.iterdir() if file.stem != "manifest"})
    run(parts, "exp_manager.resume_if_exists=true")
    assert table(parts / "metrics.csv")[:2] == table(whole / "metrics.csv")[:2]
    assert table(parts / "metrics.csv")[2]["reward"] != table(whole / "metrics.csv")[2]["reward"]


def test_the_dice_do_not_depend_on_the_layout(whole: Path, tmp_path: Path) -> None:
    run(tmp_path / "single", "model.micro_batch_size=1", "model.decode_micro_batch_size=1")
    run(tmp_path / "pairs", "model.micro_batch_size=4", "model.decode_micro_batch_size=2")
    for other in ("single", "pairs"):
        for one, two in zip(table(tmp_path / other / "metrics.csv"), table(whole / "metrics.csv"), strict=True):
            for column in ("reward", "reward_symmetry", "reward_size", "grad_norm"):
                if column == "grad_norm" and int(one["step"]) > 2:
                    continue  # weights that differ by rounding move single pixels over the clamp: a jump of 1 %
                assert float(one[column]) == pytest.approx(float(two[column]), rel=2e-3, abs=1e-6), (other, column)


def test_augmentation_is_for_training_alone(whole: Path, tmp_path: Path) -> None:
    plain = [f"rm.augment.{key}" for key in ("crop_scale=1", "flip_probability=0", "colour_jitter=0")]
    run(tmp_path / "plain", *plain, "trainer.draftp_sd.max_steps=2")
    ours, theirs = table(whole / "validation.csv")[0], table(tmp_path / "plain" / "validation.csv")[0]
    assert float(ours["base_reward"]) == pytest.approx(float(theirs["base_reward"]), rel=1e-6)
    first, second = table(whole / "metrics.csv")[0], table(tmp_path / "plain" / "metrics.csv")[0]
    assert abs(float(first["reward_mine"]) - float(second["reward_mine"])) > 1e-4
    assert statistics(whole) == statistics(tmp_path / "plain")


def test_every_read_of_draft_lv_is_perturbed_anew(workplace: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from nemo_aligner_diffusion.rewards.support import augmented

    seen = []
    current = augmented.current_keys

    def noted(pictures: int) -> Any:
        keys = current(pictures)
        if keys is not None:
            seen.append((keys.step, keys.indices, keys.draw))
        return keys

    monkeypatch.setattr(augmented, "current_keys", noted)
    more = ["trainer.draft_lv_sd.max_steps=1", "trainer.draft_lv_sd.val_check_interval=1"]
    more += ["model.decode_micro_batch_size=1"]
    run(tmp_path / "run", *more, recipe="draft_lv_sd")
    expected = [(0, (index,), draw) for pair in ((0, 1), (2, 3)) for draw in (0, 1) for index in pair]
    assert list(dict.fromkeys(seen)) == expected


def test_equal_pictures_cannot_set_a_scale(workplace: Path, tmp_path: Path) -> None:
    more = ["model.data.validation.max_prompts=1", "model.data.validation.seeds=[0]"]
    with pytest.raises(RewardError, match=r"rm\.parts\.symmetry\.normalize is base, but the 1 scores"):
        run(tmp_path / "run", *more)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_a_killed_run_goes_on_exactly(whole: Path, workplace: Path, tmp_path: Path) -> None:
    """SIGKILL, at any moment after a checkpoint: what is on disk suffices."""
    directory = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "examples/mm/stable_diffusion/train_sd_draftp.py")]
    # and it keeps them all: by the time that it is killed it may have gone far beyond step 2
    more = ["trainer.draftp_sd.max_steps=100000", "exp_manager.checkpoint_callback_params.keep_last_n=null"]
    command += overrides(directory, *more)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=workplace, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and not (directory / "checkpoints" / "last").exists():
            assert process.poll() is None, process.stdout.read() if process.stdout else ""
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    for newer in sorted((directory / "checkpoints").glob("step_??????"))[1:]:
        shutil.rmtree(newer)  # go on from step 2, wherever the signal came
    run(directory, "exp_manager.resume_if_exists=true")
    assert table(directory / "metrics.csv") == table(whole / "metrics.csv")
    # it may have been killed between the checkpoint of step 2 and its validation
    assert table(directory / "validation.csv")[-1] == table(whole / "validation.csv")[-1]
