"""Layers of dotted keys: reading overrides and files, translating other spellings, refusing keys that nobody knows."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_aligner_diffusion.config.nemo_names import HALVES, NOT_YET, WITHOUT_EFFECT, Alias, pattern_of
from nemo_aligner_diffusion.config.words import is_secret, of_the_environment, quoted, settled, split, with_words
from nemo_aligner_diffusion.diffusion.families import GUIDANCE, GUIDANCE_KEY, OURS
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.formats.yaml_reader import read_yaml
from nemo_aligner_diffusion.keys import closest, flatten, unflatten
from nemo_aligner_diffusion.settings import ANY, LOOP, Kind, integer
from nemo_aligner_diffusion.training.schedules import EITHER_OR

COMMAND_LINE = "command line"
_PIXELS = integer(0)
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
    """Settings of one source, by dotted key. ``origin`` names it in messages; ``composed``: groups are among them."""

    leaves: dict[str, Any]
    origin: str
    deletions: list[str] = field(default_factory=list)
    composed: bool = False


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


def command_line(overrides: Iterable[Override]) -> Layer:
    """The command line as a layer; the last of several values of one key counts."""
    layer = Layer({}, COMMAND_LINE)
    for item in overrides:
        if item.delete:
            layer.deletions.append(item.key)
        else:
            layer.leaves.update(flatten({item.key: item.value}, dotted=True))
    return layer


def read_sections(file: Path) -> dict[str, Any]:
    """What a YAML file of the user's says; numbers know the words that they were written with.

    Raises:
        ConfigurationError: it cannot be read, is no YAML, or holds no keys.
    """
    try:
        container = read_yaml(file, keep_words=True)
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigurationError(f"{file} {error}") from error
    if not isinstance(container, dict):
        raise ConfigurationError(f"{file}: expected keys and values, found {type(container).__name__}")
    return {str(key): value for key, value in container.items()}


def file_layer(file: Path) -> Layer:
    """:func:`read_sections` as a layer."""
    return Layer(flatten(read_sections(file)), str(file))


class Vocabulary:
    """The keys that a program takes, and what becomes of those that users of NeMo bring.

    Args:
        kinds: dotted key -> type and range; a key that ends in ``.*`` stands for anything below.
        aliases: other spellings.
        loop: name of the training loop's section, which is written ``<loop>`` in ``kinds`` and ``aliases``.
        loops: names that users may give to that section.
        nemos: whether the keys that have no effect here, or none yet, are known as such.
    """

    def __init__(
        self,
        kinds: Mapping[str, Kind],
        aliases: Mapping[str, Alias],
        loop: str = LOOP,
        loops: Collection[str] = (),
        nemos: bool = False,
    ) -> None:
        self.kinds = {key.replace(LOOP, loop): kind for key, kind in kinds.items()}
        self.aliases = aliases
        self._loop, self._loops = loop, loops
        self._without_effect, self._not_yet = (WITHOUT_EFFECT, NOT_YET) if nemos else ({}, {})
        self._halves = HALVES if nemos else {}

    def kind_of(self, key: str) -> Kind | None:
        """The kind of a dotted key, None for one that is not known."""
        if key in self.kinds:
            return self.kinds[key]
        for pattern, kind in self.kinds.items():
            if pattern.endswith(".*") and (key.startswith(pattern[:-1]) or key == pattern[:-2]):
                return kind
        return None

    def over(self, tree: Mapping[str, Any], layer: Layer, notes: dict[str, str] | None = None) -> dict[str, Any]:
        """``layer`` over ``tree``, other spellings translated, every key known.

        Args:
            tree: dotted key -> value.
            notes: gets each key that is accepted and does nothing, with the reason.

        Raises:
            ConfigurationError: an unknown key, or two spellings of one key that disagree.
        """
        notes = {} if notes is None else notes
        leaves = {key: settled(value, self._kind_in_the_end(key)) for key, value in layer.leaves.items()}
        given: dict[str, Any] = {}
        for key, value in leaves.items():
            own = self._own_loop(key)
            if own != key and own in leaves:
                notes[key] = f"{own} is given too"
            else:
                given[own] = value
        said = dict(given)
        for key, value in said.items():
            self._check_known(key, value, layer.origin)
            alias = self.aliases.get(key)
            if alias is not None:
                target = alias.target.replace(LOOP, self._loop)
                converted = alias.convert(value) if alias.convert else value
                if alias.weak and target in said:
                    notes[key] = f"{target} is given too"
                elif target in said and said[target] != value:
                    raise ConfigurationError(
                        f"{key} = {value!r} and {target} = {said[target]!r} are two spellings of one setting that "
                        f"disagree ({layer.origin}): keep one"
                    )
                elif converted is not None or not (alias.weak or alias.convert):
                    given[target] = converted
            elif self.kind_of(key) is None and value is not None and not self._is_half(key):
                pattern = pattern_of(key, self._without_effect)
                if pattern is not None:
                    notes[key] = self._without_effect[pattern]
        for target, halves in self._halves.items():
            if any(given.get(half) is not None for half in halves):
                given[target] = _joined(target, halves, given, tree)
        for key, other in EITHER_OR.items():
            if given.get(key) is not None and other not in given and other in tree:
                given[other] = None
        result = dict(tree)
        for key in layer.deletions:
            self._delete(result, key)
        for key, value in given.items():
            if self._is_section(key) and f"{key}.*" not in self.kinds:
                continue  # an empty section in YAML says nothing
            _set(result, key, value)
        return result

    def values(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """The known keys of ``tree`` with their references resolved, each as its kind.

        Texts of the environment (``${oc.env:TOKEN}``) alone stay references, so that nobody reads them in a file.

        Raises:
            ConfigurationError: a value that has to be given is not, a reference leads nowhere, or a value is not what
                its key accepts.
        """
        environment = of_the_environment(tree)
        result: dict[str, Any] = {}
        for key, value in resolve(tree).items():
            kind = self.kind_of(key)
            if kind is not None:
                read = kind.read(key, value)
                result[key] = environment[key] if key in environment and is_secret(kind) else read
        return result

    def _kind_in_the_end(self, key: str) -> Kind | None:
        """Of a key, or the one that it is another spelling of; in a part of a reward the kind of the reward's own."""
        key = self._own_loop(key)
        if key in self.aliases:
            kind = self.aliases[key].kind
            if kind is not None:
                return kind
            key = self.aliases[key].target.replace(LOOP, self._loop)
        return self.kind_of(_PART.sub("rm.", key)) or self.kind_of(key)

    def _own_loop(self, key: str) -> str:
        parts = key.split(".")
        if len(parts) > 2 and parts[0] == "trainer" and parts[1] in self._loops:
            return ".".join(["trainer", self._loop, *parts[2:]])
        return key

    def _is_half(self, key: str) -> bool:
        return any(key in halves for halves in self._halves.values())

    def _is_section(self, key: str) -> bool:
        return any(known.startswith(f"{key}.") for known in self.kinds)

    def _check_known(self, key: str, value: Any, origin: str) -> None:
        if key in self._not_yet:
            neutral, advice = self._not_yet[key]
            if value not in neutral:
                raise ConfigurationError(f"{key} = {value!r} is not available here: {advice}")
            return
        if self.kind_of(key) is not None or key in self.aliases or self._is_half(key):
            return
        if self._is_section(key):
            if value is None or value == {}:
                return
            inside = [known for known in self.kinds if known.startswith(f"{key}.")]
            raise ConfigurationError(f"{key} = {value!r}: {key} is a section; its keys are {', '.join(inside)}")
        # A pattern that lets a whole section through must not swallow a misspelt key of ours in it.
        pattern = pattern_of(key, self._without_effect)
        if pattern is not None and not (pattern.endswith("*") and self._nearly_known(key)):
            return
        source = "" if origin == COMMAND_LINE else f" in {origin}"
        suggestions = self._in_diffusers_words(key) or closest(key, [*self.kinds, *self.aliases])
        raise ConfigurationError(f"unknown key {key!r}{source}{suggestions or '; --help lists the keys'}")

    def _in_diffusers_words(self, key: str) -> str:
        """What is meant by a key that ends as an argument of pipelines is called."""
        last = key.rpartition(".")[2]
        meant = GUIDANCE_KEY if last in GUIDANCE else OURS.get(last, "")
        return f"; did you mean {meant}?" if meant in self.kinds and meant.startswith("model.infer.") else ""

    def _nearly_known(self, key: str) -> bool:
        section, _, last = key.rpartition(".")
        known = [other.rpartition(".") for other in (*self.kinds, *self.aliases)]
        return bool(closest(last, [name for place, _, name in known if place == section], least=0.85))

    def _delete(self, tree: dict[str, Any], key: str) -> None:
        """``~key``: only what is free content may go; a setting of the schema goes back by naming its value."""
        if self.kind_of(key) is not ANY:
            raise ConfigurationError(f"~{key}: a setting cannot be deleted; set it, for example {key}=null")
        found = [leaf for leaf in tree if leaf == key or leaf.startswith(f"{key}.")]
        if not found:
            raise ConfigurationError(f"~{key}: there is no such key{closest(key, tree)}")
        for leaf in found:
            del tree[leaf]


def _joined(target: str, halves: tuple[str, str], given: dict[str, Any], tree: Mapping[str, Any]) -> list[int]:
    """The pair that ``halves`` give, one of them perhaps in the layer before."""
    pair = []
    for half, before in zip(halves, tree.get(target) or (None, None), strict=True):
        value = given.pop(half, None)
        value = before if value is None else value
        if value is None:
            raise ConfigurationError(f"{half} is not given: {target} needs both {' and '.join(halves)}")
        pair.append(_PIXELS.read(half, value))
    return pair


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    for leaf in [leaf for leaf in tree if leaf.startswith(f"{key}.")]:
        del tree[leaf]
    parts = key.split(".")
    for depth in range(1, len(parts)):
        tree.pop(".".join(parts[:depth]), None)  # an empty mapping that now gets content
    tree[key] = value


def resolve(tree: Mapping[str, Any]) -> dict[str, Any]:
    """``tree`` with references such as ``${name}`` resolved.

    Raises:
        ConfigurationError: one of them leads nowhere, or a value that has to be given is not.
    """
    missing = [key for key, value in tree.items() if value == "???"]
    if missing:
        page = "rewards.md" if missing[0].startswith("rm.") else "configuration.md"
        raise ConfigurationError(
            f"{' and '.join(missing)} must be given, as {' '.join(f'{key}=…' for key in missing)}: there is no default "
            f"(docs/{page} explains)"
        )
    cfg = OmegaConf.create(unflatten(tree))
    for key, value in tree.items():
        if isinstance(value, str) and "${" in value:
            try:
                OmegaConf.select(cfg, key, throw_on_resolution_failure=True)
            except OmegaConfBaseException as error:
                reason = str(error).splitlines()[0]
                raise ConfigurationError(f"{key} = {value!r} cannot be resolved: {reason}") from error
    try:
        container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigurationError(f"the configuration cannot be resolved: {str(error).splitlines()[0]}") from error
    assert isinstance(container, dict)
    return flatten({str(key): value for key, value in container.items()})
