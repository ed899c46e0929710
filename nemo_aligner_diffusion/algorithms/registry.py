"""Finds the methods: every module of these packages is looked through, so that a new one is a new file. No torch."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_aligner_diffusion.algorithms.base import CUSTOM_SECTION, TrainingMethod
from nemo_aligner_diffusion.algorithms.custom import is_import_path, load_method
from nemo_aligner_diffusion.settings import ANY, Kind

_ALGORITHMS = "nemo_aligner_diffusion.algorithms"
# Packages of methods -> their modules that hold none; importing those may be slow.
_PACKAGES: dict[str, set[str]] = {
    _ALGORITHMS: {"base", "custom", "picture_validation", "registry", "reward_tuning", "settings", "tuning"},
    f"{_ALGORITHMS}.preference": {"base", "corrections", "loss", "module", "self_made", "watch"},
    f"{_ALGORITHMS}.policy": {"advantages", "module"},
}


@functools.cache
def methods() -> dict[str, type[TrainingMethod]]:
    """``model.algorithm`` -> the class of its settings, in the order of the files' names."""
    found: dict[str, type[TrainingMethod]] = {}
    for package, others in _PACKAGES.items():
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            if module.ispkg or module.name in others:
                continue
            path = f"{package}.{module.name}"
            for entry in vars(importlib.import_module(path)).values():
                if isinstance(entry, type) and issubclass(entry, TrainingMethod) and entry.__module__ == path:
                    found[entry.name] = entry
    return found


def method_of(cfg: Mapping[str, Any]) -> TrainingMethod:
    """The method of ``model.algorithm`` with its settings; a user's own module is imported for it.

    Args:
        cfg: a whole configuration.

    Raises:
        ConfigurationError: a user's own cannot be imported or made, or refuses its settings.
    """
    tree: Any = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else cfg
    name = tree["model"]["algorithm"]
    if is_import_path(name):
        return load_method(name, tree["model"].get(CUSTOM_SECTION))
    return methods()[name].from_tree(tree)


@functools.cache
def method_keys() -> dict[str, Kind]:
    """Dotted key -> kind, of every method."""
    keys: dict[str, Kind] = {}
    for method in methods().values():
        keys |= method.schema()
    return {**keys, f"model.{CUSTOM_SECTION}.*": ANY}


def reads(algorithm: str, key: str) -> bool:
    """Whether ``algorithm`` reads ``key``; true of every key that is no method's own, but for what its kind has no use
    for."""
    if key.startswith(f"model.{CUSTOM_SECTION}."):
        return is_import_path(algorithm)
    if algorithm in methods() and key in methods()[algorithm].ignored:
        return False
    if key.startswith("model.preference."):
        return algorithm in methods() and methods()[algorithm].kind == "preference"
    return key not in method_keys() or (algorithm in methods() and key in methods()[algorithm].keys().values())


def defaults(algorithm: str) -> dict[str, Any]:
    """Dotted key -> default, of one method's own settings; empty for a user's own method."""
    if algorithm not in methods():
        return {}
    method = methods()[algorithm]
    values = method.defaults()
    return {key: _as_list(values[field]) for field, key in method.keys().items()}


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def kind_of(algorithm: str) -> str:
    """See :class:`.base.TrainingMethod`; a user's own method learns by the reward's gradient."""
    return methods()[algorithm].kind if algorithm in methods() else "reward"


def title_of(algorithm: str) -> str:
    """The name people use; of a user's own method its name, without the module."""
    if algorithm in methods():
        return methods()[algorithm].title
    return algorithm.rpartition(":")[2]
