"""Whole runs on pairs: the same under any layout and after a kill, table of corrections included; what a run writes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_parallel_runs import figures
from tiny.stable_diffusion import save_tiny_pipeline

from nemo_aligner_diffusion.data.preferences.shards import PreferencePair, write_preference_shards
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.evaluation.report import write_report
from nemo_aligner_diffusion.formats.pictures import encode_png, picture_of

COLUMNS = ("step", "implicit_accuracy", "implicit_margin", "winner_error", "loser_error", "gradient_weight", "loss",
           "grad_norm", "lr", "pairs")  # fmt: skip
LAYOUTS = {
    "DP2": [],
    "TP2": ["model.tensor_model_parallel_size=2"],
    "FSDP2": ["model.fsdp=true", "model.fsdp_frozen=[text_encoder,vae]", "model.peft.peft_scheme=none"],
}


def train(devices: int, inputs: Path, directory: Path, more: list[str]) -> int:
    from nemo_aligner_diffusion.config.load import load_config
    from nemo_aligner_diffusion.training.run import run_training

    words = [
        f"trainer.devices={devices}",
        "trainer.accelerator=cpu",
        f"model.from_pretrained={inputs / 'pipeline'}",
        "family=embedded",
        f"model.data.train.webdataset.local_root_path={inputs / 'pairs'}",
        f"exp_manager.explicit_log_dir={directory}",
        "peft=sdlora",
        "sched=constant",
        "rm=symmetry",
        "report.enable=false",
        "model.infer.inference_steps=2",
        "model.dde.correction_rate=0.5",
        "model.optim.lr=1e-3",
        "model.micro_batch_size=2",
        "model.global_batch_size=8",
        "model.preference.crop=random",
        "model.preference.steps=[100,110]",
        "model.data.validation.max_prompts=2",
        "model.data.validation.seeds=[1]",
        "trainer.dde_sd.max_steps=4",
        "trainer.dde_sd.val_check_interval=4",
        "trainer.dde_sd.save_interval=2",
        "exp_manager.checkpoint_callback_params.save_top_k=-1",
    ]
    return run_training(load_config("dde_sd", [*words, *more]))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_pipeline(folder / "pipeline")
    pictures = torch.rand(24, 2, 3, 20, 16, generator=torch.Generator().manual_seed(0))
    write_preference_shards(
        [
            PreferencePair(
                tuple(encode_png(picture_of(picture.numpy())) for picture in both),
                f"prompt {row % 5}", (float(row % 2), 1.0 - row % 2), str(row),
            )
            for row, both in enumerate(pictures)
        ],
        folder / "pairs",
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def alone(processes: Any, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("alone") / "run"
    assert processes.run(1, train, 1, inputs, directory, []) == [0]
    return directory


def table(directory: Path, step: int = 4) -> torch.Tensor:
    (file,) = (directory / "checkpoints" / f"step_{step:06d}").glob("*.safetensors")
    (name,) = [name for name in load_file(file) if "corrections" in name]
    return load_file(file)[name]


def test_what_a_run_writes(alone: Path) -> None:
    header = (alone / "metrics.csv").read_text().splitlines()[0].split(",")
    assert set(COLUMNS) | {"pairs_per_second", "peak_memory_bytes", "seconds"} == set(header)
    assert figures(alone / "metrics.csv", "pairs") == [8.0] * 4
    assert figures(alone / "metrics.csv", "loss")[0] == pytest.approx(0.693147, abs=1e-6)
    rows = (alone / "gradient_weight.csv").read_text().splitlines()
    assert rows[0] == "t,pairs,gradient_weight"
    assert [row.split(",")[1] for row in rows[1:4]] == ["0", "0", "32"]
    learnt = table(alone)
    assert learnt.shape == (1000, 2)
    filled = set(learnt.abs().sum(1).nonzero().flatten().tolist())
    assert len(filled) > 5
    assert filled <= set(range(100, 110))
    page = write_report(alone).read_text()
    for words in ("on preferences between pictures", "Implicit accuracy", "Gradient weight by noise level", "32 pairs"):
        assert words in page
    for words in ("Training reward", "KL penalty", "generated pictures"):
        assert words not in page


def test_a_run_that_is_killed_and_resumed_is_the_undisturbed_one(processes, inputs, alone, tmp_path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(alone, directory)
    shutil.rmtree(directory / "checkpoints" / "step_000004")
    (directory / "checkpoints" / "last").unlink()
    more = ["exp_manager.resume_if_exists=true"]
    assert processes.run(1, train, 1, inputs, directory, more) == [0]
    assert figures(directory / "metrics.csv", *COLUMNS) == figures(alone / "metrics.csv", *COLUMNS)
    assert torch.equal(table(directory), table(alone))
    assert (directory / "gradient_weight.csv").read_bytes() == (alone / "gradient_weight.csv").read_bytes()
    mine, theirs = (load_file(of / "export" / "pytorch_lora_weights.safetensors") for of in (directory, alone))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "layout",
    [pytest.param("DP2"), pytest.param("TP2", marks=pytest.mark.slow), pytest.param("FSDP2", marks=pytest.mark.slow)],
)
def test_a_layout_is_one_process(processes, inputs, alone, tmp_path, layout) -> None:
    more = LAYOUTS[layout]
    if layout == "FSDP2":  # every weight
        full = ["model.peft.peft_scheme=none", "model.optim.lr=1e-5"]
        alone, more = tmp_path / "full", [*more, *full]
        assert processes.run(1, train, 1, inputs, alone, full) == [0]
    directory = tmp_path / "run"
    assert processes.run(2, train, 2, inputs, directory, more) == [0, 0]
    # Δ is a difference of two errors of about 1, in float32: 1e-5 of these, not of their difference
    expected = pytest.approx(figures(alone / "metrics.csv", *COLUMNS), rel=1e-4, abs=1e-5)
    assert figures(directory / "metrics.csv", *COLUMNS) == expected
    if layout != "FSDP2":
        assert torch.allclose(table(directory), table(alone), rtol=1e-3, atol=1e-7)


def test_pairs_that_nobody_has_are_one_message() -> None:
    from nemo_aligner_diffusion.config.load import load_config

    words = ["model.preference.pairs=online"]
    with pytest.raises(
        ConfigurationError, match=r"local_root_path = None with model.algorithm = dde: only the embedded"
    ):
        load_config("dde_sd", ["model.from_pretrained=/nowhere/at/all"])
    assert load_config("dde_sd", ["model.from_pretrained=/nowhere/at/all", *words]).model.preference.pairs == "online"


def test_keys_that_the_other_kind_reads_are_named(caplog: pytest.LogCaptureFixture) -> None:
    from nemo_aligner_diffusion.config.load import load_config

    cfg = load_config("dde_sd", ["model.kl_coeff=0.3"])
    assert "model.kl_coeff: model.algorithm=dde does not read it" in caplog.text
    assert not {"kl_coeff", "reward_scale"} & set(cfg.model)
    cfg = load_config("draftp_sd", ["model.preference.steps=[1,2]", "model.dpo.beta=3"])
    assert "model.algorithm=draft+ does not read it" in caplog.text
    assert not {"preference", "dpo"} & set(cfg.model)
