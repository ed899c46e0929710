"""What every configuration key accepts, gathered from the classes of settings. Defaults live in ``conf/``, too.

A key is written dotted. ``trainer.<loop>.x`` stands for the training loop's section, which carries the recipe's name
(``trainer.draftp_sd.x`` in ``draftp_sd.yaml``). A ``*`` at the end stands for anything below.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_aligner_diffusion.algorithms.registry import method_keys
from nemo_aligner_diffusion.config.reward_keys import REWARD_KEYS
from nemo_aligner_diffusion.settings import LOOP, Kind
from nemo_aligner_diffusion.training.settings import RunSettings

KEYS: dict[str, Kind] = {**RunSettings.schema(), **method_keys(), **REWARD_KEYS}


def kind_of(key: str, loop: str) -> Kind | None:
    """The kind of a dotted key, None for a key the schema does not know. ``loop``: name of the loop's section."""
    if key.startswith(f"trainer.{loop}."):
        key = f"trainer.{LOOP}." + key.removeprefix(f"trainer.{loop}.")
    if key in KEYS:
        return KEYS[key]
    for pattern, kind in KEYS.items():
        if pattern.endswith(".*") and (key.startswith(pattern[:-1]) or key == pattern[:-2]):
            return kind
    return None


def known_keys(loop: str) -> list[str]:
    """Every key, with the loop's section under its own name; sections of free content end in ``*``."""
    return [key.replace(LOOP, loop) for key in KEYS]


def is_section(key: str, loop: str) -> bool:
    return any(known.startswith(key + ".") for known in known_keys(loop))


def is_free_section(key: str) -> bool:
    """Whether anything may stand below ``key`` (an empty mapping is then a value)."""
    return f"{key}.*" in KEYS


def read_values(leaves: Mapping[str, Any], loop: str) -> dict[str, Any]:
    """Check every leaf against its kind and return it converted. Keys are known already.

    Raises:
        ConfigurationError: for the first value that is not what its key accepts.
    """
    result: dict[str, Any] = {}
    for key, value in leaves.items():
        kind = kind_of(key, loop)
        assert kind is not None, key
        result[key] = kind.read(key, value)
    return result
