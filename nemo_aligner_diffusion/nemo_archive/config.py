"""``model_config.yaml`` of a ``.nemo``: bytes to plain values and back, without running anything.

NeMo writes it with OmegaConf, so numbers such as ``1e-5`` and references such as ``${model.output_dim}`` must mean what
they mean there. The text comes from strangers, so YAML tags (which name types to construct) and aliases (which
multiply) are refused before a value is built, and OmegaConf resolvers (``${oc.env:…}``) stay the literal text they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

MAX_DEPTH = 32
MAX_EVENTS = 200_000

# One whole-value reference to another key: ${a.b}, ${.sibling}, ${..uncle}; no resolver (which has a colon).
_REFERENCE = re.compile(r"\$\{(\.*)([A-Za-z_][\w\-]*(?:\.[\w\-]+)*)\}")


def parse_config(content: bytes) -> dict[str, Any]:
    """The configuration as plain dicts, lists and scalars.

    Raises:
        ValueError: no UTF-8, no YAML, no mapping, or YAML that a configuration never needs.
    """
    from omegaconf import DictConfig, OmegaConf

    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte {error.start})") from None
    try:
        _refuse_clever_yaml(text)
        # OmegaConf's own loader, so that scalars get the types NeMo gave them; it parses references but follows none.
        parsed = OmegaConf.create(text)
        if not isinstance(parsed, DictConfig):
            raise ValueError("it should be a mapping of keys to values")
        plain = OmegaConf.to_container(parsed, resolve=False)
    except ValueError:
        raise
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    # PyYAML and OmegaConf raise several unrelated families of errors on malformed text.
    except Exception as error:
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


def _refuse_clever_yaml(text: str) -> None:
    import yaml

    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        if count > MAX_EVENTS:
            raise ValueError(f"it has more than {MAX_EVENTS} nodes")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ValueError(f"line {event.start_mark.line + 1} uses a YAML anchor or alias; write the value out")
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"line {event.start_mark.line + 1} uses the YAML tag {event.tag!r}; write a plain value")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


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
