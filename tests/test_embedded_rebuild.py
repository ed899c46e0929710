"""The rebuild of the embedded model: what makes it repeatable and resumable."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from nemo_aligner_diffusion.data.prompts import read_prompts
from nemo_aligner_diffusion.embedded_assets import embedded_prompts_path

SCRIPTS = Path(__file__).resolve().parents[1] / "examples" / "mm" / "embedded_model"


def script(name: str) -> ModuleType:
    """A module of the rebuild, without putting names as common as ``tokenizer`` on the import path."""
    spec = importlib.util.spec_from_file_location(f"embedded_model_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tokenizer_is_the_same_every_time(tmp_path):
    """Two trainings in one process once differed: the library numbers tokens in the order of a randomised table."""
    texts = read_prompts(str(embedded_prompts_path("train")))
    train = script("tokenizer").train_tokenizer
    for name in ("one", "two"):
        train(texts if name == "one" else texts[::-1], tmp_path / name, vocab_size=900)
    for file in ("vocab.json", "merges.txt"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


class Interrupted(Exception):
    pass


def trained(folder: Path, steps: int, stop_after: int | None = None) -> dict[str, torch.Tensor]:
    common = script("common")
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    training = common.Training(
        module,
        torch.optim.AdamW(module.parameters()),
        common.AveragedWeights(module, decay=0.9),
        folder / "checkpoint.pt",
        common.Log(folder / "log.jsonl"),
        steps=steps,
        save_every=4,
    )
    for step, generator in training.generators(seed=5):
        loss = module(torch.randn(8, 3, generator=generator)).square().mean()
        rate = 0.1 * common.warm_up_and_cosine(step, steps, warm_up=3)
        training.update(step, rate, loss, penalty=0.1 * module.bias.square().sum())
        training.record(step, lr=rate)
        if step == stop_after:
            raise Interrupted
    return training.average.values


def test_an_interrupted_stage_goes_on_as_if_nothing_had_happened(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "halved").mkdir()
    whole = trained(tmp_path / "whole", steps=12)
    with pytest.raises(Interrupted):
        trained(tmp_path / "halved", steps=12, stop_after=6)
    halved = trained(tmp_path / "halved", steps=12)
    start = trained(tmp_path / "whole", steps=12)  # a finished one does nothing more
    assert all(torch.equal(whole[name], halved[name]) for name in whole)
    assert all(torch.equal(whole[name], start[name]) for name in whole)
    assert not torch.equal(whole["weight"], torch.nn.Linear(3, 2).weight)
