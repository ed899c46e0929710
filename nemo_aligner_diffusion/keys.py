"""Dotted keys: nested mappings flattened, and what somebody who misspelt one may have meant. Imports nothing heavy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from nemo_aligner_diffusion.errors import ConfigurationError


def flatten(tree: Mapping[str, Any], dotted: bool = False) -> dict[str, Any]:
    """Nested mappings as ``{dotted key: value}``; lists and empty mappings are values.

    ``dotted``: the keys of the outermost mapping may contain dots, as those of the command line do.
    """
    leaves: dict[str, Any] = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for key, below in value.items():
                visit(f"{prefix}.{key}" if prefix else str(key), below)
        else:
            leaves[prefix] = value

    for key, value in tree.items():
        if not dotted and "." in str(key):
            raise ConfigurationError(f"key {key!r} in YAML: write the sections indented, not with dots")
        visit(str(key), value)
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`flatten`."""
    tree: dict[str, Any] = {}
    for key, value in leaves.items():
        *sections, last = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return tree


def closest(wrong: str, known: Iterable[str], least: float = 0.7) -> str:
    """``; did you mean …?`` with up to three names, or nothing. A dotted key is also compared by its last parts.

    Args:
        least: likeness of the best, in [0, 1].
    """

    def alike(one: str, other: str) -> float:
        return difflib.SequenceMatcher(None, one.lower(), other.lower()).ratio()

    def likeness(candidate: str) -> float:
        tail = ".".join(candidate.split(".")[-wrong.count(".") - 1 :])
        last = alike(wrong.split(".")[-1], candidate.split(".")[-1])
        return max(alike(wrong, candidate), 0.98 * alike(wrong, tail), 0.9 * last)

    ranked = sorted(((likeness(candidate), candidate) for candidate in known), reverse=True)
    best = [candidate for score, candidate in ranked[:3] if score > least and score > ranked[0][0] - 0.08]
    return f"; did you mean {' or '.join(best)}?" if best else ""
