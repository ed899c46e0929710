"""conf/ explains itself, and code and documentation agree with it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from settings_page import FAMILYS, documented_keys, tables

from nemo_aligner_diffusion.config.families import family_layer
from nemo_aligner_diffusion.config.load import load_config, load_settings
from nemo_aligner_diffusion.config.recipes import conf_directory, recipes
from nemo_aligner_diffusion.config.schema import KEYS, vocabulary
from nemo_aligner_diffusion.keys import flatten
from nemo_aligner_diffusion.rewards.augmentation import Augmentation
from nemo_aligner_diffusion.rewards.registry import rewards
from nemo_aligner_diffusion.settings import LOOP
from nemo_aligner_diffusion.training.settings import RunSettings

ROOT = Path(__file__).resolve().parents[1]
LINE = re.compile(r"(?P<indent> *)(?P<key>[\w+]+):(?P<value>.*?) # (?P<comment>.*)")
FILES = sorted(conf_directory().rglob("*.yaml"))


def test_conf_is_the_repositorys() -> None:
    assert conf_directory() == ROOT / "conf"
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "conf")))
def test_every_key_has_a_comment(path: Path) -> None:
    in_defaults = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line == "defaults:":
            in_defaults = True
            continue
        in_defaults = in_defaults and line.startswith(" ")
        key = re.match(r"\s*(?!#)([\w+]+):", line)
        if key and not in_defaults:
            comment = line.partition(" # ")[2]
            assert len(comment) >= 4, f"{path.name}:{number}: {key.group(1)} has no comment"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "conf")))
def test_every_file_begins_by_saying_what_it_is(path: Path) -> None:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# ")
    assert len(lines[0]) > 12
    assert max(map(len, lines)) <= 150
    yaml.safe_load(path.read_text(encoding="utf-8"))


# Keys that only some choice needs and that therefore no file of conf/ sets.
UNSET = {f"model.optim.sched.{name}" for name in ("warmup_ratio", "hold_steps", "hold_ratio", "constant_ratio")}
FREE = {"exp_manager.wandb_logger_kwargs.*", "rm.parts.*", "rm.kwargs.*", "model.custom_algorithm.*",
        "model.pipeline.arguments.*"}  # fmt: skip


def lines_of(path: Path) -> list[tuple[str, Any, str]]:
    """(dotted key, value, comment) of each line of a file of ``conf/``."""
    found, lines = [], path.read_text(encoding="utf-8").splitlines()
    group = path.parent.name if path.parent != ROOT / "conf" else ""
    header = re.match(r"# @package (\S+)", lines[0])
    sections = [header.group(1) if header else f"trainer.{LOOP}" if group == "loop" else group]
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        match = LINE.fullmatch(line)
        if match:
            sections[len(match["indent"]) // 2 + 1 :] = [match["key"]]
            value = match["value"].strip() or (following if following.strip().startswith("[") else "")
            found.append((".".join(filter(None, sections)), yaml.safe_load(value), match["comment"].strip()))
    return found


def lines_of_conf() -> set[tuple[str, str, str]]:
    """(dotted key, value as JSON, comment) of every line."""
    return {(key, json.dumps(value), comment) for path in FILES for key, value, comment in lines_of(path)}


def test_every_setting_has_its_line_in_conf() -> None:
    """With the default of its class, and the meaning as the comment."""
    lines = lines_of_conf()
    elsewhere = {"name", "model.algorithm", "model.optim.momentum"}  # each recipe, each method, sgd alone
    checked = 0
    for section in RunSettings.all_sections():
        defaults, meanings = section.defaults(), section.meanings()
        for field, key in section.keys().items():
            if key in UNSET | elsewhere:
                continue
            default = "32" if key == "trainer.precision" else json.dumps(defaults[field])
            assert (key, default, meanings[field]) in lines, key
            checked += 1
    assert checked > 90


def test_every_key_of_the_schema_is_documented() -> None:
    documented = {key for table in documented_keys().values() for key in table}
    missing = set(KEYS) - documented
    assert missing == FREE - {"rm.parts.*"} | {"rm.parts.*"}
    assert {key for key, _, _ in lines_of_conf()} >= documented - UNSET


def test_defaults_in_the_documentation_are_what_the_program_shows() -> None:
    """What ``--cfg`` shows of the recipe whose method has no settings."""
    shown = flatten(OmegaConf.to_container(load_config("draft_sd")))  # type: ignore[arg-type]
    for key, (default, _) in {
        key: entry for table in documented_keys().values() for key, entry in table.items()
    }.items():
        value = shown.get(key.replace(LOOP, "draft_sd"))
        if default == FAMILYS:
            assert key in family_layer("embedded").leaves
        elif (
            value is not None
            and not key.startswith("model.family")
            and "draft" not in str(value)
            and not key.startswith("rm.")
        ):
            assert yaml.safe_load(default) == value or str(default) == str(value), key


@pytest.mark.parametrize("name", ["WarmupHoldPolicy", "CosineAnnealing", "constant"])
def test_a_schedules_settings_act_or_are_named(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Each of its settings changes the rates, or a warning says that it has no effect."""
    given = {"warmup_steps": 3, "warmup_ratio": 0.2, "hold_steps": 4, "hold_ratio": 0.4, "constant_steps": 5,
             "constant_ratio": 0.5, "min_lr": 1e-4}  # fmt: skip

    def rates(*words: str) -> list[float]:
        sched = load_settings("draft_sd", [f"model.optim.sched.name={name}", *words]).model.optim.sched
        return [sched.factor(30)(step, sched.min_lr / 4e-4) for step in range(33)]

    plain = rates()
    for key, value in given.items():
        caplog.clear()
        changed = rates(f"model.optim.sched.{key}={value}") != plain
        assert changed != (f"model.optim.sched.{key}: " in caplog.text), key


@pytest.mark.parametrize("recipe", sorted(recipes()))
def test_every_key_that_composes_is_in_the_schema(recipe: str) -> None:
    container = OmegaConf.to_container(load_config(recipe, ["rm=clip"]))
    assert isinstance(container, dict)
    for key in flatten({str(name): value for name, value in container.items()}):
        assert vocabulary(recipe).kind_of(key) is not None, key


def test_the_documentations_tables_are_current() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    current = text.split("<!-- keys: begin -->\n")[1].split("<!-- keys: end -->")[0]
    assert current == tables(), "run: python tests/settings_page.py docs"


@pytest.mark.parametrize("name", sorted(rewards()))
def test_a_rewards_conf_file_shows_its_settings(name: str) -> None:
    """``conf/rm/<name>.yaml`` has exactly the reward's own settings, with their defaults and meanings."""
    kind = rewards()[name]
    lines = [*lines_of(ROOT / f"conf/rm/{name}.yaml"), *lines_of(ROOT / "conf/rm/base.yaml")]
    keys = {*kind.keys().values(), *Augmentation.keys().values()}
    shown = {key: (value, meaning) for key, value, meaning in lines if key in keys}
    assert shown.keys() == keys
    known = vocabulary("draftp_sd")
    others = {key for key, _, _ in lines if known.kind_of(key) is not None and f"{key}.*" not in known.kinds} - keys
    assert {key for key in others if key.split(".")[1] not in ("name", *kind.free)} == set()
    for settings in (kind, Augmentation):
        defaults, meanings = settings.defaults(), settings.meanings()
        for field, key in settings.keys().items():
            given, meaning = shown[key]
            assert meaning == meanings[field], key
            assert given == ("???" if field in kind.needs else defaults[field]) or str(given) == defaults[field]
