"""What every restorer checks before it believes an archive."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nemo_aligner_diffusion.errors import ArchiveError, printable
from nemo_aligner_diffusion.formats.nemo import NemoArchive

_MOST_LISTED = 8


def check_fit(archive: NemoArchive, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises :class:`ArchiveError`, naming the tensors, unless ``state`` holds exactly what ``expected`` does."""
    if found := misfits(state, expected):
        raise ArchiveError(
            f"{archive.path}: {found} do not fit its model_config.yaml. "
            "Weights and configuration must come from the same model."
        )


def misfits(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """``"2 tensors (a is …; b is missing)"`` where ``state`` isn't ``expected`` by name and shape, else ``""``."""
    found = [
        f"{key} is {tuple(state[key].shape)} and should be {tuple(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    found += [f"{key} {tuple(expected[key].shape)} is missing" for key in expected if key not in state]
    found += [f"{printable(key)} {tuple(state[key].shape)} has no place" for key in state if key not in expected]
    found += [
        f"{key} holds {state[key].dtype}, not floating-point numbers"
        for key in expected
        if key in state and not state[key].is_floating_point()
    ]
    more = f"; and {len(found) - _MOST_LISTED} more" if len(found) > _MOST_LISTED else ""
    return f"{len(found)} tensors ({'; '.join(found[:_MOST_LISTED])}{more})" if found else ""


def mapping(
    archive: NemoArchive, config: Mapping[str, Any], key: str, prefix: str = "", optional: bool = False
) -> Mapping[str, Any]:
    """The section ``key`` of an archive's configuration; ``{}`` for an optional one that is not there."""
    value = config.get(key)
    if value is None and optional:
        return {}
    if not isinstance(value, Mapping):
        raise ArchiveError(
            f"{archive.path}: its model_config.yaml has {prefix}{key} = {json.dumps(value, default=str)[:100]}; "
            "expected a mapping of fields."
        )
    return value
