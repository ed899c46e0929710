"""Configuration: a recipe of ``conf/``, a user's own YAML over it, the command line over both; then checked.

Hydra's compose API reads the recipe and its groups; nothing is written, no folder is changed into. Layers are flat
mappings of dotted keys, so that every key of every layer goes through the same aliases and the same checks:

    recipe  <  the user's YAML (--config-path/--config-name)  <  the command line

Imports neither torch nor Lightning: a configuration error costs well under a second.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_aligner_diffusion.algorithms.registry import defaults, reads
from nemo_aligner_diffusion.config import schema
from nemo_aligner_diffusion.config.layers import (
    Layer,
    Note,
    Override,
    add_layer,
    parse_override,
)
from nemo_aligner_diffusion.config.recipes import conf_directory, groups, recipes
from nemo_aligner_diffusion.config.reward_checks import check_reward
from nemo_aligner_diffusion.config.reward_keys import REWARDS
from nemo_aligner_diffusion.config.words import is_secret, of_the_environment, with_yaml_words
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.formats.yaml_reader import read_yaml
from nemo_aligner_diffusion.keys import closest, flatten, unflatten
from nemo_aligner_diffusion.runtime.process import this_process
from nemo_aligner_diffusion.settings import ANY
from nemo_aligner_diffusion.training.settings import RunSettings

logger = logging.getLogger(__name__)


def load_config(
    config_name: str,
    overrides: Sequence[str] = (),
    config_dir: str | os.PathLike[str] | None = None,
    recipe: str = "draftp_sd",
) -> DictConfig:
    """Compose, translate and check a configuration.

    Args:
        config_name: a recipe's name, or with ``config_dir`` the name of a YAML file in it.
        overrides: ``key=value`` as on the command line; ``group=option`` picks a group's file.
        config_dir: folder of the user's own YAML. A file without ``defaults`` (NeMo's style) lies over a recipe: the
            one of the same name, or ``recipe``. A file with ``defaults`` may name the files of ``conf/`` too.
        recipe: the recipe under a user's YAML.

    Returns:
        The resolved, complete configuration with the canonical keys only. Texts of the environment
        (``${oc.env:TOKEN}``) alone stay references, so that ``--cfg`` and ``config.yaml`` do not show them.

    Raises:
        ConfigurationError: a key or value cannot be used; one clear message.
    """
    parsed = [parse_override(text) for text in overrides]
    name = config_name.removesuffix(".yaml").removesuffix(".yml")
    own_folder = None if config_dir is None else _existing_folder(config_dir)
    base = name if own_folder is None or name in recipes() else recipe
    if base not in recipes():
        raise ConfigurationError(
            f"--config-name {base!r}: no such recipe{closest(base, recipes())}; there are {', '.join(recipes())}. "
            "For a YAML of your own add --config-path <its folder>"
        )
    selections = [item for item in parsed if _is_selection(item, own_folder)]
    values = [item for item in parsed if item not in selections]

    tree = flatten(_compose(conf_directory(), base, [_selection(item, base) for item in selections], own_folder))
    loop = base
    notes: list[Note] = []
    if own_folder is not None:
        user = _read_user_file(own_folder, name, selections)
        tree = add_layer(tree, Layer(flatten(user), origin=str(own_folder / f"{name}.yaml")), loop, recipes(), notes)
        for item in selections:  # the command line counts more than the file
            tree = add_layer(tree, _selected_layer(item, base, own_folder), loop, recipes(), notes)
    command_line = Layer({}, origin="command line")
    for item in values:
        if item.delete:
            command_line.deletions.append(item.key)
        else:
            command_line.leaves.update(flatten({item.key: item.value}, dotted=True))
    tree = add_layer(tree, command_line, loop, recipes(), notes)

    leaves = resolve(tree)
    leaves = {key: value for key, value in leaves.items() if schema.kind_of(key, loop) is not None}
    used = _methods_own(schema.read_values(leaves, loop))
    used |= {
        key: text
        for key, text in of_the_environment(tree).items()
        if key in used and is_secret(schema.kind_of(key, loop) or ANY)
    }
    cfg = OmegaConf.create(unflatten(used))
    settings = RunSettings.of(cfg)
    check_reward(cfg)
    notes.extend(_unread(command_line.leaves, settings))
    for section in [entry for entry in cfg.rm if entry not in ("name", *REWARDS[cfg.rm.name])]:
        del cfg.rm[section]  # left by the recipe when only rm.name is changed
    _warn(notes)
    return cfg


def load_settings(
    config_name: str,
    overrides: Sequence[str] = (),
    config_dir: str | os.PathLike[str] | None = None,
    recipe: str = "draftp_sd",
) -> RunSettings:
    """:func:`load_config`, as the objects that code takes."""
    return RunSettings.of(load_config(config_name, overrides, config_dir, recipe))


def _existing_folder(config_dir: str | os.PathLike[str]) -> Path:
    folder = Path(config_dir).expanduser().resolve()
    if not folder.is_dir():
        raise ConfigurationError(f"--config-path {str(config_dir)!r}: there is no such folder")
    return folder


def _is_selection(item: Override, own_folder: Path | None) -> bool:
    available = groups() if own_folder is None else {**groups(), **groups(own_folder)}
    return item.key in available and isinstance(item.value, str) and not item.delete


def _selection(item: Override, base: str) -> str:
    key = f"loop@trainer.{base}" if item.key == "loop" else item.key
    return f"{key}={item.value}"


def _compose(folder: Path, name: str, overrides: Sequence[str], beside: Path | None) -> dict[str, Any]:
    """Hydra's compose; ``beside`` is searched too. Our own files are composed once per process: it takes a tenth of a
    second, and sweeps and tests load many configurations."""
    compose = _compose_once if beside is None else _compose_once.__wrapped__
    return copy.deepcopy(compose(folder, name, tuple(overrides), beside))


@functools.lru_cache(maxsize=64)
def _compose_once(folder: Path, name: str, overrides: tuple[str, ...], beside: Path | None) -> dict[str, Any]:
    from hydra import compose, initialize_config_dir  # here: `--help` needs no hydra
    from hydra.errors import HydraException

    search = [f"hydra.searchpath=['file://{beside}']"] if beside is not None else []
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            composed = compose(name, overrides=[*search, *overrides])
        container = OmegaConf.to_container(composed, resolve=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigurationError(_one_line(error, overrides)) from error
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _one_line(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's and OmegaConf's many lines as one."""
    text = str(error)
    missing = re.search(r"Could not find '([^']+)'", text)
    if missing and "/" in missing.group(1):
        group, option = missing.group(1).rsplit("/", 1)
        options = groups().get(group, [])
        if options:
            own = f"; your own goes in model.algorithm={option}" if group == "algorithm" and ":" in option else ""
            return (
                f"{group}={option}: no such file in the group{closest(option, options)}{own}; there are "
                f"{', '.join(options)}"
            )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    kept = [
        line for line in lines if not line.startswith(("full_key", "object_type", "Config search path", "provider="))
    ]
    given = f" (given: {' '.join(overrides)})" if overrides else ""
    return "the configuration cannot be composed: " + " ".join(kept[:3]) + given


def read_sections(file: Path) -> tuple[dict[str, Any], str]:
    """What a YAML file of the user's says, and its text, for the words as they were typed.

    Raises:
        ConfigurationError: it cannot be read, is no YAML, or holds no keys.
    """
    try:
        container = read_yaml(file)
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigurationError(f"{file} {error}") from error
    if not isinstance(container, dict):
        raise ConfigurationError(f"{file}: expected keys and values, found {type(container).__name__}")
    return container, text


def _read_user_file(folder: Path, name: str, selections: list[Override]) -> dict[str, Any]:
    file = next((path for path in (folder / f"{name}.yaml", folder / f"{name}.yml") if path.is_file()), None)
    if file is None:
        there = sorted(path.stem for path in folder.glob("*.y*ml"))
        holds = f"it holds {', '.join(there)}" if there else "it holds no YAML file"
        raise ConfigurationError(f"--config-name {name!r}: there is no {name}.yaml in {folder}; {holds}")
    container, text = read_sections(file)
    if "defaults" not in container:
        return {str(key): value for key, value in with_yaml_words(container, text).items()}
    # Groups that the file itself composes are picked in it; others only in the recipe below it.
    inside = [item for item in selections if re.search(rf"(^|/|\s){item.key}\b", str(container["defaults"]))]
    composed = _compose(folder, name, [f"{item.key}={item.value}" for item in inside], conf_directory())
    return with_yaml_words(composed, text)


def _selected_layer(item: Override, base: str, own_folder: Path) -> Layer:
    """What a picked group file says itself, as a layer."""
    leaves: dict[str, Any] = {}
    option = str(item.value)
    for stem in ("base", option):
        for folder in (own_folder, conf_directory()):
            file = folder / item.key / f"{stem}.yaml"
            if file.is_file():
                text = file.read_text(encoding="utf-8")
                header = re.match(r"#\s*@package\s+(\S+)", text)
                package = header.group(1) if header else f"trainer.{base}" if item.key == "loop" else item.key
                content = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
                assert isinstance(content, dict)
                content.pop("defaults", None)
                leaves.update(flatten({package: with_yaml_words(content, text)}, dotted=True))
                break
    return Layer(leaves, origin=f"{item.key}={option}")


def resolve(tree: Mapping[str, Any]) -> dict[str, Any]:
    """``tree`` with references such as ``${name}`` resolved.

    Raises:
        ConfigurationError: one of them leads nowhere, or a value that has to be given is not.
    """
    cfg = OmegaConf.create(unflatten(tree))
    missing = [key for key, value in tree.items() if value == "???"]
    if missing:
        page = "rewards.md" if missing[0].startswith("rm.") else "configuration.md"
        raise ConfigurationError(
            f"{' and '.join(missing)} must be given, as {' '.join(f'{key}=…' for key in missing)}: there is no default "
            f"(docs/{page} explains)"
        )
    for key, value in tree.items():
        if isinstance(value, str) and "${" in value:
            try:
                OmegaConf.select(cfg, key, throw_on_resolution_failure=True)
            except OmegaConfBaseException as error:
                reason = str(error).splitlines()[0]
                raise ConfigurationError(f"{key} = {value!r} cannot be resolved: {reason}") from error
    try:
        container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigurationError(f"the configuration cannot be resolved: {str(error).splitlines()[0]}") from error
    assert isinstance(container, dict)
    return flatten({str(key): value for key, value in container.items()})


def _methods_own(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with every setting of the chosen method, and none of the others'."""
    algorithm = values["model.algorithm"]
    return {
        **{key: value for key, value in values.items() if reads(algorithm, key)},
        **{key: value for key, value in defaults(algorithm).items() if key not in values},
    }


def _unread(given: Mapping[str, Any], settings: RunSettings) -> list[Note]:
    """Settings of the command line that nothing reads beside the others."""
    algorithm, reward, unread = settings.model.algorithm, settings.rm["name"], settings.unread_keys()
    notes = []
    for key in given:
        if not reads(algorithm, key):
            notes.append(Note(key, f"model.algorithm={algorithm} does not read it"))
        elif key.startswith("rm.") and key.split(".")[1] not in ("name", *REWARDS[reward]):
            notes.append(Note(key, f"rm.name={reward} does not read it"))
        elif key in unread and given[key] is not None:
            notes.append(Note(key, unread[key]))
    return notes


def _warn(notes: Sequence[Note]) -> None:
    """One warning for all, keys with the same reason together, from the first process only."""
    if not notes or not this_process().is_rank_zero:
        return
    by_reason: dict[str, list[str]] = {}
    for note in dict.fromkeys(notes):
        by_reason.setdefault(note.reason, []).append(note.key)
    lines = [
        textwrap.fill(f"{', '.join(keys)}: {reason}", 120, initial_indent="  ", subsequent_indent="    ",
                      break_long_words=False, break_on_hyphens=False)
        for reason, keys in by_reason.items()
    ]  # fmt: skip
    logger.warning("these keys have no effect here:\n%s", "\n".join(lines))
