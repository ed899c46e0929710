"""Networks out of fields and tensors that come from elsewhere, nothing taken on trust."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nemo_aligner_diffusion.errors import AlignerError, ArchiveError, first_line, printable
from nemo_aligner_diffusion.formats.nemo import NemoArchive

_MOST_LISTED = 8
_Model = TypeVar("_Model", bound=nn.Module)


def filled(
    build: Callable[[], _Model],
    state: Mapping[str, Tensor],
    origin: object,
    error: type[AlignerError] = ArchiveError,
    remedy: str = "Save the archive again from a working model.",
    stored_name: Callable[[str], str] = lambda key: key,
) -> _Model:
    """The model that ``build()`` makes, holding ``state``.

    It is built on the meta device, and its tensors are compared by name and shape with those at hand before these are
    put in place: no memory for a model that does not fit, no random weights, no second copy of any.

    Args:
        origin, remedy: where fields and tensors come from, and what to do, for messages.
        stored_name: of the model's key, what ``state`` calls the tensor.

    Raises:
        AlignerError: of the kind ``error``: there is no such model, or ``state`` is not exactly its tensors.
    """
    try:
        with torch.device("meta"):
            model = build()
    # transformers and torch raise their own errors, and plain ones, for sizes they cannot build a model from.
    except Exception as problem:
        raise error(
            f"{origin}: no network can be built with this architecture ({type(problem).__name__}: "
            f"{first_line(problem)}). {remedy}"
        ) from problem
    state = stored_tensors(state)
    keys = {stored_name(key): key for key in stored_tensors(model.state_dict())}
    expected = {name: model.state_dict()[key] for name, key in keys.items()}
    if found := _misfits(state, expected):
        raise error(
            f"{origin}: {found} do not fit its architecture: weights and configuration must come from the same model. "
            f"{remedy}"
        )
    model.load_state_dict({key: state[name] for name, key in keys.items()}, strict=False, assign=True)
    for module in model.modules():  # constants that no state dict holds, still on the meta device
        positions = getattr(module, "position_ids", None)
        if isinstance(positions, Tensor):
            module.position_ids = torch.arange(positions.shape[-1]).expand((1, -1))
    return model


def stored_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` without position numbers, which some versions of transformers save and others compute."""
    kept = {key: value for key, value in state.items() if not key.endswith("position_ids")}
    if "logit_scale" in kept and kept["logit_scale"].numel() == 1:
        kept["logit_scale"] = kept["logit_scale"].reshape(())  # saved as (1,) by some
    return kept


def _misfits(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
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


def mapping(archive: NemoArchive, config: Mapping[str, Any], key: str, optional: bool = False) -> Mapping[str, Any]:
    """The section ``key`` of an archive's configuration; ``{}`` for an optional one that is not there."""
    value = config.get(key)
    if value is None and optional:
        return {}
    if not isinstance(value, Mapping):
        raise ArchiveError(
            f"{archive.path}: its model_config.yaml has {key} = {json.dumps(value, default=str)[:100]}; "
            "expected a mapping of fields."
        )
    return value
