"""Whole runs on several processes: the files of the run directory are those of one process, whatever the layout."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny.stable_diffusion import save_tiny_pipeline

LAYOUTS = {
    "DP2": (2, []),
    "TP2": (2, ["model.tensor_model_parallel_size=2"]),
    "FSDP2": (2, ["model.fsdp=true", "model.fsdp_sharding_strategy=grad", "model.fsdp_frozen=[text_encoder,vae]"]),
    "FSDP2 TP2": (4, ["model.fsdp=true", "model.tensor_model_parallel_size=2"]),
}
WHAT = {
    "LoRA": ("pytorch_lora_weights.safetensors", ["exp_manager.ema.enable=true", "exp_manager.ema.decay=0.5"]),
    "full": (
        "unet/diffusion_pytorch_model.safetensors",
        ["model.peft.peft_scheme=none", "model.kl_coeff=0.1", "model.optim.lr=1e-5"],
    ),
}


def train(devices: int, pipeline: Path, prompts: Path, directory: Path, more: list[str]) -> int:
    from nemo_aligner_diffusion.config.load import load_config
    from nemo_aligner_diffusion.training.run import run_training

    words = [
        f"trainer.devices={devices}",
        "trainer.accelerator=cpu",
        f"model.from_pretrained={pipeline}",
        "family=embedded",
        f"model.data.train.webdataset.local_root_path={prompts}",
        f"exp_manager.explicit_log_dir={directory}",
        "rm=symmetry",
        "report.enable=false",
        "model.infer.inference_steps=3",
        "model.truncation_steps=2",
        "model.rollout_precision=same",
        "model.micro_batch_size=1",
        "model.global_batch_size=4",
        "model.data.validation.max_prompts=3",
        "model.data.validation.seeds=[1]",
        "trainer.draftp_sd.max_steps=3",
        "trainer.draftp_sd.val_check_interval=2",
        "trainer.draftp_sd.save_interval=2",
    ]
    return run_training(load_config("draftp_sd", [*words, *more]))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(f"prompt {number}" for number in range(20)))
    return save_tiny_pipeline(folder / "pipeline"), prompts


@pytest.fixture(scope="module")
def alone(processes, inputs, tmp_path_factory):
    known: dict[str, Path] = {}

    def get(what: str) -> Path:
        if what not in known:
            known[what] = tmp_path_factory.mktemp("alone") / "run"
            assert processes.run(1, train, 1, *inputs, known[what], WHAT[what][1]) == [0]
        return known[what]

    return get


def figures(file: Path, *columns: str) -> list[float]:
    with file.open(encoding="utf-8", newline="") as handle:
        return [float(row[column]) for row in csv.DictReader(handle) for column in columns]


def _mark(layout: str, what: str) -> tuple[pytest.MarkDecorator, ...]:
    if layout == "FSDP2 TP2":
        return (pytest.mark.nightly if what == "LoRA" else pytest.mark.slow,)
    return () if what == "LoRA" or layout == "DP2" else (pytest.mark.nightly,)


@pytest.mark.parametrize(
    ("layout", "what"),
    [pytest.param(*case, marks=_mark(*case)) for case in itertools.product(LAYOUTS, WHAT)],
)
def test_the_run_directory_is_that_of_one_process(processes, inputs, alone, tmp_path, layout, what):
    size, more = LAYOUTS[layout]
    export, settings = WHAT[what]
    directory = tmp_path / "run"
    if "TP2" in layout:  # half as many of gloo's slow sums
        more = [*more, "model.micro_batch_size=2"]
    assert processes.run(size, train, size, *inputs, directory, [*settings, *more]) == [0] * size
    one = alone(what)
    names = ("step", "reward", "kl_penalty", "loss", "grad_norm", "lr", "images")
    expected = pytest.approx(figures(one / "metrics.csv", *names), rel=1e-4, abs=1e-9)
    assert figures(directory / "metrics.csv", *names) == expected
    names = ("step", "reward", "base_reward")
    assert figures(directory / "validation.csv", *names) == pytest.approx(
        figures(one / "validation.csv", *names), rel=1e-5
    )
    mine, theirs = load_file(directory / "export" / export), load_file(one / "export" / export)
    assert {name: value.shape for name, value in mine.items()} == {name: value.shape for name, value in theirs.items()}
    # Adam moves a weight whose gradient is rounding noise by the learning rate, in either direction
    apart = torch.stack([(mine[name] - theirs[name]).norm() for name in mine]).norm()
    assert apart / torch.stack([value.norm() for value in theirs.values()]).norm() < 1e-4
    assert sorted(path.name for path in (directory / "samples").iterdir()) == ["step_000002.png", "step_000003.png"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_transformer_is_trained_as_by_one_process(processes, inputs, tmp_path, family):
    from tiny_pipelines import named

    row = named(family)
    row.build().save_pretrained(tmp_path / "model")
    settings = [
        *(f"model.{'infer' if key in ('height', 'width') else 'pipeline.arguments'}.{key}={value}"
          for key, value in row.arguments.items()),
        "model.infer.unconditional_guidance_scale=2",
        "model.peft.lora_tuning.adapter_dim=4",
        "model.optim.lr=1e-4",
        "model.kl_coeff=0.1",
        "model.micro_batch_size=2",
        "trainer.draftp_sd.val_check_interval=0",
    ]  # fmt: skip
    found = {}
    for layout, (size, more) in {"one": (1, []), **LAYOUTS}.items():
        if "TP2" in layout:
            more = [*more, "model.tensor_parallel_text_encoder=true", "model.cond_stage_config.cache_prompts=8"]
        directory = tmp_path / layout
        run = processes.run(size, train, size, tmp_path / "model", inputs[1], directory, [*settings, *more])
        assert run == [0] * size
        found[layout] = figures(directory / "metrics.csv", "reward", "kl_penalty", "loss", "grad_norm")
    expected = found.pop("one")
    assert expected[3] > 0
    for layout in found:
        assert found[layout] == pytest.approx(expected, rel=1e-4, abs=1e-9), layout


def train_on_a_prompt_without_a_score(*arguments: Any) -> int:
    from nemo_aligner_diffusion.rewards.rules import Symmetry

    score = Symmetry.score

    def sometimes(self: Any, images: torch.Tensor, given: list[str]) -> torch.Tensor:
        fails = torch.tensor([prompt == "prompt 7" for prompt in given])
        return score(self, images, given).masked_fill(fails, float("nan"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Symmetry, "score", sometimes)
        return train(*arguments)


@pytest.mark.parametrize("layout", ["DP2", pytest.param("TP2", marks=pytest.mark.slow)])
def test_a_prompt_at_fault_is_named_whichever_process_has_it(processes, inputs, tmp_path, layout):
    size, more = LAYOUTS[layout]
    words = [*more, "trainer.draftp_sd.max_steps=2", "trainer.draftp_sd.val_check_interval=0",
             "model.data.shuffle_buffer=0"]  # fmt: skip
    run = processes.run(size, train_on_a_prompt_without_a_score, size, *inputs, tmp_path / "run", words)
    assert run == [0] * size
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["skipped_steps"] == 1
    (event,) = record["non_finite_events"]
    assert event == {"step": 2, "what": "reward and grad_norm", "prompts": ["prompt 7"]}


def seed_of_dropout(*arguments: Any) -> int:
    assert train(*arguments) == 0
    return torch.initial_seed()


@pytest.mark.slow
def test_dropout_is_shared_by_a_tensor_group_and_by_nobody_else(processes, inputs, tmp_path):
    words = ["model.peft.lora_tuning.dropout=0.4", "model.optim.lr=0.01", "sched=constant", "model.seed=7",
             "trainer.draftp_sd.val_check_interval=0", "trainer.draftp_sd.max_steps=2"]  # fmt: skip
    seeds, rewards = {}, {}
    for name, size, more in (("one", 1, []), ("TP2", *LAYOUTS["TP2"]), ("DP2", *LAYOUTS["DP2"])):
        seeds[name] = processes.run(size, seed_of_dropout, size, *inputs, tmp_path / name, [*words, *more])
        rewards[name] = figures(tmp_path / name / "metrics.csv", "reward", "grad_norm")
    assert seeds == {"one": [7], "TP2": [7, 7], "DP2": [7, 8]}
    assert rewards["TP2"] == pytest.approx(rewards["one"], rel=1e-4)


@pytest.mark.parametrize("layout", ["TP2", "FSDP2"])
def test_mixed_precision(processes, inputs, tmp_path, layout):
    size, more = LAYOUTS[layout]
    directory = tmp_path / "run"
    more = [*more, "trainer.precision=bf16", "model.kl_coeff=0.1", "model.activation_checkpointing=true",
            "model.micro_batch_size=2", "trainer.draftp_sd.max_steps=2"]  # fmt: skip
    assert processes.run(size, train, size, *inputs, directory, more) == [0] * size
    reward = figures(directory / "validation.csv", "reward", "base_reward")
    assert all(-1.0 < value < 0.0 for value in reward)
    assert all(0.0 < norm < 100.0 for norm in figures(directory / "metrics.csv", "grad_norm"))


def save_clip_reward(folder: Path) -> Path:
    """A reward whose towers have an even number of heads."""
    from tiny.clip import tokenizer_files, toy_clip

    from nemo_aligner_diffusion.rewards.clip.archive import convert_hf_clip_to_nemo

    return convert_hf_clip_to_nemo(toy_clip(text_heads=4), tokenizer_files(), folder / "clip.nemo")


@pytest.mark.parametrize(
    ("size", "more"),
    [
        (2, ["model.fsdp=true", "model.fsdp_frozen=[text_encoder,vae,reward]"]),
        (2, ["model.tensor_model_parallel_size=2", "model.tensor_parallel_reward=true"]),
    ],
    ids=["sharded", "cut"],
)
def test_a_clip_reward_on_several_processes(processes, inputs, tmp_path, size, more):
    """Ranks meet different prompts, some of them again: a reward that remembers must not leave the others waiting."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red apple\nblue fish\nred apple\nred apple\ncat\ndog\ncat\nsun\n")
    archive = save_clip_reward(tmp_path)
    settings = [
        f"rm.model.restore_from_path={archive}",
        "model.data.shuffle_buffer=0",
        "model.data.validation.seeds=[1,2]",
        "model.truncation_steps=1",
        "trainer.draftp_sd.max_steps=2",  # all eight prompts
    ]
    outcomes = []
    for name, ranks, layout in (("one", 1, []), ("several", size, more)):
        directory = tmp_path / name
        words = ["rm=clip", *settings, *layout]
        assert processes.run(ranks, train, ranks, inputs[0], prompts, directory, words) == [0] * ranks
        columns = ("reward", "base_reward", "diversity", "base_diversity")
        outcomes.append(figures(directory / "validation.csv", *columns))
    assert outcomes[1] == pytest.approx(outcomes[0], rel=1e-4)
