"""Configuration: a recipe of ``conf/``, a user's own YAML over it, the command line over both; then checked.

Hydra's compose API reads the recipe and its groups; nothing is written, no folder is changed into. Layers are flat
mappings of dotted keys, so that every key of every layer goes through the same aliases and the same checks:

    groups  <  the checkpoint's family  <  recipe  <  the user's YAML (--config-path/--config-name)  <  command line

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

from nemo_aligner_diffusion.algorithms.registry import defaults, kind_of, reads
from nemo_aligner_diffusion.config.families import family_keys, family_layer, family_of
from nemo_aligner_diffusion.config.layers import (
    Layer,
    Override,
    command_line,
    file_layer,
    parse_override,
    read_sections,
)
from nemo_aligner_diffusion.config.recipes import FAMILY, conf_directory, groups, recipes
from nemo_aligner_diffusion.config.schema import REWARDS, vocabulary
from nemo_aligner_diffusion.config.words import settled
from nemo_aligner_diffusion.diffusion.recognition import EMBEDDED, recognise
from nemo_aligner_diffusion.diffusion.settings import WeightsSettings
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.keys import closest, flatten, unflatten
from nemo_aligner_diffusion.rewards.parts import PartedSettings
from nemo_aligner_diffusion.rewards.registry import read_reward
from nemo_aligner_diffusion.runtime.directory import CONFIG_FILE, checkpoint_files, resolve_run_directory
from nemo_aligner_diffusion.runtime.process import this_process
from nemo_aligner_diffusion.runtime.settings import RunDirectorySettings
from nemo_aligner_diffusion.training.settings import ModelSettings, RunSettings

logger = logging.getLogger(__name__)

_RESUMED = f"; resumed with the settings in its {CONFIG_FILE}"


def load_config(
    config_name: str,
    overrides: Sequence[str] = (),
    config_dir: str | os.PathLike[str] | None = None,
    recipe: str = "draftp_sd",
    fetch: bool = False,
) -> DictConfig:
    """Compose, translate and check a configuration.

    Args:
        config_name: a recipe's name, or with ``config_dir`` the name of a YAML file in it.
        overrides: ``key=value`` as on the command line; ``group=option`` picks a group's file.
        config_dir: folder of the user's own YAML. A file without ``defaults`` (NeMo's style) lies over a recipe: the
            one of the same name, or ``recipe``. A file with ``defaults`` may name the files of ``conf/`` too.
        recipe: the recipe under a user's YAML.
        fetch: a model of the hub that is not in the local cache may be asked what it is.

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
    keys, words = vocabulary(base), command_line(values)
    users = [] if own_folder is None else [_user_layer(own_folder, name, selections, tree)]

    def over(family: Layer, notes: dict[str, str] | None = None) -> dict[str, Any]:
        # of the groups that the command line picks only what a user's file may have set otherwise is left to say
        picked = [_selected_layer(item, base, own_folder, family) for item in selections if own_folder is not None]
        result = tree
        for layer in (family, _recipes_own(base), *users, *picked, words):
            result = keys.over(result, layer, notes)
        return result

    known = keys.values(over(family_layer("embedded")))  # but for numbers what it will be, whatever the family
    family, because = _chosen_family(known, fetch)
    notes: dict[str, str] = {}
    # model.algorithm=… alone leaves as it is what goes with the recipe's own method
    methods = [layer.leaves.get("model.algorithm") for layer in users if layer.composed]
    algorithm = settled(next(filter(None, methods), tree["model.algorithm"]))
    chosen = family_layer(family, algorithm, known)
    if known["model.peft.restore_from_path"] is not None:
        chosen.leaves["model.peft.lora_tuning.adapter_dim"] = None  # the file's, unless somebody says else
    if known["model.family"] is None or known["model.family_because"] is not None:  # the user names none
        because += _as_begun(chosen, known)
    complete = over(chosen, notes)
    complete |= {"model.family": family, "model.family_because": because}
    cfg = OmegaConf.create(unflatten(_methods_own(keys.values(complete))))
    settings = RunSettings.of(cfg)
    _check_reward(settings)
    notes |= _unread(words.leaves, settings)
    for section in [entry for entry in cfg.rm if entry not in ("name", *REWARDS[cfg.rm.name])]:
        del cfg.rm[section]  # left by the recipe when only rm.name is changed
    _warn(notes)
    _say_rate(chosen, settings.model)
    return cfg


def load_settings(
    config_name: str,
    overrides: Sequence[str] = (),
    config_dir: str | os.PathLike[str] | None = None,
    fetch: bool = False,
) -> RunSettings:
    """:func:`load_config`, as the objects that code takes."""
    return RunSettings.of(load_config(config_name, overrides, config_dir, fetch=fetch))


def _chosen_family(known: Mapping[str, Any], fetch: bool) -> tuple[str, str]:
    """The family whose settings hold, and why: what ``model.family`` says, else the checkpoint's."""
    if known["model.family"] is not None:
        because = known["model.family_because"] or "model.family says so"
        return known["model.family"], because.split(_RESUMED)[0]  # of the run whose file this one starts from
    return family_of(recognise(WeightsSettings.from_tree(unflatten(known)), fetch))


def _as_begun(family: Layer, known: Mapping[str, Any]) -> str:
    """Let a run that is resumed go on with what held for its family when it began: an earlier version may have known
    other numbers, or no families.

    Returns:
        what to add to why the family is chosen.
    """
    if not known["exp_manager.resume_if_exists"]:
        return ""
    tree: Any = OmegaConf.to_container(OmegaConf.create(unflatten(known)), resolve=True)
    folder = resolve_run_directory(RunDirectorySettings.from_tree(tree))
    if not checkpoint_files(folder / "checkpoints"):
        return ""
    try:
        begun = flatten(settled(read_sections(folder / CONFIG_FILE)))
    except ConfigurationError:  # of which the run will warn
        return ""
    values = {key: value for key, value in begun.items() if key in family_keys()}
    clipping = {key: value for key, value in begun.items() if re.fullmatch(r"trainer\.\w+\.gradient_clip_val", key)}
    if clipping:
        family.leaves.pop("model.gradient_clip_val", None)  # a family's word for it in the loop of any recipe
    changed = any(key not in family.leaves or family.leaves[key] != value for key, value in values.items())
    family.leaves.update(values | clipping)
    return _RESUMED if changed else ""


@functools.cache
def _recipes_own(name: str) -> Layer:
    """What a recipe's own file says."""
    content = read_sections(conf_directory() / f"{name}.yaml")
    content.pop("defaults", None)
    return Layer(flatten(content), f"{name}.yaml")


def _existing_folder(config_dir: str | os.PathLike[str]) -> Path:
    folder = Path(config_dir).expanduser().resolve()
    if not folder.is_dir():
        raise ConfigurationError(f"--config-path {str(config_dir)!r}: there is no such folder")
    return folder


def _is_selection(item: Override, own_folder: Path | None) -> bool:
    available = groups() if own_folder is None else {**groups(), **groups(own_folder)}
    return item.key in available and item.key != FAMILY and isinstance(item.value, str) and not item.delete


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


def _user_layer(folder: Path, name: str, selections: list[Override], recipe: Mapping[str, Any]) -> Layer:
    """What a user's file says; of what its ``defaults`` compose, what the ``recipe`` below has otherwise."""
    file = next((path for path in (folder / f"{name}.yaml", folder / f"{name}.yml") if path.is_file()), None)
    if file is None:
        there = sorted(path.stem for path in folder.glob("*.y*ml"))
        holds = f"it holds {', '.join(there)}" if there else "it holds no YAML file"
        raise ConfigurationError(f"--config-name {name!r}: there is no {name}.yaml in {folder}; {holds}")
    layer = file_layer(file)
    defaults = layer.leaves.pop("defaults", None)
    if defaults is not None:
        # Groups that the file itself composes are picked in it; others only in the recipe below it.
        inside = [item for item in selections if re.search(rf"(^|/|\s){item.key}\b", str(defaults))]
        composed = flatten(_compose(folder, name, [f"{item.key}={item.value}" for item in inside], conf_directory()))
        own = {key: value for key, value in layer.leaves.items() if settled(value) == composed.get(key)}
        other = {key: value for key, value in composed.items() if key not in recipe or recipe[key] != value}
        layer.composed = True
        layer.leaves = {**other, **own}  # the same values, with the words that they were written with
    return layer


def _selected_layer(item: Override, base: str, own_folder: Path, family: Layer) -> Layer:
    """What a picked group file says itself, as a layer; what the family says of it and of its section counts more."""
    leaves: dict[str, Any] = {}
    section = ""
    for stem in ("base", str(item.value)):
        files = [folder / item.key / f"{stem}.yaml" for folder in (own_folder, conf_directory())]
        file = next((file for file in files if file.is_file()), None)
        if file is not None:
            content = read_sections(file)
            content.pop("defaults", None)
            header = re.match(r"#\s*@package\s+(\S+)", file.read_text(encoding="utf-8"))
            package = header.group(1) if header else f"trainer.{base}" if item.key == "loop" else item.key
            section = f"{package}." if "." in package else ""  # not all of model, where methods stand
            leaves.update(flatten({package: content}, dotted=True))
    familys = {
        key: value for key, value in family.leaves.items() if key in leaves or (section and key.startswith(section))
    }
    return Layer(leaves | familys, origin=f"{item.key}={item.value}")


def _methods_own(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with every setting of the chosen method, and none of the others'."""
    algorithm = values["model.algorithm"]
    return {
        **{key: value for key, value in values.items() if reads(algorithm, key)},
        **{key: value for key, value in defaults(algorithm).items() if key not in values},
    }


def _check_reward(settings: RunSettings) -> None:
    """Raises :class:`ConfigurationError` for a reward that lacks a key, or has one that cannot act."""
    reward, _ = read_reward(settings.rm)
    kind, online = kind_of(settings.model.algorithm), settings.model.preference.pairs == "online"
    if not reward.measures and (kind != "preference" or online):
        which = " and pairs drawn online" if kind == "preference" else ""
        raise ConfigurationError(
            f"rm.name = none with {settings.model.given('algorithm')}{which}: expected a reward, which this learns "
            "from, or a method that learns from given pairs, such as dde"
        )
    if kind == "reward":
        for message in reward.without_gradient():
            raise ConfigurationError(message)
    measured = list(reward.measured()) if isinstance(reward, PartedSettings) else []
    if measured and settings.loop.val_check_interval == 0:
        raise ConfigurationError(
            f"{measured[0]}.normalize = base measures the base model's validation pictures, but val_check_interval = 0 "
            "says that there are none: expected val_check_interval >= 1, or numbers such as "
            f"{measured[0]}.normalize={{mean:20,std:1.5}}"
        )


def _unread(given: Mapping[str, Any], settings: RunSettings) -> dict[str, str]:
    """Settings of the command line that nothing reads beside the others, and why."""
    algorithm, reward, unread = settings.model.algorithm, settings.rm["name"], settings.unread_keys()
    notes = {}
    for key in given:
        if not reads(algorithm, key):
            notes[key] = f"model.algorithm={algorithm} does not read it"
        elif key.startswith("rm.") and key.split(".")[1] not in ("name", *REWARDS[reward]):
            notes[key] = f"rm.name={reward} does not read it"
        elif key in unread and given[key] is not None:
            notes[key] = unread[key]
    return notes


def _say_rate(family: Layer, section: ModelSettings) -> None:
    """A rate that was published for all weights and a batch of pairs does not follow the batch by itself."""
    batch, rate = (family.leaves.get(key) for key in ("model.global_batch_size", "model.optim.lr"))
    if kind_of(section.algorithm) != "preference" or section.peft.is_lora or section.family == EMBEDDED:
        return
    if batch not in (None, section.global_batch_size) and section.optim.lr == rate and this_process().is_rank_zero:
        logger.warning(
            "model.optim.lr = %g is published for %d pairs a step; for model.global_batch_size = %d its rule (%g for "
            "each pair) gives model.optim.lr=%g",
            *(rate, batch, section.global_batch_size, rate / batch, section.global_batch_size * rate / batch),
        )


def _warn(notes: Mapping[str, str]) -> None:
    """One warning for all, keys with the same reason together, from the first process only."""
    if not notes or not this_process().is_rank_zero:
        return
    lines = [
        textwrap.fill(f"{', '.join(key for key in notes if notes[key] == reason)}: {reason}", 120,
                      initial_indent="  ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
        for reason in dict.fromkeys(notes.values())
    ]  # fmt: skip
    logger.warning("these keys have no effect here:\n%s", "\n".join(lines))
