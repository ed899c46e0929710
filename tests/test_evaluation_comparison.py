"""nad-evaluate: what its tables say is what its pictures score, and a stopped call goes on."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from statistics import fmean

import pytest
import torch
from test_evaluation_generate import GUIDANCE, STEPS, make_adapter
from tiny.stable_diffusion import save_tiny_pipeline

from nemo_aligner_diffusion.cli.evaluate import main, parse_shard, read_request
from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.errors import ConfigurationError, OutputError
from nemo_aligner_diffusion.evaluation import comparison
from nemo_aligner_diffusion.evaluation.comparison import path_of, read_picture, rows_of, run_evaluation
from nemo_aligner_diffusion.evaluation.request import Adapter, EvaluationRequest
from nemo_aligner_diffusion.rewards import build_reward

PROMPTS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A pipeline and two adapters."""
    pipeline = save_tiny_pipeline(tmp_path_factory.mktemp("model") / "pipeline")
    return pipeline, *(make_adapter(pipeline, tmp_path_factory.mktemp(f"run{n}") / "export", n) for n in (1, 2))


def words(given: tuple[Path, Path, Path], output: Path, *more: str) -> list[str]:
    pipeline, one, two = given
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    return ["--model", str(pipeline), "--lora", str(one), "--lora", str(two), *prompts, "--seeds", "0-1",
            "--steps", str(STEPS), "--guidance", str(GUIDANCE), "--reward", "symmetry", "--reward", "compressibility",
            "--output", str(output), *more]  # fmt: skip


def test_the_tables_are_of_the_pictures(given, tmp_path):
    output = run_evaluation(read_request(words(given, tmp_path / "out")))
    request = read_request(words(given, tmp_path / "out"))
    rows = rows_of(request)
    assert [row.label for row in rows] == ["base", *(path.parent.name for path in given[1:])]
    table = list(csv.DictReader((output / "scores.csv").open(encoding="utf-8")))
    assert len(table) == 3 * 3 * 2
    reward = build_reward({"name": "symmetry"})
    for row in rows:
        pictures = torch.stack([read_picture(path_of(output, row, *pair)) for pair in request.pairs])
        expected = reward(pictures, [prompt for prompt in PROMPTS for _ in range(2)]).tolist()
        mine = [float(line["symmetry"]) for line in table if line["model"] == row.label]
        assert mine == pytest.approx(expected, rel=1e-5)
    summary = json.loads((output / "summary.json").read_text("utf-8"))
    base, first, _ = summary
    by_model = {
        label: [float(x["symmetry"]) for x in table if x["model"] == label] for label in (base["model"], first["model"])
    }
    gains = [b - a for a, b in zip(*by_model.values(), strict=True)]
    assert first["symmetry_gain"] == pytest.approx(fmean(gains))
    assert first["symmetry_gain_low"] <= first["symmetry_gain"] <= first["symmetry_gain_high"]
    assert 0 <= first["symmetry_beats_low"] <= first["symmetry_beats"] <= first["symmetry_beats_high"] <= 1
    assert {"diversity", "base_diversity", "clip_score", "similarity_to_base"} <= first.keys()
    assert (output / "grid.png").exists()


def test_each_adapter_is_a_model_of_its_own_at_each_scale(given, tmp_path):
    request = read_request(words(given, tmp_path / "out", "--scales", "0,1"))
    assert [row.label for row in rows_of(request)][1:3] == [f"{given[1].parent.name} at 0", given[1].parent.name]
    output = run_evaluation(request)
    base, zero, one, *_ = rows_of(request)
    pair = (0, 0)
    same = read_picture(path_of(output, base, *pair)) - read_picture(path_of(output, zero, *pair))
    other = read_picture(path_of(output, base, *pair)) - read_picture(path_of(output, one, *pair))
    assert same.abs().max() < 0.01
    assert other.abs().max() > 0.05


def test_what_is_there_is_not_made_again(given, tmp_path, monkeypatch):
    whole = run_evaluation(read_request(words(given, tmp_path / "whole")))
    for part in ("1/2", "2/2"):
        assert main(words(given, tmp_path / "parts", "--shard", part)) == 0
    assert not (tmp_path / "parts" / "summary.json").exists()
    monkeypatch.setattr(comparison, "load_model", lambda *a, **k: pytest.fail("a picture was made again"))
    parts = run_evaluation(read_request(words(given, tmp_path / "parts")))
    assert (parts / "scores.csv").read_bytes() == (whole / "scores.csv").read_bytes()
    monkeypatch.setattr(comparison, "load_model", load_model)
    missing = sorted((parts / "pictures").rglob("*.png"))[3]
    before = missing.read_bytes()
    missing.unlink()
    run_evaluation(read_request(words(given, tmp_path / "parts")))
    assert missing.read_bytes() == before
    others = [word if word != "0-1" else "0-2" for word in words(given, tmp_path / "parts")]
    with pytest.raises(OutputError, match="an evaluation with other seeds: give another --output, or --overwrite"):
        run_evaluation(read_request(others))
    weights = given[1] / "pytorch_lora_weights.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))  # trained again: its pictures are others
    with pytest.raises(OutputError, match="an evaluation with other adapters"):
        run_evaluation(read_request(words(given, tmp_path / "parts")))


def test_no_two_models_share_a_folder(tmp_path):
    adapters = [Adapter(tmp_path / name / "export") for name in ("base", "base-2", "one", "one")]
    rows = rows_of(EvaluationRequest(prompts=["red"], adapters=adapters))
    assert len({row.folder for row in rows}) == len({row.label for row in rows}) == 5


def test_mistakes_are_named(given, tmp_path):
    for more, said in (
        (["--real", str(tmp_path / "none")], "expected a folder of pictures"),
        (["--shard", "3/2"], "expected I/N with I from 1 to N"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            read_request(words(given, tmp_path / "out", *more))
    assert parse_shard("2/4") == (2, 4)
    with pytest.raises(ConfigurationError, match="it needs --lora"):
        read_request(["--prompt", "red", "--scales", "1"])
