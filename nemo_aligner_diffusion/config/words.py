"""Values with the words they were written with: a name or a path may look like a number, and is text all the same."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from nemo_aligner_diffusion.settings import Kind

_TEXTUAL = ("text", "path", "paths", "texts", "duration")
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_PLAIN = re.compile(r"[\w.:+-]+")


@dataclass(frozen=True)
class Typed:
    """A number, true or false, and how it was written: ``2024_01_15``, ``1e5``, ``3.10``, ``TRUE``."""

    value: int | float | bool
    words: str


def with_words(value: Any, text: str) -> Any:
    """``value``, read from ``text`` with Hydra's grammar, its numbers as :class:`Typed`."""
    text = text.strip()
    if isinstance(value, bool | int | float):
        return Typed(value, text) if _PLAIN.fullmatch(text) else value
    entries = split(text[1:-1])
    if isinstance(value, list) and len(entries) == len(value):
        return [with_words(entry, part) for entry, part in zip(value, entries, strict=True)]
    if isinstance(value, dict) and len(entries) == len(value):
        parts = [part.partition(":")[2] for part in entries]
        return {key: with_words(entry, part) for (key, entry), part in zip(value.items(), parts, strict=True)}
    return value


def with_yaml_words(content: Any, text: str) -> Any:
    """``content`` of a YAML document (perhaps with more in it), its numbers as :class:`Typed`."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return content  # whoever read it knows more than YAML
    return _along(content, node)


def _along(content: Any, node: Any) -> Any:
    if isinstance(content, bool | int | float) and isinstance(node, yaml.ScalarNode) and node.style is None:
        return Typed(content, node.value)
    if isinstance(content, Mapping) and isinstance(node, yaml.MappingNode):
        nodes = {key.value: below for key, below in node.value if isinstance(key, yaml.ScalarNode)}
        return {key: _along(entry, nodes.get(str(key))) for key, entry in content.items()}
    if isinstance(content, list) and isinstance(node, yaml.SequenceNode) and len(content) == len(node.value):
        return [_along(entry, below) for entry, below in zip(content, node.value, strict=True)]
    return content


def settled(value: Any, kind: Kind | None) -> Any:
    """``value`` without :class:`Typed`: the words where ``kind`` is text or a path, else the number."""
    if isinstance(value, Typed):
        return value.words if kind is not None and kind.name in _TEXTUAL else value.value
    if isinstance(value, list):
        return [settled(entry, kind) for entry in value]
    if isinstance(value, dict):
        return {key: settled(entry, kind) for key, entry in value.items()}
    return value


def of_the_environment(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> its value with references to other keys written out, of those that name environment variables.

    Args:
        tree: dotted key -> value, unresolved.
    """

    def expanded(value: Any, depth: int = 10) -> Any:
        if isinstance(value, list):
            return [expanded(entry, depth) for entry in value]
        if not isinstance(value, str) or "${" not in value or not depth:
            return value
        return _REFERENCE.sub(lambda found: str(expanded(tree.get(found[1], found[0]), depth - 1)), value)

    texts = {key: expanded(value) for key, value in tree.items()}
    return {key: text for key, text in texts.items() if "${oc.env:" in str(text)}


def is_secret(kind: Kind) -> bool:
    """Whether a value of the environment stays unwritten: later programs read paths, and a choice is no secret."""
    return kind.name in ("text", "texts", "any") and not kind.choices


def split(text: str) -> list[str]:
    """``text`` at the commas that stand in no quotes and no brackets."""
    parts, depth, quote = [""], 0, ""
    for index, character in enumerate(text):
        if quote:
            quote = "" if character == quote and text[index - 1] != "\\" else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "[{(") - (character in "]})")
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts] if text.strip() else []


def quoted(text: str) -> str:
    """A text in Hydra's grammar: backslashes count before quotes only."""
    inside = re.sub(r"(\\*)'", lambda found: found[1] * 2 + "\\'", text)
    trailing = len(inside) - len(inside.rstrip("\\"))
    return f"'{inside}{chr(92) * trailing}'"
