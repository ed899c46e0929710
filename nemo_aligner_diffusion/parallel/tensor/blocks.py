"""One cut part of a model, as a plan describes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_aligner_diffusion.errors import ConfigurationError

Shares = int | tuple[int, ...]  # see :class:`.TensorCut`: of how many equal blocks, or of blocks in which proportions


@dataclass(frozen=True)
class Block:
    """One cut part of a model, from its column layers to its row layers. Names are relative to ``path``.

    Attributes:
        path: the module, relative to the model.
        divides: what must divide by the size of the group: its name in words and its number.
        columns: layers cut over their outputs, and the blocks that those are made of.
        rows: layers cut over their inputs, likewise; each ends the cut part with one all-reduce. None: an enclosing
            block has the row layer.
        norms: group norms in between, cut over their groups.
        dropouts: dropouts in between, and the dimension along which their input is cut.
        counts: attributes of the module to divide by the size.
        shared_inputs: arguments of the module, in its order, that the columns and nothing else read: their gradients
            are summed over the group once instead of once a column.
        partial: modules in between that are whole on every rank and that each rank calls for its own part, such as a
            norm of one head: the gradients of their weights are to be summed.
    """

    path: str
    divides: Mapping[str, int]
    columns: Mapping[str, Shares]
    rows: Mapping[str, Shares]
    norms: tuple[str, ...] = ()
    dropouts: Mapping[str, int] = field(default_factory=dict)
    counts: tuple[str, ...] = ()
    shared_inputs: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()


def base_layer(module: Any) -> Any:
    """The layer itself where an adapter wraps it."""
    return getattr(module, "base_layer", module)


def refuse(path: str, reasons: Mapping[str, bool]) -> None:
    """Raise a :class:`.ConfigurationError` that names the reasons that hold, if any does."""
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ConfigurationError(f"{path} cannot be cut, for {', '.join(found)}")
