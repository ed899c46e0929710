"""One's own reward: found by its import path, held to the protocol, and trained on as the documentation says."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny.stable_diffusion import save_tiny_pipeline
from torch import nn

from nemo_aligner_diffusion.config.load import load_config
from nemo_aligner_diffusion.errors import AlignerError, ConfigurationError, RewardError
from nemo_aligner_diffusion.rewards import build_reward
from nemo_aligner_diffusion.rewards.registry import import_paths
from nemo_aligner_diffusion.rewards.support.custom import CustomReward
from nemo_aligner_diffusion.training.run import run_training

ROOT = Path(__file__).resolve().parents[1]
IMAGES = torch.rand(3, 3, 8, 8)
PROMPTS = ["a", "b", "c"]


def documented_example() -> str:
    page = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(# my_rewards\.py\n.*?)```", page, re.DOTALL)
    assert found is not None, "docs/rewards.md has no example my_rewards.py"
    return found.group(1)


def module(folder: Path, text: str, name: str = "mine_of_test") -> str:
    (folder / f"{name}.py").write_text("import torch\n" + text, encoding="utf-8")
    sys.modules.pop(name, None)
    return name


def custom(import_path: str, **kwargs: Any) -> Any:
    return build_reward({"name": "custom", "import_path": import_path, "kwargs": kwargs or None})


# The documented example


def test_the_documented_example_is_fifteen_lines_and_trains(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = documented_example()
    assert len([line for line in example.splitlines() if line.strip()]) <= 16
    (here / "my_rewards.py").write_text(example, encoding="utf-8")
    pipeline = save_tiny_pipeline(here / "pipeline")
    (here / "prompts.txt").write_text("red\ngreen\nblue\ngrey\n", encoding="utf-8")
    overrides = [
        "rm=custom",
        "rm.import_path=my_rewards:Colourfulness",
        "rm.kwargs.weight=2.0",
        f"model.from_pretrained={pipeline}",
        "family=embedded",
        "model.data.train.webdataset.local_root_path=prompts.txt",
        "model.data.validation.max_prompts=2",
        "model.infer.inference_steps=3",
        "model.truncation_steps=1",
        "model.micro_batch_size=2",
        "model.global_batch_size=2",
        "trainer.accelerator=cpu",
        "trainer.draftp_sd.max_steps=2",
        "exp_manager.explicit_log_dir=run",
    ]
    assert run_training(load_config("draftp_sd", overrides)) == 0
    metrics = (here / "run" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert len(metrics) == 3
    assert json.loads((here / "run" / "run.json").read_text())["status"] == "finished"
    assert "the reward my_rewards:Colourfulness" in (here / "run" / "report.html").read_text(encoding="utf-8")


def test_the_documented_example_rewards_colour(here: Path) -> None:
    (here / "my_rewards.py").write_text(documented_example(), encoding="utf-8")
    reward = custom("my_rewards:Colourfulness", weight=2.0)
    grey = torch.rand(1, 1, 8, 8).expand(1, 3, 8, 8)
    scores = reward(torch.cat([grey, torch.rand(1, 3, 8, 8)]), ["", ""])
    assert scores[1] > scores[0] + 0.1
    half = custom("my_rewards:Colourfulness", weight=1.0)
    torch.testing.assert_close(half(IMAGES, PROMPTS), reward(IMAGES, PROMPTS) / 2)


# What may stand at an import path


def test_class_function_instance_module_and_reward(here: Path) -> None:
    name = module(
        here,
        """
from nemo_aligner_diffusion.rewards import Reward, Symmetry

class Plain:
    def __init__(self, scale=1.0):
        self.scale = scale
        self.network = torch.nn.Linear(3, 1)
    def __call__(self, images, prompts):
        return self.scale * images.mean((1, 2, 3)) + 0 * self.network(images.mean((2, 3)))[:, 0]

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.drop, self.linear = torch.nn.Dropout(0.9), torch.nn.Linear(3, 1)
    def forward(self, images, prompts):
        return self.drop(self.linear(images.mean((2, 3)))).squeeze(1)

def by_length(images, prompts, scale=1.0):
    return scale * images.mean((1, 2, 3)) * torch.tensor([float(len(p)) for p in prompts])

ready = Plain(5.0)

class Mirror(Reward):
    def score(self, images, prompts):
        return -(images - images.flip(-1)).abs().mean((1, 2, 3))

class Nested:
    inner = Mirror
    settings = Symmetry
""",
    )
    mean = IMAGES.mean((1, 2, 3))
    plain = custom(f"{name}:Plain", scale=2.0)
    torch.testing.assert_close(plain(IMAGES, PROMPTS), 2 * mean)
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    assert len(list(plain.parameters())) == 2, "networks that a plain object holds are frozen and moved, too"
    torch.testing.assert_close(
        custom(f"{name}:by_length", scale=3.0)(IMAGES, ["ab", "", "c"]), 3 * mean * torch.tensor([2.0, 0, 1])
    )
    torch.testing.assert_close(custom(f"{name}:ready")(IMAGES, PROMPTS), 5 * mean)
    with pytest.raises(TypeError, match="NoneType"):
        custom(f"{name}:by_length", scale=None)(IMAGES, PROMPTS)  # a null is handed on
    with pytest.raises(ConfigurationError, match=r"rm\.kwargs = 3: expected a section"):
        build_reward({"name": "custom", "import_path": f"{name}:by_length", "kwargs": 3})
    net = custom(f"{name}:Net").train()
    assert torch.equal(net(IMAGES, PROMPTS), net(IMAGES, PROMPTS)), "it stays in evaluation mode"
    assert not any(parameter.requires_grad for parameter in net.parameters())
    for path in ("Nested.inner", "Nested.settings"):
        symmetry = custom(f"{name}:{path}")
        assert torch.equal(symmetry(IMAGES, PROMPTS), build_reward({"name": "symmetry"})(IMAGES, PROMPTS))
    part = build_reward(
        {"name": "composite", "parts": {"mine": {"name": "custom", "import_path": f"{name}:ready", "weight": 2}}}
    )
    torch.testing.assert_close(part(IMAGES, PROMPTS), 10 * mean)


@pytest.mark.parametrize(
    ("path", "kwargs", "expected"),
    [
        ("nocolon", {}, "expected package.module:name"),
        ("a b:c", {}, "expected package.module:name"),
        ("no_such_module_here:x", {}, "there is no module 'no_such_module_here'.*current directory"),
        ("mine_of_test:Colour", {}, "did you mean Colours"),
        ("mine_of_test:number", {}, "is a int; expected a Reward"),
        ("mine_of_test:Colours", {"scael": 1}, r"Colours\(scael\) failed with TypeError.*rm\.kwargs"),
        ("mine_of_test:one_argument", {}, r"cannot be called as \(images, prompts\)"),
        ("mine_of_test:score", {"scael": 1}, r"cannot be called as \(images, prompts, scael=…\)"),
        ("mine_of_test:ready", {"scale": 1}, "already made"),
        ("mine_broken:x", {}, "failed with ZeroDivisionError"),
        ("mine_needs:x", {}, "needs 'a_package_that_is_not_there', which is not installed"),
    ],
)
def test_paths_that_cannot_be_used(here: Path, path: str, kwargs: dict[str, Any], expected: str) -> None:
    module(
        here,
        """
number = 3
class Colours:
    def __call__(self, images, prompts): return images.mean((1, 2, 3))
ready = Colours()
def one_argument(images): return images.mean((1, 2, 3))
def score(images, prompts, scale=1.0): return images.mean((1, 2, 3))
""",
    )
    module(here, "1 / 0\n", "mine_broken")
    module(here, "import a_package_that_is_not_there\n", "mine_needs")
    with pytest.raises(RewardError, match=expected) as caught:
        custom(path, **kwargs)
    assert "rm.import_path" in str(caught.value)


def test_an_installed_module_is_never_hidden_by_a_file_here(here: Path) -> None:
    (here / "colorsys.py").write_text("raise RuntimeError('the wrong one')", encoding="utf-8")
    with pytest.raises(RewardError, match="has no 'nothing'"):
        custom("colorsys:nothing")


# What it must give


@pytest.mark.parametrize(
    ("judge", "expected"),
    [
        (lambda images, prompts: [1.0, 2.0, 3.0], r"gave a list; expected a tensor \(3,\)"),
        (lambda images, prompts: images.mean(), r"gave \(\) torch.float32 for 3 pictures"),
        (lambda images, prompts: images.mean((2, 3)), r"gave \(3, 3\)"),
        (lambda images, prompts: (images.mean((1, 2, 3)) > 0.5).long(), "int64"),
        (lambda images, prompts: images.detach().mean((1, 2, 3)), "without a gradient in the pictures"),
        (lambda images, prompts: torch.ones(3, requires_grad=True), "without a gradient in the pictures"),
    ],
)
def test_wrong_scores_are_named(judge: Any, expected: str) -> None:
    reward = CustomReward(judge, "rm.import_path = 'mine:judge'")
    with pytest.raises(RewardError, match=expected) as caught:
        reward(IMAGES.clone().requires_grad_(), PROMPTS)
    assert "rm.import_path = 'mine:judge'" in str(caught.value)


def test_no_gradient_is_asked_for_where_none_is_wanted() -> None:
    reward = CustomReward(lambda images, prompts: images.detach().mean((1, 2, 3)))
    assert reward(IMAGES, PROMPTS).shape == (3,)
    with torch.no_grad():
        assert reward(IMAGES.clone().requires_grad_(), PROMPTS).shape == (3,)


def test_half_precision_pictures_come_in_float32() -> None:
    seen = []

    def judge(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        seen.append((images.dtype, torch.is_autocast_enabled("cpu")))
        return nn.functional.linear(images.mean((2, 3)), torch.ones(1, 3))[:, 0]

    with torch.autocast("cpu", torch.bfloat16):
        score = CustomReward(judge)(IMAGES.bfloat16(), PROMPTS)
    assert seen == [(torch.float32, False)]
    assert score.dtype == torch.float32


def test_missing_path_and_paths_found_in_a_configuration() -> None:
    with pytest.raises(ConfigurationError, match=r"needs rm\.import_path"):
        build_reward({"name": "custom"})
    section = {
        "name": "composite",
        "import_path": None,
        "parts": {"a": {"import_path": "x:y"}, "b": {"parts": {"c": {"import_path": "z:w"}}}},
    }
    assert list(import_paths(section)) == [
        ("rm.parts.a.import_path", "x:y"),
        ("rm.parts.b.parts.c.import_path", "z:w"),
    ]


def test_nothing_is_imported_because_a_run_directory_names_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nemo_aligner_diffusion.cli.generate import read_request
    from nemo_aligner_diffusion.evaluation import generation
    from nemo_aligner_diffusion.evaluation.run_files import RunFiles

    module(
        here, f"open({str(here / 'ran')!r}, 'w').close()\ndef score(images, prompts): return images.mean((1, 2, 3))\n"
    )
    section = {"name": "composite", "parts": {"a": {"name": "custom", "import_path": "mine_of_test:score"}}}
    run = RunFiles(here, {"rm": section})

    def parse_request(words: list[str]) -> Any:
        return read_request(words)

    request = parse_request(["--prompt", "a"])
    assert generation._reward(request, run, torch.device("cpu")) is None
    assert "rm.parts.a.import_path = mine_of_test:score" in capsys.readouterr().err
    assert not (here / "ran").exists()
    asked = parse_request(["--prompt", "a", "--reward", "mine_of_test:score"])
    reward = generation._reward(asked, run, torch.device("cpu"))
    assert reward is not None
    assert reward(IMAGES, PROMPTS).shape == (3,)
    with pytest.raises(AlignerError, match=r"your own package\.module:name"):
        generation._reward(parse_request(["--prompt", "a", "--reward", "nothing"]), None, torch.device("cpu"))
