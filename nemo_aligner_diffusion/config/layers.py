"""Layers of dotted keys: reading overrides, translating aliases, refusing keys that nobody knows."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from nemo_aligner_diffusion.config import schema
from nemo_aligner_diffusion.config.nemo_names import (
    ALIASES,
    NOT_YET,
    pattern_without_effect,
    reason_without_effect,
)
from nemo_aligner_diffusion.config.words import quoted, settled, split, with_words
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.keys import closest
from nemo_aligner_diffusion.settings import ANY, LOOP, Kind
from nemo_aligner_diffusion.training.schedules import EITHER_OR

_PART = re.compile(r"^rm\.(parts\.[^.]+\.(reward\.)?)+")  # of a composite reward
KEY = re.compile(r"[A-Za-z_][\w@/+-]*(\.[\w@/+-]+)*")


@dataclass(frozen=True)
class Override:
    """One ``key=value`` of the command line; ``delete`` for ``~key``."""

    key: str
    value: Any
    delete: bool = False


@dataclass
class Layer:
    """Settings of one source. ``origin`` names it in messages."""

    leaves: dict[str, Any]
    origin: str
    deletions: list[str] = field(default_factory=list)


class Note(NamedTuple):
    """A key that was accepted and does nothing."""

    key: str
    reason: str


def parse_override(text: str) -> Override:
    """Read ``key=value`` with Hydra's grammar, and literally where that grammar has other plans for plain paths.

    ``prompts-{0000..0127}.tar``, ``results/lr=1e-4`` and ``~/shards`` are fine as they stand.

    Raises:
        ConfigurationError: no ``=``, no key, or a comma-separated sweep.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser  # slow: a fifth of a second
    from hydra.errors import HydraException

    key, separator, raw = text.partition("=")
    delete = key.startswith("~")
    key = key.lstrip("~+").strip()
    if not KEY.fullmatch(key) or (not separator and not delete):
        hint = "; options come as --config-name, --config-path, --cfg, --help" if text.startswith("-") else ""
        raise ConfigurationError(f"{text!r}: expected key=value, such as model.kl_coeff=0.2{hint}")
    if delete:
        return Override(key, None, delete=True)
    try:
        parsed = OverridesParser.create().parse_override(f"key={raw}")
    except HydraException as error:
        if raw.strip()[:1] in ("[", "'", '"') or re.match(r"\{[^}]*:", raw.strip()):
            raise ConfigurationError(f"{key} = {raw}: cannot be read{_how_to_quote(key, raw.strip())}") from error
        return Override(key, raw)
    if parsed.is_sweep_override():
        raise ConfigurationError(
            f"{key} = {raw}: several values separated by commas; write a list as {key}=[{raw}], text with a comma as "
            f"{key}=\"'{raw}'\""
        )
    return Override(key, with_words(parsed.value(), raw))


def _how_to_quote(key: str, raw: str) -> str:
    """What to write in place of a value that Hydra's grammar has no reading for."""
    opening, closing = raw[:1], {"[": "]", "{": "}"}.get(raw[:1], raw[:1])
    if len(raw) < 2 or not raw.endswith(closing):
        return f": expected {closing} at its end"
    if opening != "[":
        return ": text with other than letters, digits and spaces needs quotes in it, such as {label: 'it is: a cat'}"
    if (raw.count("'") + raw.count('"')) % 2:
        texts = [text.strip() for text in raw[1:-1].split(",")]  # an apostrophe, no quotation mark
    else:
        texts = [text[1:-1] if text[:1] in ("'", '"') and text[-1:] == text[:1] else text for text in split(raw[1:-1])]
    written = f"{key}=[{','.join(map(quoted, texts))}]"
    in_quotes = shlex.quote(written) if re.search(r'["$`\\!]', written) else f'"{written}"'
    return f": text with other than letters, digits and spaces needs quotes: {in_quotes}"


def add_layer(
    tree: Mapping[str, Any], layer: Layer, loop: str, recipes: Collection[str], notes: list[Note]
) -> dict[str, Any]:
    """``layer`` over ``tree``, its aliases translated, every key known.

    Args:
        loop: name of the loop's section in ``tree``.
        recipes: names that a loop's section may have; all mean the one of ``tree``.
        notes: gets a line for every key that is accepted and does nothing.

    Raises:
        ConfigurationError: an unknown key, or two spellings of one key that disagree.
    """
    given: dict[str, Any] = {}
    leaves = {key: settled(value, _kind_in_the_end(key, loop, recipes)) for key, value in layer.leaves.items()}
    layer = replace(layer, leaves=leaves)
    for key, value in layer.leaves.items():
        own = _own_loop(key, loop, recipes)
        if own != key and own in layer.leaves:
            notes.append(Note(key, f"{own} is given too"))
            continue
        given[own] = value
    for key, value in list(given.items()):
        _check_known(key, value, loop, layer.origin)
        alias = ALIASES.get(key)
        if alias is not None:
            target = alias.target.replace(LOOP, loop)
            converted = alias.convert(value) if alias.convert else value
            if alias.weak and target in layer.leaves:
                notes.append(Note(key, f"{target} is given too"))
            elif target in layer.leaves and layer.leaves[target] != value:
                raise ConfigurationError(
                    f"{key} = {value!r} and {target} = {layer.leaves[target]!r} are two spellings of one setting that "
                    f"disagree ({layer.origin}): keep one"
                )
            elif converted is not None or not (alias.weak or alias.convert):
                given[target] = converted
        elif schema.kind_of(key, loop) is None and value is not None:
            reason = reason_without_effect(key)
            if reason is not None:
                notes.append(Note(key, reason))
    for key, other in EITHER_OR.items():
        if given.get(key) is not None and other not in given and other in tree:
            given[other] = None
    result = dict(tree)
    for key in layer.deletions:
        _delete(result, key, loop)
    for key, value in given.items():
        if schema.is_section(key, loop) and not schema.is_free_section(key):
            continue  # an empty section in YAML says nothing
        _set(result, key, value)
    return result


def _kind_in_the_end(key: str, loop: str, recipes: Collection[str]) -> Kind | None:
    """The kind of a key or of the one that it is another spelling of; in a part of a reward, of the reward's own."""
    key = _own_loop(key, loop, recipes)
    if key in ALIASES:
        if ALIASES[key].kind is not None:
            return ALIASES[key].kind
        key = ALIASES[key].target.replace(LOOP, loop)
    return schema.kind_of(_PART.sub("rm.", key), loop) or schema.kind_of(key, loop)


def _own_loop(key: str, loop: str, recipes: Collection[str]) -> str:
    parts = key.split(".")
    known = {*recipes, "draftp_sdxl"}
    if len(parts) > 2 and parts[0] == "trainer" and parts[1] in known:
        return ".".join(["trainer", loop, *parts[2:]])
    return key


def _check_known(key: str, value: Any, loop: str, origin: str) -> None:
    if key in NOT_YET:
        neutral, advice = NOT_YET[key]
        if value not in neutral:
            raise ConfigurationError(f"{key} = {value!r} is not available here: {advice}")
        return
    if schema.kind_of(key, loop) is not None or key in ALIASES:
        return
    if schema.is_section(key, loop):
        if value is None or value == {}:
            return
        inside = [known for known in schema.known_keys(loop) if known.startswith(f"{key}.")]
        raise ConfigurationError(f"{key} = {value!r}: {key} is a section; its keys are {', '.join(inside)}")
    # A pattern that lets a whole section through must not swallow a misspelt key of ours in it.
    pattern = pattern_without_effect(key)
    if pattern is not None and not (pattern.endswith("*") and _nearly_known(key, loop)):
        return
    source = "" if origin == "command line" else f" in {origin}"
    suggestions = closest(key, [*schema.known_keys(loop), *ALIASES])
    raise ConfigurationError(f"unknown key {key!r}{source}{suggestions or '; --help lists the keys'}")


def _nearly_known(key: str, loop: str) -> bool:
    section, _, last = key.rpartition(".")
    siblings = [
        known.rpartition(".")[2]
        for known in (*schema.known_keys(loop), *ALIASES)
        if known.rpartition(".")[0] == section
    ]
    return bool(closest(last, siblings, least=0.85))


def _delete(tree: dict[str, Any], key: str, loop: str) -> None:
    """``~key``: only what is free content may go; a setting of the schema goes back by naming its value."""
    kind = schema.kind_of(key, loop)
    if kind is not ANY:
        raise ConfigurationError(f"~{key}: a setting cannot be deleted; set it, for example {key}=null")
    found = [leaf for leaf in tree if leaf == key or leaf.startswith(f"{key}.")]
    if not found:
        raise ConfigurationError(f"~{key}: there is no such key{closest(key, tree)}")
    for leaf in found:
        del tree[leaf]


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    for leaf in [leaf for leaf in tree if leaf.startswith(f"{key}.")]:
        del tree[leaf]
    parts = key.split(".")
    for depth in range(1, len(parts)):
        tree.pop(".".join(parts[:depth]), None)  # an empty mapping that now gets content
    tree[key] = value
