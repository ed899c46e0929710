"""Values with the words they were written with: a name or a path may look like a number, and is text all the same."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nemo_aligner_diffusion.formats.yaml_reader import Typed
from nemo_aligner_diffusion.settings import Kind

_TEXTUAL = ("text", "path", "paths", "texts", "duration")
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_PLAIN = re.compile(r"[\w.:+-]+")


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


def settled(value: Any, kind: Kind | None = None) -> Any:
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
