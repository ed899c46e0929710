"""YAML of other people: bytes to plain values, without running anything and without taking more than it has.

Values are built here from PyYAML's events, as OmegaConf's loader reads them: YAML 1.1 without time stamps, floats as in
YAML 1.2. YAML tags (which name types to construct) and anything too long, too deep or too many are refused before a
value is built; an alias counts as all that it stands for, so that eight lines of them cannot fill the memory.
OmegaConf's grammar and resolvers (``${oc.env:…}``) are never run: such text stays the literal text it is.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nemo_aligner_diffusion.errors import printable
from nemo_aligner_diffusion.formats.files import decode_utf8, read_bytes

MAX_BYTES = 1 << 20  # of a file
MAX_DEPTH = 32
MAX_NODES = 20_000
MAX_KEY_CHARACTERS = 1 << 10
MAX_NUMBER_CHARACTERS = 64  # longer ones stay text: Python makes numbers of digits in the square of their count

# Plain (unquoted) scalars as OmegaConf's loader reads them: YAML 1.1 without time stamps, and floats as in YAML 1.2.
_NULL = ("", "~", "null", "Null", "NULL")
_BOOLEANS = {
    **{spelt: True for word in ("yes", "true", "on") for spelt in (word, word.capitalize(), word.upper())},
    **{spelt: False for word in ("no", "false", "off") for spelt in (word, word.capitalize(), word.upper())},
}
_INTEGERS = (
    (2, re.compile(r"[-+]?0b[0-1_]+")),
    (8, re.compile(r"[-+]?0[0-7_]+")),
    (10, re.compile(r"[-+]?(?:0|[1-9][0-9_]*)")),
    (16, re.compile(r"[-+]?0x[0-9a-fA-F_]+")),
)
_FLOAT = re.compile(
    r"[-+]?[0-9]+(?:_[0-9]+)*(?:\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)|\.[0-9]+(?:_[0-9]+)*(?:[eE][-+][0-9]+)?"
)
_INFINITE = re.compile(r"([-+]?)\.(?:inf|Inf|INF)")
_NOT_A_NUMBER = (".nan", ".NaN", ".NAN")


@dataclass(frozen=True)
class Typed:
    """A number, true or false, and how it was written: ``2024_01_15``, ``1e5``, ``3.10``, ``TRUE``."""

    value: int | float | bool
    words: str


def read_yaml(path: str | os.PathLike[str], keep_words: bool = False) -> Any:
    """The value of a YAML file; with ``keep_words`` its numbers and booleans are :class:`Typed`.

    Raises:
        ValueError: no UTF-8, no YAML, or YAML that a configuration never needs; the message goes on after its name.
        OSError: it cannot be read, or has more than :data:`MAX_BYTES`.
    """
    return parse_yaml(read_bytes(path, MAX_BYTES), keep_words=keep_words)


def parse_yaml(content: bytes, aliases: bool = True, keep_words: bool = False) -> Any:
    """:func:`read_yaml` of a file's bytes.

    Args:
        aliases: whether anchors, aliases and merges may occur.
    """
    import yaml

    text = decode_utf8(content)
    try:
        return _Builder(aliases, keep_words).build(_checked_events(text, aliases))
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(f"is not valid YAML: {printable(' '.join(str(error).split()))}") from None


def _checked_events(text: str, aliases: bool) -> Iterator[Any]:
    """PyYAML's events for one document, each checked for what a configuration never needs."""
    import yaml

    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        if count > MAX_NODES:
            raise ValueError(f"has more than {MAX_NODES} nodes")
        line = event.start_mark.line + 1
        if not aliases and (isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None):
            raise ValueError(f"uses a YAML anchor or alias in line {line}; write the value out")
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"uses the YAML tag {printable(event.tag, 80)!r} in line {line}; write a plain value")
        if isinstance(event, yaml.DocumentStartEvent) and count > 1:
            raise ValueError(f"starts a second document in line {line}")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"is nested more than {MAX_DEPTH} deep in line {line}")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        yield event


class _Builder:
    """The document's value; no more recursion than ``MAX_DEPTH``."""

    def __init__(self, aliases: bool, keep_words: bool) -> None:
        self._aliases, self._keep_words = aliases, keep_words
        self._nodes = 0  # those that aliases stand for included
        self._anchored: dict[str, tuple[Any, int]] = {}  # anchor -> value, nodes in it

    def build(self, events: Iterator[Any]) -> Any:
        import yaml

        for event in events:
            if isinstance(event, yaml.NodeEvent):
                value = self._value(event, events)
                for _ in events:  # to the end, so that whatever follows is checked too
                    pass
                return value
        return None

    def _value(self, event: Any, events: Iterator[Any]) -> Any:
        import yaml

        before, line = self._nodes, event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchored:
                raise ValueError(
                    f"refers in line {line} to the anchor {printable(event.anchor, 80)!r}, not yet complete"
                )
            value, nodes = self._anchored[event.anchor]
            self._count(nodes, line)
            return copy.deepcopy(value)
        self._count(1, line)
        if isinstance(event, yaml.ScalarEvent):
            value = _scalar(event.value) if event.implicit[0] else event.value
            if self._keep_words and isinstance(value, bool | int | float):
                value = Typed(value, event.value)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = []
            while not isinstance(following := next(events), yaml.SequenceEndEvent):
                value.append(self._value(following, events))
        else:
            value = self._mapping(events)
        if event.anchor is not None:
            self._anchored[event.anchor] = value, self._nodes - before
        return value

    def _mapping(self, events: Iterator[Any]) -> dict[Any, Any]:
        import yaml

        result: dict[Any, Any] = {}
        merged: dict[Any, Any] = {}
        while not isinstance(following := next(events), yaml.MappingEndEvent):
            line = following.start_mark.line + 1
            key = self._value(following, events)
            key = key.value if isinstance(key, Typed) else key
            # Numbers are keys in id-to-label tables; large ones could be chosen to share a hash, which takes for ever.
            whole = isinstance(key, int) and not isinstance(key, bool) and abs(key) < 2**31
            if not whole and not (isinstance(key, str) and len(key) <= MAX_KEY_CHARACTERS):
                raise ValueError(f"has a key in line {line} that is no short string or number")
            if key in result:
                raise ValueError(f"has the duplicate key {printable(key, 80)!r} in line {line}")
            value = self._value(next(events), events)
            if key != "<<":
                result[key] = value
                continue
            sources = value if isinstance(value, list) else [value]
            if not self._aliases or not all(isinstance(source, dict) for source in sources):
                raise ValueError(f"merges mappings in line {line}; write the values out")
            for source in sources:
                merged = {**source, **merged}
        return {**merged, **result}

    def _count(self, nodes: int, line: int) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            raise ValueError(f"has more than {MAX_NODES} values by line {line}, counting what its aliases stand for")


def _scalar(text: str) -> Any:
    """A plain scalar's value: None, a boolean, a number, or the text itself."""
    if text in _NULL:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if text[0] not in "+-.0123456789":
        return text
    if text in _NOT_A_NUMBER:
        return float("nan")
    if match := _INFINITE.fullmatch(text):
        return float(match.group(1) + "inf")
    if len(text) > MAX_NUMBER_CHARACTERS:
        return text
    digits = text.replace("_", "")
    for base, pattern in _INTEGERS:
        if pattern.fullmatch(text):
            try:
                return int(digits, base)
            except ValueError:  # "0x_": digits of nothing
                return text
    return float(digits) if _FLOAT.fullmatch(text) else text
