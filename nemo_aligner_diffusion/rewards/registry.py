"""Finds the rewards: every module of this package is looked through, so that a new one is a new file. No torch."""

from __future__ import annotations

import functools
import importlib
import logging
import pkgutil
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.keys import closest, flatten
from nemo_aligner_diffusion.rewards.augmentation import Augmentation
from nemo_aligner_diffusion.rewards.settings import RewardSettings
from nemo_aligner_diffusion.settings import ANY, Kind, choice

if TYPE_CHECKING:
    import torch

    from nemo_aligner_diffusion.rewards.base import Reward

logger = logging.getLogger(__name__)

_PACKAGE = "nemo_aligner_diffusion.rewards"
# Modules of the package that hold no reward; importing them may be slow.
_OTHERS = {"base", "convert", "registry", "settings"}
_AUGMENT = {key.removeprefix("rm."): (field, Augmentation.kinds()[field]) for field, key in Augmentation.keys().items()}


@functools.cache
def rewards() -> dict[str, type[RewardSettings]]:
    """``rm.name`` -> the class of its settings."""
    found: dict[str, type[RewardSettings]] = {}
    for module in pkgutil.iter_modules(importlib.import_module(_PACKAGE).__path__):
        if module.name not in _OTHERS and not module.ispkg:
            path = f"{_PACKAGE}.{module.name}"
            for entry in vars(importlib.import_module(path)).values():
                if isinstance(entry, type) and issubclass(entry, RewardSettings) and entry.__module__ == path:
                    found[entry.name] = entry
    return {name: found[name] for name in sorted(found) if name}  # those without a name are bases of others


def reward_keys() -> dict[str, Kind]:
    """Dotted key -> kind, of every reward."""
    keys: dict[str, Kind] = {"rm.name": choice(*rewards())}
    for reward in rewards().values():
        for key, (_, kind) in reward.below().items():
            # where two rewards mean different things by one key, the one that is chosen reads it
            keys[f"rm.{key}"] = kind if keys.get(f"rm.{key}", kind) == kind else ANY
        keys |= {f"rm.{section}.*": ANY for section in reward.free}
    return {**keys, **{f"rm.{key}": kind for key, (_, kind) in _AUGMENT.items()}}


def sections_of(name: str) -> set[str]:
    """The entries of ``rm`` that a reward reads."""
    return {key.partition(".")[0] for key in rewards()[name].below()} | {"augment", *rewards()[name].free}


def read_reward(
    section: Any, where: str = "rm", name: str = "clip", part_keys: tuple[str, ...] | None = None
) -> tuple[RewardSettings, list[str]]:
    """The reward that a section describes, and the keys that it does not read.

    Args:
        section: a mapping; null entries are defaults.
        where: its place in the configuration.
        name: taken where the section gives none.
        part_keys: of a part of another reward, the keys that may stand beside the reward's own; a part reads every key.

    Raises:
        ConfigurationError: an unknown reward or key (the nearest is named), an impossible value, or one that is needed.
    """
    if section is not None and not isinstance(section, Mapping):
        raise ConfigurationError(f"{where} = {section!r}: expected a section with keys, such as {{name: clip}}")
    given = dict(section or {})
    name = given.pop("name", None) or name
    if name not in rewards():
        raise ConfigurationError(
            f"{where}.name = {name!r}: expected one of {', '.join(rewards())}{closest(str(name), rewards())}"
        )
    kind = rewards()[name]
    values: dict[str, Any] = {}
    for section_name, field in kind.free.items():
        values[field] = kind.read_section(given.pop(section_name, None), f"{where}.{section_name}")
    known, augment, unread = kind.below(), {}, []
    for key, value in flatten(given).items():
        if value is None or value == {}:
            continue
        if key in _AUGMENT:
            field, reader = _AUGMENT[key]
            augment[field] = reader.read(f"{where}.{key}", value)
        elif part_keys is not None and key == "trainer.precision":
            raise ConfigurationError(f"{where}.{key}: all parts compute alike; set rm.trainer.precision")
        elif key in known:
            field, reader = known[key]
            values[field] = reader.read(f"{where}.{key}", value)
        else:
            _check_unread(where, kind, key, value, part_keys)
            unread.append(f"{where}.{key}")
    settings = kind(augment=Augmentation(**augment), **values)
    settings.check(where)
    return settings, unread


def _check_unread(where: str, kind: type[RewardSettings], key: str, value: Any, part_keys: Any) -> None:
    """Raises :class:`ConfigurationError` for a key that this reward does not read, unless another one does."""
    others = reward_keys()
    free = any(known.endswith(".*") and f"rm.{key}.".startswith(known[:-1]) for known in others)
    if part_keys is not None or not (f"rm.{key}" in others or free):
        known = [*(part_keys or ("name",)), *kind.below(), *_AUGMENT, *kind.free]
        if any(name.startswith(f"{key}.") for name in known):
            raise ConfigurationError(f"{where}.{key} = {value!r}: expected a section with keys")
        hint = closest(key, known) or f"; {kind.name} reads {', '.join(known)}"
        raise ConfigurationError(f"unknown key {f'{where}.{key}'!r}{hint}")
    if key in ("model.restore_from_path", "model.from_pretrained"):
        readers = [name for name, other in rewards().items() if key in other.below()]
        raise ConfigurationError(
            f"{where}.{key} = {value!r} with {where}.name = {kind.name}, which restores no file of this kind: expected "
            f"{where}.name={' or '.join(readers)}, or no path. A folder of a CLIP-like model becomes a .nemo by "
            "examples/mm/clip/convert_reward_to_nemo.py"
        )
    if not free:
        others[f"rm.{key}"].read(f"{where}.{key}", value)


def build_reward(config: Mapping[str, Any] | Any | None = None, device: str | torch.device = "cpu") -> Reward:
    """The reward that ``config`` describes.

    ``rm.name=custom`` imports and runs the Python code that ``rm.import_path`` names: give only a configuration that
    the user wrote, and see :func:`import_paths` for one that came from elsewhere.

    Args:
        config: the ``rm`` section, a mapping or a ``DictConfig``: its keys are in the files of ``conf/rm``; ``None`` or
            ``{}`` is the embedded CLIP reward.
        device: where it computes, in ``rm.trainer.precision``.

    Raises:
        ConfigurationError: an unknown reward or key (the nearest known one is named), or an impossible value.
        RewardError: a model or a custom reward cannot be used.
        ArchiveError: the ``.nemo`` file is unusable.
    """
    from omegaconf import OmegaConf

    settings, unread = read_reward(
        OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
    )
    for key in unread:
        logger.warning("%s has no effect here: the reward %r does not use it", key, settings.name)
    return settings.build(device)


def import_paths(config: Any, where: str = "rm") -> Iterator[tuple[str, str]]:
    """``(key, value)`` of every import path in an ``rm`` section: code that building it would run."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            if key == "import_path" and value is not None:
                yield f"{where}.{key}", str(value)
            else:
                yield from import_paths(value, f"{where}.{key}")
