"""Methods: plans as the papers draw them, settings in one place, one's own by import path. No network here."""

from __future__ import annotations

import dataclasses
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from settings_page import method_table

import nemo_aligner_diffusion as package
from nemo_aligner_diffusion.algorithms.registry import method_of, methods, title_of
from nemo_aligner_diffusion.config import schema
from nemo_aligner_diffusion.config.load import load_config
from nemo_aligner_diffusion.config.recipes import conf_directory
from nemo_aligner_diffusion.diffusion.plan import check_plan
from nemo_aligner_diffusion.errors import ConfigurationError

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")


@dataclass
class FlowPath:
    """Euler on a flow with evenly spaced noise levels, as far as a rule may look at it."""

    steps: int
    flow: bool = True
    levels: list[tuple[float, float]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.levels = [(i / self.steps, 1 - i / self.steps) for i in range(self.steps + 1)]
        self.weights = [-1 / self.steps] * self.steps


def drawn(method: Any, steps: int, count: int = 300) -> list[Any]:
    rng = random.Random(0)
    plans = [method.plan(FlowPath(steps), rng) for _ in range(count)]
    for plan in plans:
        check_plan(plan, steps)
    return plans


# The papers' draws


def test_draft_and_draft_k() -> None:
    (plan,) = drawn(package.DRaFT(), 6, 1)
    assert (plan.active, plan.cut, plan.stop) == (tuple(range(6)), False, None)
    for method in (package.DRaFTK(truncation_steps=2), package.DRaFTPlus(truncation_steps=2)):
        (plan,) = drawn(method, 6, 1)
        assert (plan.active, plan.cut, plan.stop) == ((4, 5), False, None)
    (plan,) = drawn(package.DRaFTPlus(truncation_steps=2, read="x0"), 6, 1)
    assert (plan.active, plan.stop) == ((4, 5), 5)


def test_draft_lv() -> None:
    (plan,) = drawn(package.DRaFTLV(samples=3), 6, 1)
    assert (plan.active, plan.renoise, plan.network_reads) == ((5,), 3, 3)
    (plan,) = drawn(package.DRaFTLV(include_own_step=True), 6, 1)
    assert (plan.renoise, plan.own_step, plan.network_reads) == (2, True, 3)


def test_drtune_follows_the_paper() -> None:
    plans = drawn(package.DRTune(train_steps=4, early_stop_steps=8), 20)
    assert {plan.stop for plan in plans} == set(range(12, 20))
    for plan in plans:
        stride = (plan.stop + 1) // 4
        assert len(plan.active) == 4
        assert plan.cut
        assert {b - a for a, b in zip(plan.active, plan.active[1:], strict=False)} == {stride}
    assert {plan.active[0] for plan in plans} >= {0, 1, 2, 3}
    assert any(plan.stop in plan.active for plan in plans)
    (plan,) = drawn(package.DRTune(train_steps=20, early_stop_steps=0), 20, 1)
    assert (plan.stop, plan.active) == (None, tuple(range(20)))


def test_refl_draws_within_its_window() -> None:
    plans = drawn(package.ReFL(window=(5, 8)), 10)
    assert {plan.stop for plan in plans} == {5, 6, 7, 8}
    assert all(plan.active == (plan.stop,) for plan in plans)
    assert {plan.stop for plan in drawn(package.ReFL(), 40)} == set(range(30, 40))
    assert {plan.stop for plan in drawn(package.ReFL(), 1)} == {0}


def test_alignprop_draws_as_the_paper_or_as_its_code() -> None:
    evenly = drawn(package.AlignProp(min_truncation_steps=2, max_truncation_steps=6, distribution="uniform"), 10)
    assert {plan.active[0] for plan in evenly} == set(range(4, 9))
    assert all(plan.active[-1] == 9 for plan in evenly)
    # Normal(42, 5) of 50, rounded down, redrawn outside: mean of the truncated normal less one half
    first = [plan.active[0] for plan in drawn(package.AlignProp(), 50, 4000)]
    assert sum(first) / len(first) == pytest.approx(41.04, abs=0.3)
    assert max(first) == 49
    bounded = drawn(package.AlignProp(min_truncation_steps=9, max_truncation_steps=10, std=0.001), 10)
    assert {len(plan.active) for plan in bounded} <= {9, 10}


def test_flowbp_sparse_prefers_late_steps_and_makes_up_for_the_others() -> None:
    plans = drawn(package.FlowBPSparse(train_steps=1, late_bias=1, compensation=1), 4, 4000)
    shares = Counter(plan.active[0] for plan in plans)
    assert [shares[i] / 4000 for i in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.03)
    assert all(plan.cut and plan.gain == {plan.active[0]: pytest.approx(4)} for plan in plans)
    for plan in drawn(package.FlowBPSparse(), 25):
        assert len(set(plan.active)) == 4
        assert plan.gain[plan.active[0]] == pytest.approx(1 + 0.5 * (25 / 4 - 1))
    (plan,) = drawn(package.FlowBPSparse(train_steps=9), 3, 1)
    assert plan.active == (0, 1, 2)
    assert package.FlowBPSparse(compensation=0).plan(FlowPath(9), random.Random()).gain == {}


def test_flowbp_bridge_is_active_on_both_sides_of_its_split() -> None:
    plans = drawn(package.FlowBPBridge(train_steps=5, share=0.5), 25)
    for plan in plans:
        ((split, share),) = plan.input_share.items()
        assert share == 0.5
        assert plan.cut
        assert split in plan.active
        assert len(set(plan.active)) == 5
        before = sum(i < split for i in plan.active)
        assert 1 <= before <= 4
        assert abs(before - 5 * split / 25) <= 1
    splits = Counter(next(iter(plan.input_share)) for plan in drawn(package.FlowBPBridge(), 3, 3000))
    assert splits[2] / 3000 == pytest.approx(2 / 3, abs=0.03)  # the later of two steps of three
    assert {plan.active for plan in drawn(package.FlowBPBridge(), 2)} == {(0, 1)}


def test_leapalign_and_lagrange_draw_two_leaps() -> None:
    pairs = Counter((plan.k, plan.j) for plan in drawn(package.LeapAlign(), 4, 3000))
    assert set(pairs) == {(k, j) for j in range(4) for k in range(j)}
    assert max(pairs.values()) / 3000 == pytest.approx(1 / 6, abs=0.03)
    for plan in drawn(package.LeapAlign(), 25):
        assert (plan.active, plan.cut, plan.input_share) == ((plan.k, plan.j), True, {plan.j: 0.3})
    for plan in drawn(package.FlowBPLagrange(), 25):
        assert 0 <= plan.k < plan.j < 25
        assert plan.j >= 15  # at most 9 of 25 steps after it
        assert plan.active[0] == plan.k
        assert plan.j in plan.active
        assert len(plan.active) <= 4
    gaps = [plan.j - plan.k for plan in drawn(package.FlowBPLagrange(most_after=1.0), 25, 3000)]
    assert sum(gaps) / 3000 == pytest.approx(25 * 6 / 10.5, abs=0.7)  # Dirichlet's mean
    for plan in drawn(package.FlowBPLagrange(), 2):
        assert (plan.k, plan.j) == (0, 1)


# Settings in one place


@pytest.mark.parametrize("name", methods())
def test_a_method_has_one_yaml_and_its_values_are_the_classs(name: str) -> None:
    method = methods()[name]
    text = (conf_directory() / "algorithm" / f"{method.option}.yaml").read_text(encoding="utf-8")
    leaves = OmegaConf.create({"model": yaml.safe_load(text)})
    assert leaves.model.algorithm == name
    comments = dict(re.findall(r"^ *(\w+): .*? # (.*)$", text, re.MULTILINE))
    for entry in dataclasses.fields(method):
        if (method.option, entry.name) == ("draft_plus", "truncation_steps"):
            continue  # conf/family: the embedded model's is the class's, as the last lines say
        value = OmegaConf.select(leaves, method.keys()[entry.name], default="absent")
        value = tuple(value) if OmegaConf.is_list(value) else value
        assert value == entry.default, entry.name
        assert comments[entry.name] == entry.metadata["meaning"]
    family = ["family=other"] if method.kind == "preference" else []  # the embedded model's β is its own
    assert method_of(load_config("draftp_sd", [f"algorithm={method.option}", *family])) == method()
    assert method_of(load_config("drtune_sd", [f"model.algorithm={name}", *family])) == method()
    assert title_of(name) == method.title
    assert getattr(package, method.__name__) is method
    assert method.__name__ in dir(package)


def test_only_the_chosen_methods_settings_remain() -> None:
    model = load_config("draftp_sd", ["model.algorithm=leapalign", "model.leapalign.tau=0.5"]).model
    assert model.leapalign == {"share": 0.3, "tau": 0.5}
    assert model.kl_coeff == 5.0, "what every method reads stays"
    assert not {"truncation_steps", "draft_plus", "drtune"} & set(model)


def test_settings_are_checked_in_python_too() -> None:
    with pytest.raises(ConfigurationError, match=r"DRTune.train_steps = 0: expected an integer >= 1"):
        package.DRTune(train_steps=0)
    with pytest.raises(ConfigurationError, match=r"expected one of z_T, x0"):
        package.DRaFTK(read="z")
    for name in ("LeapAlign", "FlowBPBridge", "FlowBPLagrange", "DRaFTLV"):
        with pytest.raises(ConfigurationError, match=r"inference_steps = 1 .*expected 2 or more"):
            getattr(package, name)().check(1)


def test_the_page_is_current() -> None:
    current = PAGE.split("<!-- keys: begin -->\n")[1].split("<!-- keys: end -->")[0]
    assert current == method_table(), "run: python tests/settings_page.py docs"


def test_a_new_method_is_one_python_file_and_one_yaml(tmp_path: Path) -> None:
    (tmp_path / "first_step.py").write_text(
        "from dataclasses import dataclass\n"
        "from nemo_aligner_diffusion.algorithms.base import Method, setting\n"
        "from nemo_aligner_diffusion.diffusion.plan import Plan\n"
        "from nemo_aligner_diffusion.settings import integer\n"
        "@dataclass(frozen=True)\n"
        "class FirstSteps(Method):\n"
        "    '''The first K steps.'''\n"
        "    name, title, source = 'first_steps', 'First steps', 'nobody'\n"
        "    train_steps: int = setting(2, integer(1), 'K; integer >= 1')\n"
        "    def plan(self, path, rng):\n"
        "        return Plan(active=tuple(range(self.train_steps)))\n"
    )
    group = tmp_path / "algorithm"
    group.mkdir()
    (group / "first_steps.yaml").write_text(
        "# @package model\ndefaults: [base, _self_]\nalgorithm: first_steps\nfirst_steps: {train_steps: 3}\n"
    )
    (tmp_path / "mine.yaml").write_text("defaults: [draftp_sd, override algorithm: first_steps]\n")
    code = (
        "import nemo_aligner_diffusion.algorithms as algorithms\n"
        f"algorithms.__path__.append({str(tmp_path)!r})\n"
        "import nemo_aligner_diffusion as package\n"
        "from nemo_aligner_diffusion.algorithms.registry import method_of\n"
        "from nemo_aligner_diffusion.errors import ConfigurationError\n"
        "from nemo_aligner_diffusion.evaluation.report.view import title_of\n"
        "from nemo_aligner_diffusion.config.load import load_config\n"
        "import sys; sys.path.append('tests')\n"
        "from settings_page import method_table\n"
        f"assert method_of(load_config('mine', config_dir={str(tmp_path)!r})) == package.FirstSteps(3)\n"
        "assert method_of(load_config('draftp_sd', ['model.algorithm=first_steps'])) == package.FirstSteps()\n"
        "try:\n"
        "    load_config('draftp_sd', ['model.algorithm=first_steps', 'model.first_steps.train_steps=0'])\n"
        "except ConfigurationError as error:\n"
        "    assert 'model.first_steps.train_steps = 0: expected an integer >= 1' in str(error)\n"
        "assert title_of('first_steps') == 'First steps'\n"
        "assert '| First steps (nobody) | The first K steps. | `model.first_steps.*` |' in method_table()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# One's own, by import path


def own(import_path: str, *words: str) -> Any:
    return method_of(load_config("draftp_sd", [f"model.algorithm={import_path}", *words]))


def test_the_documented_rule_runs(here: Path) -> None:
    (example,) = re.findall(r"```python\n(# my_rules\.py\n.*?)```", PAGE, re.DOTALL)
    (here / "my_rules.py").write_text(example, encoding="utf-8")
    (command,) = re.findall(r"train_sd\.py (model\.algorithm=my_rules.*)", PAGE)
    cfg = load_config("draftp_sd", command.split())
    assert method_of(cfg).plan(FlowPath(8), random.Random(0)).active == (1, 4, 7)
    assert title_of(cfg.model.algorithm) == "EverySecondStep"
    assert "truncation_steps" not in cfg.model


def test_functions_classes_and_methods_are_rules(here: Path) -> None:
    (here / "rules_of_test.py").write_text(
        "from dataclasses import dataclass\n"
        "from nemo_aligner_diffusion.algorithms.base import Method, setting\n"
        "from nemo_aligner_diffusion.diffusion.plan import Plan\n"
        "from nemo_aligner_diffusion.errors import ConfigurationError\n"
        "from nemo_aligner_diffusion.settings import integer\n"
        "def only(path, rng, step=0):\n"
        "    return Plan(active=(step,))\n"
        "@dataclass(frozen=True)\n"
        "class First(Method):\n"
        "    count: int = setting(1, integer(1), 'how many')\n"
        "    def check(self, steps):\n"
        "        if self.count > steps:\n"
        "            raise ConfigurationError(self.given('count') + ' is too many')\n"
        "    def plan(self, path, rng):\n"
        "        return Plan(active=tuple(range(self.count)))\n"
    )
    rng = random.Random(0)
    assert own("rules_of_test:only", "model.custom_algorithm.step=3").plan(FlowPath(5), rng).active == (3,)
    first = own("rules_of_test:First", "model.custom_algorithm.count=2")
    assert first.plan(FlowPath(5), rng).active == (0, 1)
    with pytest.raises(ConfigurationError, match=r"model.custom_algorithm.count = 2 is too many"):
        first.check(1)
    with pytest.raises(ConfigurationError, match=r"First.count = 0: expected an integer >= 1"):
        own("rules_of_test:First", "model.custom_algorithm.count=0")


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("no_such_module_of_test:Rule", "there is no module 'no_such_module_of_test'"),
        ("bad_rules:Nothing", "bad_rules has no 'Nothing'"),
        ("bad_rules:NUMBER", "is a int; expected a Method, or a callable (path, rng) -> Plan"),
        ("bad_rules:no_arguments", "cannot be called as (path, rng)"),
        ("bad_rules:wrong_type", "its rule gave a list; expected a Plan"),
        ("bad_rules:raises", "its rule failed with KeyError: 'k'"),
        ("bad_rules:outside", "active steps must be integers in 0 … 4"),
        ("bad_rules:nothing_active", "at least one"),
        ("bad_rules:stops_late", "the plan stops at step 7"),
        ("bad_rules:Needs", "failed with TypeError"),
        ("bad rules:x", "expected package.module:name"),
    ],
)
def test_what_is_no_rule_is_one_message(here: Path, rule: str, expected: str) -> None:
    (here / "bad_rules.py").write_text(
        "from nemo_aligner_diffusion.diffusion.plan import Plan\n"
        "NUMBER = 3\n"
        "def no_arguments():\n    return Plan(active=(0,))\n"
        "def wrong_type(path, rng):\n    return [1, 2]\n"
        "def raises(path, rng):\n    return {}['k']\n"
        "def outside(path, rng):\n    return Plan(active=(path.steps,))\n"
        "def nothing_active(path, rng):\n    return Plan(active=())\n"
        "def stops_late(path, rng):\n    return Plan(active=(0,), stop=7)\n"
        "class Needs:\n    def __init__(self, much):\n        pass\n"
    )
    with pytest.raises(ConfigurationError) as caught:
        own(rule).plan(FlowPath(5), random.Random(0))
    text = str(caught.value)
    assert text.startswith(f"model.algorithm = {rule!r}")
    assert expected in text
    assert "\n" not in text


def test_settings_of_ones_own_are_named_where_nobody_reads_them(caplog: pytest.LogCaptureFixture) -> None:
    load_config("draftp_sd", ["model.custom_algorithm.every=3"])
    assert "model.custom_algorithm.every: model.algorithm=draft+ does not read it" in caplog.text
    assert "custom_algorithm" not in load_config("draftp_sd", ["model.custom_algorithm.every=3"]).model


def test_the_schema_follows_from_the_methods() -> None:
    assert tuple(methods()) == schema.KEYS["model.algorithm"].choices
    assert len(methods()) >= 11
    for method in methods().values():
        assert set(method.keys().values()) <= set(schema.KEYS)
