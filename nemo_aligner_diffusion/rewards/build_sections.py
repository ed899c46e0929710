"""Reading a section of the ``rm`` configuration: what every kind of reward needs of it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.rewards.base import Reward


@dataclass(frozen=True)
class Section:
    """The settings of one reward, null entries left out.

    Attributes:
        settings: its keys, which are known already.
        where: its place in the configuration, such as ``rm.parts.clip``.
        device, dtype: where and in what its networks compute.
        build: makes a reward of a section below this one.
    """

    settings: Mapping[str, Any]
    where: str
    device: str | torch.device
    dtype: torch.dtype
    build: Callable[[dict[str, Any], str], Reward]

    def model(self, known: Collection[str]) -> dict[str, Any]:
        """The section ``model``, its keys and ``micro_batch_size`` checked."""
        where = f"{self.where}.model"
        model = without_nulls(self.settings.get("model"), where)
        # false switches nothing on: a schema's default is no wish of the user's
        check_keys({key: value for key, value in model.items() if value is not False}, known, where)
        micro_batch_size = model.get("micro_batch_size")
        if micro_batch_size is not None and (not isinstance(micro_batch_size, int) or micro_batch_size < 1):
            raise ConfigurationError(
                f"{where}.micro_batch_size={micro_batch_size!r}; expected at least 1, or null for all."
            )
        return model

    def needed(self, key: str, example: str) -> Any:
        """A key that the reward cannot do without."""
        value = self.settings.get(key)
        if value is None:
            raise ConfigurationError(
                f"{self.where}.name={self.settings.get('name')} needs {self.where}.{key}, e.g. {example}."
            )
        return value

    def given(self, *keys: str) -> dict[str, Any]:
        """Those of ``keys`` that are there."""
        return {key: self.settings[key] for key in keys if key in self.settings}


def without_nulls(section: Any, where: str) -> dict[str, Any]:
    """A copy without null entries: a schema that lists every key must not differ from one that leaves them out."""
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise ConfigurationError(f"{where}={section!r}; expected a section with keys.")
    return {str(key): value for key, value in section.items() if value is not None}


def says_something(value: Any) -> bool:
    """False for null and for sections that hold nothing but null: a schema's blanks are no wish of the user's."""
    return any(map(says_something, value.values())) if isinstance(value, Mapping) else value is not None


def check_keys(section: Mapping[str, Any], known: Collection[str], where: str) -> None:
    for key in section:
        if key not in known:
            raise ConfigurationError(f"{where}.{key} is no key of the reward. {nearest(key, known)}")


def nearest(name: object, known: Collection[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return (f"Nearest is {close[0]!r}; k" if close else "K") + f"nown are: {', '.join(known)}."
