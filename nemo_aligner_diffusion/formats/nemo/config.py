"""``model_config.yaml`` of a ``.nemo``: bytes to plain values, without running anything.

NeMo writes it with OmegaConf, so numbers such as ``1e-5`` and references such as ``${model.output_dim}`` must mean what
they mean there (:mod:`..yaml_reader`); resolvers (``${oc.env:…}``) are never run.
"""

from __future__ import annotations

import re
from typing import Any

from nemo_aligner_diffusion.formats.yaml_reader import parse_yaml

# One whole-value reference to another key: ${a.b}, ${.sibling}, ${..uncle}; no resolver (which has a colon).
_REFERENCE = re.compile(r"\$\{(\.*)([A-Za-z_][\w\-]*(?:\.[\w\-]+)*)\}")


def parse_config(content: bytes) -> dict[str, Any]:
    """The configuration as plain dicts, lists and scalars.

    Raises:
        ValueError: no UTF-8, no YAML, no mapping, or YAML that a configuration never needs.
    """
    plain = parse_yaml(content, aliases=False)
    if not isinstance(plain, dict) or not all(isinstance(key, str) for key in plain):
        raise ValueError("should be a mapping with strings for keys")
    resolved = _resolve(plain, plain, ())
    assert isinstance(resolved, dict)
    return resolved


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
