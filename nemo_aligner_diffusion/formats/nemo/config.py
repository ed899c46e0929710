"""``model_config.yaml`` of a ``.nemo``: bytes to plain values and back, without running anything.

NeMo writes it with OmegaConf, so numbers such as ``1e-5`` and references such as ``${model.output_dim}`` must mean what
they mean there. The text comes from strangers, so values are built here from PyYAML's events: YAML tags (which name
types to construct), aliases (which multiply) and anything too long, too deep or too many are refused before a value is
built, and OmegaConf's grammar and resolvers (``${oc.env:…}``) are never run: such text stays the literal text it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

MAX_DEPTH = 32
MAX_EVENTS = 20_000
MAX_KEY_CHARACTERS = 1 << 10
MAX_NUMBER_CHARACTERS = 64  # longer ones stay text: Python makes numbers of digits in the square of their count

# One whole-value reference to another key: ${a.b}, ${.sibling}, ${..uncle}; no resolver (which has a colon).
_REFERENCE = re.compile(r"\$\{(\.*)([A-Za-z_][\w\-]*(?:\.[\w\-]+)*)\}")

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


def parse_config(content: bytes) -> dict[str, Any]:
    """The configuration as plain dicts, lists and scalars.

    Raises:
        ValueError: no UTF-8, no YAML, no mapping, or YAML that a configuration never needs.
    """
    import yaml

    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte {error.start})") from None
    try:
        plain = _build(_checked_events(text))
    except ValueError:
        raise
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())[:200] or type(error).__name__) from None
    if not isinstance(plain, dict) or not all(isinstance(key, str) for key in plain):
        raise ValueError("it should be a mapping with strings for keys")
    resolved = _resolve(plain, plain, ())
    assert isinstance(resolved, dict)
    return resolved


def serialise_config(config: Mapping[str, Any], transform: Callable[[Any], Any]) -> tuple[str, dict[str, Any]]:
    """``(YAML text, plain values)`` of ``config`` after ``transform``; keys keep their order.

    Raises:
        ValueError: a value is no YAML scalar, list or mapping.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        container = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else dict(config)
        plain = transform(container)
        return OmegaConf.to_yaml(OmegaConf.create(plain)), plain
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from error


def _checked_events(text: str) -> Iterator[Any]:
    """PyYAML's events for one document, each checked for what a configuration never needs."""
    import yaml

    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        if count > MAX_EVENTS:
            raise ValueError(f"it has more than {MAX_EVENTS} nodes")
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ValueError(f"line {line} uses a YAML anchor or alias; write the value out")
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"line {line} uses the YAML tag {event.tag[:80]!r}; write a plain value")
        if isinstance(event, yaml.DocumentStartEvent) and count > 1:
            raise ValueError(f"line {line} starts a second document")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        yield event


def _build(events: Iterator[Any]) -> Any:
    """The document's value; no more recursion than ``MAX_DEPTH``."""
    import yaml

    def value_of(event: Any) -> Any:
        if isinstance(event, yaml.ScalarEvent):
            return _scalar(event.value) if event.implicit[0] else event.value
        if isinstance(event, yaml.SequenceStartEvent):
            items = []
            while not isinstance(following := next(events), yaml.SequenceEndEvent):
                items.append(value_of(following))
            return items
        result: dict[Any, Any] = {}
        while not isinstance(following := next(events), yaml.MappingEndEvent):
            line = following.start_mark.line + 1
            key = value_of(following)
            # Numbers are keys in id-to-label tables; large ones could be chosen to share a hash, which takes for ever.
            whole = isinstance(key, int) and not isinstance(key, bool) and abs(key) < 2**31
            if not whole and not (isinstance(key, str) and len(key) <= MAX_KEY_CHARACTERS):
                raise ValueError(f"line {line} has a key that is no short string or number")
            if key in result:
                raise ValueError(f"line {line} has the duplicate key {str(key)[:80]!r}")
            if key == "<<":
                raise ValueError(f"line {line} merges mappings; write the values out")
            result[key] = value_of(next(events))
        return result

    for event in events:
        if isinstance(event, yaml.NodeEvent):
            value = value_of(event)
            for _ in events:  # to the end, so that whatever follows is checked too
                pass
            return value
    return None


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


def _resolve(node: Any, root: Any, at: tuple[Any, ...]) -> Any:
    """``node`` with whole-value references replaced by the scalars they point to; anything else is left as text."""
    if isinstance(node, dict):
        return {key: _resolve(value, root, (*at, key)) for key, value in node.items()}
    if isinstance(node, list):
        return [_resolve(value, root, (*at, index)) for index, value in enumerate(node)]
    value, here = node, at
    for _ in range(8):  # a chain of references; longer ones, and circles, stay text
        match = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            return value
        keys = tuple(match.group(2).split("."))
        dots = len(match.group(1))
        path = (*here[:-dots], *keys) if dots else keys
        found, target = _look_up(root, path)
        if not found and keys[0] == "model":  # saved from a training config, whose "model" section became the root
            path = keys[1:]
            found, target = _look_up(root, path)
        if not found or isinstance(target, (dict, list)):
            return node
        value, here = target, path
    return node


def _look_up(root: Any, path: tuple[Any, ...]) -> tuple[bool, Any]:
    for key in path:
        if isinstance(root, dict) and key in root:
            root = root[key]
        elif isinstance(root, list) and str(key).isdigit() and int(key) < len(root):
            root = root[int(key)]
        else:
            return False, None
    return True, root
