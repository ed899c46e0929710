"""Whole runs on pairs: the same under any layout and after a kill, table of corrections included; what a run writes.

Layouts are compared in float64. What runs report is ``Δ``, the difference of two errors of about 1 that is itself 1e-6
to 1e-3: in float32, where layouts sum in other orders, 1e-7 of an error is some per cent of the smallest ``Δ``, and the
comparison would have to be so loose that a wrong sum could pass. Lightning, and so this project, refuses float64 on
several processes; nothing but the refusal is lifted here.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_parallel_runs import figures
from tiny.published import narrow
from tiny.runs import rows
from tiny.stable_diffusion import save_tiny_pipeline

from nemo_aligner_diffusion.algorithms.picture_validation import ValidationPictures
from nemo_aligner_diffusion.algorithms.preference.self_made import labeller_of
from nemo_aligner_diffusion.data.preferences.shards import PreferencePair, write_preference_shards
from nemo_aligner_diffusion.embedded_assets import embedded_reward_path
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.evaluation.figures import read_grid
from nemo_aligner_diffusion.evaluation.generation import _reward as reward_of
from nemo_aligner_diffusion.evaluation.metrics.base import validation_figures
from nemo_aligner_diffusion.evaluation.metrics.preference import WinnerError
from nemo_aligner_diffusion.evaluation.report import write_report
from nemo_aligner_diffusion.evaluation.run_files import RunFiles
from nemo_aligner_diffusion.formats.pictures import encode_png, picture_of
from nemo_aligner_diffusion.rewards import restore_reward
from nemo_aligner_diffusion.runtime.signals import Interruption

COLUMNS = ("step", "implicit_accuracy", "implicit_margin", "winner_error", "loser_error", "gradient_weight", "loss",
           "grad_norm", "lr", "pairs")  # fmt: skip
LAYOUTS = {
    "DP2": [],
    "TP2": ["model.tensor_model_parallel_size=2"],
    "FSDP2": ["model.fsdp=true", "model.fsdp_frozen=[text_encoder,vae]", "model.peft.peft_scheme=none"],
}
SHORT = ["trainer.dde_sd.val_check_interval=0", "trainer.dde_sd.save_interval=0"]


def train_in_float64(devices: int, inputs: Path, directory: Path, more: list[str]) -> int:
    from pytorch_lightning.trainer.connectors.accelerator_connector import _AcceleratorConnector

    from nemo_aligner_diffusion.runtime.settings import MachineSettings
    from nemo_aligner_diffusion.settings import Settings

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MachineSettings, "__post_init__", Settings.__post_init__)
        patch.setattr(_AcceleratorConnector, "_validate_precision_choice", lambda self: None)
        return train(devices, inputs, directory, [*more, "trainer.precision=64"])


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
        *([] if "rm=none" in more else ["rm=symmetry"]),
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


@pytest.fixture(scope="module")
def alone_in_float64(processes: Any, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("float64") / "run"
    assert processes.run(1, train_in_float64, 1, inputs, directory, SHORT) == [0]
    return directory


def table(directory: Path, step: int = 4) -> torch.Tensor:
    (file,) = (directory / "checkpoints" / f"step_{step:06d}").glob("*.safetensors")
    (name,) = [name for name in load_file(file) if "corrections" in name]
    return load_file(file)[name]


def apart(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Relative distance of all these together."""
    assert mine.keys() == theirs.keys()
    distance, size = (
        torch.stack([value.double().norm() for value in values]).norm()
        for values in ([mine[name] - theirs[name] for name in theirs], theirs.values())
    )
    return float(distance / size)


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
    phases = json.loads((alone / "startup.json").read_text())["phases"]
    assert {"first network calls", "first backward pass"} < set(phases)
    assert "first rollout" not in phases
    page = write_report(alone).read_text()
    for words in ("on preferences between pictures", "Implicit accuracy", "Gradient weight by noise level", "32 pairs"):
        assert words in page
    for words in ("Training reward", "KL penalty", "generated pictures"):
        assert words not in page


def test_a_run_that_no_reward_watches(processes, inputs, tmp_path) -> None:
    directory = tmp_path / "run"
    one_step = ["trainer.dde_sd.max_steps=1", "trainer.dde_sd.val_check_interval=1"]
    assert processes.run(1, train, 1, inputs, directory, ["rm=none", "rm.augment.views=2", *one_step]) == [0]
    (row,) = rows(directory / "validation.csv")  # this model has no CLIP, either
    assert row.keys() == {"step", "sharpness", "base_sharpness", "saturation", "base_saturation"}
    cells = read_grid(Image.open(directory / "samples" / "step_000001.png"))
    assert [(cell["reward"], cell["base_reward"]) for cell in cells] == [(None, None)] * 2
    page = write_report(directory).read_text()
    assert "no reward watches" in page
    for words in ("Validation reward", "Tuned beats base", ">nan"):
        assert words not in page
    assert (directory / "export" / "pytorch_lora_weights.safetensors").exists()


def test_without_a_reward_pictures_are_compared_and_not_scored(tmp_path) -> None:
    pictures, nothing = torch.rand(2, 3, 32, 32), [float("nan")] * 2
    validation = ValidationPictures(["dog", "dog"], [1, 2], pictures, pictures.flip(-1), nothing, nothing)
    found = validation_figures(validation, restore_reward(embedded_reward_path()), rewarded=False)
    both = {f"{of}{name}" for of in ("", "base_") for name in ("diversity", "sharpness", "saturation")}
    assert set(found) == {*both, "similarity_to_base"}
    assert all(map(math.isfinite, found.values()))
    run = RunFiles(tmp_path, {"rm": {"name": "none"}})
    assert reward_of(SimpleNamespace(reward=None), run, torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("recipe", "words", "why"),
    [
        ("draftp_sd", [], r"model.algorithm = draft\+: expected a reward, which this learns from"),
        ("ddpo_sd", [], "model.algorithm = ddpo: expected a reward"),
        ("dde_sd", ["model.preference.pairs=online"], "dde and pairs drawn online: expected a reward"),
        ("dde_sd", ["rm=composite", "rm.parts.none.weight=1"], "rm.parts.none = none, which measures nothing"),
    ],
)
def test_who_needs_a_reward_says_so(recipe: str, words: list[str], why: str) -> None:
    from nemo_aligner_diffusion.config.load import load_config

    with pytest.raises(ConfigurationError, match=why):
        load_config(recipe, [*([] if "rm=composite" in words else ["rm=none"]), *words])
    with pytest.raises(ConfigurationError, match="labeller = none, which measures nothing"):
        labeller_of("none")


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
def test_a_layout_is_one_process(processes, inputs, request, tmp_path, layout) -> None:
    more = [*SHORT, *LAYOUTS[layout]]
    if layout == "FSDP2":  # every weight
        full = [*SHORT, "model.peft.peft_scheme=none", "model.optim.lr=1e-5"]
        alone, more = tmp_path / "full", [*more, *full]
        assert processes.run(1, train_in_float64, 1, inputs, alone, full) == [0]
    else:
        alone = request.getfixturevalue("alone_in_float64")
    directory = tmp_path / "run"
    assert processes.run(2, train_in_float64, 2, inputs, directory, more) == [0, 0]
    expected = pytest.approx(figures(alone / "metrics.csv", *COLUMNS), rel=1e-5)
    assert figures(directory / "metrics.csv", *COLUMNS) == expected
    assert apart(*({"": table(of)} for of in (directory, alone))) < 1e-5
    export = "unet/diffusion_pytorch_model.safetensors" if layout == "FSDP2" else "pytorch_lora_weights.safetensors"
    assert apart(*(load_file(of / "export" / export) for of in (directory, alone))) < 1e-5


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


@pytest.mark.parametrize(("family", "steps", "warm_up"), [("sd15", 2000, 500), ("sdxl", 1500, 200)])
def test_the_recipes_have_the_published_numbers(family: str, steps: int, warm_up: int, caplog) -> None:
    from nemo_aligner_diffusion.config.load import load_config

    name = "dpo_sdxl" if family == "sdxl" else "dpo_sd"
    cfg = load_config(name, [f"family={family}", "model.preference.pairs=online"])
    assert (cfg.model.global_batch_size, cfg.trainer[name].max_steps, cfg.model.dpo.beta) == (2048, steps, 5000)
    sched = cfg.model.optim.sched
    assert (cfg.model.optim.lr, sched.name, sched.warmup_steps) == (2048e-8, "WarmupHoldPolicy", warm_up)
    assert cfg.model.peft.peft_scheme == "none"
    assert not caplog.text
    load_config(name, [f"family={family}", "model.preference.pairs=online", "model.global_batch_size=64"])
    assert "for model.global_batch_size = 64 its rule (1e-08 for each pair) gives model.optim.lr=6.4e-07" in caplog.text
    caplog.clear()
    for words in ("model.optim.lr=1e-6", "peft=sdlora"):
        load_config(name, [f"family={family}", "model.preference.pairs=online", "model.global_batch_size=64", words])
    assert not caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "family", "method"), [("dde_sd", "sd15", "dde"), ("dde_sd", "sd15", "sft"), ("dpo_sdxl", "sdxl", "dpo")]
)
def test_two_steps_of_a_recipe_on_narrow_weights_in_the_real_layout(
    recipe: str, family: str, method: str, inputs: Path, tmp_path: Path
) -> None:
    """As published but for the pictures' size and the batch."""
    from diffusers import UNet2DConditionModel

    from nemo_aligner_diffusion.config.load import load_config
    from nemo_aligner_diffusion.training.run import train
    from nemo_aligner_diffusion.training.settings import RunSettings

    narrow(family).save_pretrained(tmp_path / "model")
    cfg = load_config(recipe, [
        f"model.from_pretrained={tmp_path / 'model'}", f"algorithm={method}", "rm=none", "report.enable=false",
        f"model.data.train.webdataset.local_root_path={inputs / 'pairs'}", "trainer.accelerator=cpu",
        f"exp_manager.explicit_log_dir={tmp_path / 'run'}", f"trainer.{recipe}.max_steps=2",
        f"trainer.{recipe}.val_check_interval=0", "model.global_batch_size=2", "model.infer.height=32",
        "model.infer.width=32",
    ])  # fmt: skip
    assert (cfg.model.family, cfg.model.micro_batch_size, cfg.model.optim.lr) == (family, 1, 2.048e-5)
    ended = train(RunSettings.of(cfg), Interruption())
    assert ended.code == 0
    assert all(row > 0 for row in figures(tmp_path / "run" / "metrics.csv", "grad_norm"))
    base, exported = (UNet2DConditionModel.from_pretrained(tmp_path / of / "unet") for of in ("model", "run/export"))
    tuned, before = ended.module.model.denoiser.state_dict(), base.state_dict()
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in exported.state_dict().items())
    assert sum(torch.equal(tensor, before[name]) for name, tensor in tuned.items()) < 0.2 * len(before)


def test_the_report_says_when_both_errors_rise(tmp_path: Path) -> None:
    rising = [0.001 * step for step in range(60)]
    run = RunFiles(tmp_path, metrics={"step": rising, "winner_error": rising, "loser_error": rising})
    (finding,) = WinnerError().findings(run)
    assert finding.title == "Winners and losers are denoised worse and worse"
    falling = [-value for value in rising]
    assert not WinnerError().findings(RunFiles(tmp_path, metrics={"winner_error": falling, "loser_error": rising}))
