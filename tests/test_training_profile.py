"""A trace of the steps that were asked for, whole or not there; its ranges are the phases of a step."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny.stable_diffusion import save_tiny_pipeline
from tiny.training import Toy, fit
from torch.profiler import ProfilerActivity, profile

from benchmarks.planner_check import RealStep, load
from nemo_aligner_diffusion.config.load import load_settings
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.training.callbacks.profile import Profile
from nemo_aligner_diffusion.training.callbacks.settings import ProfileSettings


def traced(folder: Path, steps: int = 5, accumulate: int = 2, module: Toy | None = None, **settings: Any) -> Path:
    callback = Profile(ProfileSettings(**{"enable": True, "start_step": 2, "end_step": 3, **settings}), folder)
    fit(folder, module or Toy(), steps, accumulate=accumulate, callbacks=[callback])
    return folder / "profile"


def ranges(trace: Path) -> list[dict[str, Any]]:
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    return sorted((e for e in events if e.get("cat") == "user_annotation"), key=lambda e: (e["ts"], -e["dur"]))


def test_the_steps_that_were_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        folder = traced(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["steps_2_to_3_rank_0"]
    assert str(folder / "steps_2_to_3_rank_0") in caplog.text
    (only,) = folder.iterdir()
    found = ranges(only / "trace.json.gz")
    names = [e["name"] for e in found]
    assert names.count("backward") == 4, "one a micro-batch"
    assert names.count("optimizer") == 2
    assert names.count("Optimizer.step#AdamW.step") == 2
    ends: list[float] = []  # of the ranges around: Perfetto draws only what is nested
    for e in found:
        ends = [end for end in ends if end > e["ts"]]
        assert all(e["ts"] + e["dur"] <= end for end in ends), e["name"]
        ends.append(e["ts"] + e["dur"])
    table = (only / "operators.txt").read_text("utf-8")
    head = table.splitlines()[:10]
    assert any(line.split()[:2] == ["backward", "4"] for line in head)
    assert "aten::addmm" in table


@pytest.mark.parametrize("settings", [{"start_step": 6, "end_step": 6}, {"ranks": [1]}])
def test_other_steps_and_processes_are_not_traced(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert not traced(tmp_path, **settings).exists()


def test_a_run_that_ends_early_keeps_what_was_traced(tmp_path: Path) -> None:
    (only,) = traced(tmp_path, steps=3, end_step=9).iterdir()
    assert only.name == "steps_2_to_3_rank_0"
    assert [e["name"] for e in ranges(only / "trace.json.gz")].count("optimizer") == 2


def test_a_run_that_fails_leaves_no_trace_and_no_profiler(tmp_path: Path) -> None:
    class Failing(Toy):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            if self.trainer.global_step == 2:
                raise ValueError("on purpose")
            return super().training_step(batch, batch_idx)

    with pytest.raises(ValueError, match="on purpose"):
        traced(tmp_path, module=Failing())
    assert not (tmp_path / "profile").exists()
    assert not torch.autograd._profiler_enabled()


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").write_text("in the way")
    traced(tmp_path)
    assert f"the trace {tmp_path / 'profile' / 'steps_2_to_3_rank_0'} could not be written" in caplog.text
    assert (tmp_path / "checkpoints" / "last").read_text() == "step_000005\n"


def test_nemos_words_without_cuda(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = {"enabled": True, "start_step": 2, "end_step": 2, "ranks": "[0]", "gen_shape": True}
    given = [f"model.nsys_profile.{key}={value}" for key, value in words.items()]
    asked = load_settings("draftp_sd", given).model.profile
    assert asked == ProfileSettings(nsys=True, start_step=2, end_step=2, ranks=(0,), shapes=True)
    with caplog.at_level(logging.INFO):
        (only,) = traced(tmp_path, **vars(asked)).iterdir()
    assert "there is no CUDA here; torch's profiler traces instead" in caplog.text
    with gzip.open(only / "trace.json.gz") as file:
        assert any("Input Dims" in event.get("args", {}) for event in json.load(file)["traceEvents"])


@pytest.mark.parametrize(
    "words", [["start_step=4", "end_step=3"], ["start_step=31", "end_step=40"], ["ranks=[0,1]"], ["ranks=[-1]"]]
)
def test_what_would_trace_nothing_is_refused(words: list[str]) -> None:
    words = [f"model.profile.{word}" for word in words]
    with pytest.raises(ConfigurationError, match=r"model\.profile\..*expected"):
        load_settings("draftp_sd", ["model.profile.enable=true", *words])


def test_the_phases_of_a_training_step(tmp_path: Path) -> None:
    tiny = save_tiny_pipeline(tmp_path)
    step = RealStep(load("draftp_sd", [f"model.from_pretrained={tiny}", "family=embedded", "rm=symmetry"], 2))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    found = {e.key: e.count for e in profiler.key_averages() if e.is_user_annotation}
    calls = {"rollout": 2, "decode": 1, "reward": 1, "reward gradient": 1, "unet": 8, "text_encoder": 4}
    assert found == calls, "twice the loop: DRaFT+ goes along the frozen model's predictions, without calls of its own"
