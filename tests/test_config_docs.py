"""conf/ explains itself, and code and documentation agree with it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from nemo_aligner_diffusion.config import schema
from nemo_aligner_diffusion.config.docs import _file_keys, documented_keys, tables
from nemo_aligner_diffusion.config.layers import flatten
from nemo_aligner_diffusion.config.load import conf_directory, load_config, recipes
from nemo_aligner_diffusion.rewards.augmentation import Augmentation
from nemo_aligner_diffusion.rewards.registry import rewards

ROOT = Path(__file__).resolve().parents[1]
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


def test_every_key_of_the_schema_is_in_conf_or_explained_here() -> None:
    # Keys that only some choice needs and that therefore no file of conf/ sets.
    unset = {f"model.optim.sched.{name}" for name in ("warmup_ratio", "hold_ratio", "constant_ratio")}
    unset |= {"exp_manager.wandb_logger_kwargs.*", "rm.parts.*", "rm.kwargs.*"}
    unset |= {"model.custom_algorithm.*", "model.pipeline.arguments.*"}
    assert set(schema.known_keys("<loop>")) - set(documented_keys()) == unset


@pytest.mark.parametrize("recipe", sorted(recipes()))
def test_every_key_that_composes_is_in_the_schema(recipe: str) -> None:
    from omegaconf import OmegaConf

    container = OmegaConf.to_container(load_config(recipe, ["rm=clip"]))
    assert isinstance(container, dict)
    for key in flatten({str(name): value for name, value in container.items()}):
        assert schema.kind_of(key, recipe) is not None, key


def test_the_documentations_tables_are_current() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    current = text.split("<!-- keys: begin -->\n")[1].split("<!-- keys: end -->")[0]
    assert current == tables(), "run: python -m nemo_aligner_diffusion.config.docs docs"


def test_the_schema_knows_the_names_the_code_knows() -> None:
    from nemo_aligner_diffusion.diffusion.schedule import SAMPLER_ALIASES, SAMPLERS, sampler_name
    from nemo_aligner_diffusion.training.optimizers import OPTIMIZER_NAMES
    from nemo_aligner_diffusion.training.schedules import SCHEDULE_NAMES

    assert {name.lower() for name in schema.SAMPLERS} == {*SAMPLERS, *SAMPLER_ALIASES}
    for name in schema.SAMPLERS:  # the spelling that the configuration keeps
        sampler_name(name)
    assert schema.OPTIMIZERS == OPTIMIZER_NAMES
    assert schema.SCHEDULES == SCHEDULE_NAMES


@pytest.mark.parametrize("name", sorted(rewards()))
def test_a_rewards_conf_file_shows_its_settings(name: str) -> None:
    """``conf/rm/<name>.yaml`` has exactly the reward's own settings, with their defaults and meanings."""
    kind = rewards()[name]
    shown = {**_file_keys(f"rm/{name}.yaml"), **_file_keys("rm/base.yaml")}
    shown = {key: value for key, value in shown.items() if key.split(".")[1] not in ("name", *kind.sections)}
    stated = {f"rm.{key}": field for key, (field, _) in kind.below().items()}
    stated |= {key: field for field, key in Augmentation.keys().items()}
    assert shown.keys() == stated.keys()
    for settings in (kind, Augmentation):
        for entry in dataclasses.fields(settings):
            if "kind" not in entry.metadata:
                continue
            default, meaning = shown[settings.keys()[entry.name]]
            assert meaning == entry.metadata["meaning"], entry.name
            given = yaml.safe_load(default)
            assert given == ("???" if entry.name in kind.needs else entry.default) or str(given) == entry.default
