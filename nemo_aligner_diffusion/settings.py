"""A setting: its type, range, default, meaning and checks, written once in a small dataclass beside its reader.

Example::

    @dataclass(frozen=True)
    class EMASettings(Settings):
        section = "exp_manager.ema"

        decay: float = setting(0.99, FRACTION, "share of the average kept at each update; in [0, 1)")

A new setting is such a field and its line in ``conf/``. A new class is named, besides, as a :func:`part` of the class
that it belongs to, up to :class:`~nemo_aligner_diffusion.training.settings.RunSettings`; from that the schema,
the documentation and "did you mean" are derived. The module of a class imports nothing heavy: a misspelt key must be
reported in well under a second.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.keys import closest

LOOP = "<loop>"  # in a key: the name of the training loop's section, which is the recipe's
_LISTS = {"texts": "text", "ints": "int", "floats": "float"}  # of entries of a kind
_DURATION = re.compile(r"\d+:\d\d:\d\d:\d\d")

_IN_WORDS = {
    "bool": "true or false",
    "int": "an integer",
    "float": "a number",
    "text": "text",
    "path": "a path",
    "paths": "a path or a list of paths",
    "texts": "a list of texts",
    "ints": "a list of integers",
    "floats": "a list of numbers",
    "devices": "an integer >= 1 or a list of different device indices",
    "batches": "a whole number of batches, or a fraction up to 1.0",
    "duration": "days:hours:minutes:seconds such as 00:03:45:00",
    "free": "a section of keys",
    "any": "anything",
}


@dataclass(frozen=True)
class Kind:
    """One key's type and range.

    Attributes:
        name: one of ``_IN_WORDS``; ``free`` is a section of the user's own keys.
        low, high: bounds, both included unless ``open_low``/``open_high``; of each entry for lists.
        choices: the only values, compared without regard to case; the spelling given here is what is kept.
        or_import_path: beside the choices, a ``module:name`` is a value.
        length: number of entries of a list.
        nullable: whether ``null`` is a value.
    """

    name: str
    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False
    choices: tuple[str, ...] = ()
    length: int | None = None
    nullable: bool = False
    or_import_path: bool = False

    def describe(self) -> str:
        """The expectation in words, as error messages and the documentation show it."""
        if self.choices:
            text = "one of " + ", ".join(self.choices) + (", or your own module:name" if self.or_import_path else "")
        else:
            text = _IN_WORDS[self.name]
            if self.length is not None:
                text = text.replace("a list of", f"a list of {self.length}")
            bounds = []
            if self.low is not None:
                bounds.append(f"{'>' if self.open_low else '>='} {self.low:g}")
            if self.high is not None:
                bounds.append(f"{'<' if self.open_high else '<='} {self.high:g}")
            text = " ".join([text, *([" and ".join(bounds)] if bounds else [])])
        return f"{text}, or null" if self.nullable else text

    def read(self, key: str, value: Any) -> Any:
        """``value`` as this kind.

        Raises:
            ConfigurationError: naming the key, the value and what was expected.
        """
        if value is None:
            if self.nullable or self.name == "any":
                return None
            raise self._wrong(key, value)
        if self.name in _LISTS:
            result = self._list(value, getattr(self, f"_read_{_LISTS[self.name]}"))
        else:
            result = getattr(self, f"_read_{self.name}")(value)
        if result is None:
            hint = ""
            if value == "" and self.name in ("path", "paths"):
                hint = " (an unset shell variable? write null for the default)"
            raise self._wrong(key, value, hint)
        return result

    def _wrong(self, key: str, value: Any, hint: str = "") -> ConfigurationError:
        given = "null" if value is None else repr(value)
        if self.choices and isinstance(value, str):
            hint += closest(value, self.choices)
        return ConfigurationError(f"{key} = {given}: expected {self.describe()}{hint}")

    def _inside(self, value: float) -> bool:
        if self.low is not None and (value < self.low or (self.open_low and value == self.low)):
            return False
        return not (self.high is not None and (value > self.high or (self.open_high and value == self.high)))

    # Each reader returns None for a value that is not of its kind.
    def _read_any(self, value: Any) -> Any:
        return value

    def _read_free(self, value: Any) -> Mapping[str, Any] | None:
        return value if isinstance(value, Mapping) else None

    def _read_batches(self, value: Any) -> float | int | None:
        number = _number(value)
        if number is None or number < 0 or (number > 1 and number != int(number)):
            return None
        return number if number <= 1 else int(number)

    def _read_duration(self, value: Any) -> str | None:
        return value if isinstance(value, str) and _DURATION.fullmatch(value) else None

    def _read_bool(self, value: Any) -> bool | None:
        return value if isinstance(value, bool) else None

    def _read_int(self, value: Any) -> int | None:
        number = _number(value)
        if number is None or number != int(number) or not self._inside(number):
            return None
        return value if isinstance(value, int) else int(number)

    def _read_float(self, value: Any) -> float | int | None:
        number = _number(value)
        if number is None or not self._inside(number):
            return None
        return value if isinstance(value, int) else number

    def _read_text(self, value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return None
        text = str(value)
        if not self.choices or (self.or_import_path and ":" in text):
            return text
        return next((choice for choice in self.choices if choice.lower() == text.lower()), None)

    def _read_path(self, value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return None
        return str(value) or None

    def _read_paths(self, value: Any) -> str | list[str] | None:
        if isinstance(value, Sequence) and not isinstance(value, str):
            return self._list(value, self._read_path)
        return self._read_path(value)

    def _read_devices(self, value: Any) -> int | list[int] | None:
        if isinstance(value, Sequence) and not isinstance(value, str):
            first = Kind("int", low=0)
            indices = first._list(value, first._read_int)
            return indices if indices and len(set(indices)) == len(indices) else None
        return Kind("int", low=1)._read_int(value)

    def _list(self, value: Any, read: Any) -> list[Any] | None:
        if isinstance(value, str) or not isinstance(value, Sequence) or not value:
            return None
        entries = [read(entry) for entry in value]
        if any(entry is None for entry in entries) or (self.length is not None and len(entries) != self.length):
            return None
        return entries


def _number(value: Any) -> float | int | None:
    """A finite number, also where YAML 1.1 or the shell left it a string (``1e-4``); None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


BOOL = Kind("bool")
TEXT = Kind("text")
PATH = Kind("path", nullable=True)
PATHS = Kind("paths", nullable=True)
ANY = Kind("any")
FREE = Kind("free")
FRACTION = Kind("float", low=0, high=1, open_high=True)
PART = Kind("float", low=0, high=1)
SHARE = Kind("float", low=0, high=1, nullable=True)


def integer(low: int | None = None, *, nullable: bool = False) -> Kind:
    return Kind("int", low=low, nullable=nullable)


def number(low: float | None = None, *, above: float | None = None, nullable: bool = False) -> Kind:
    return Kind("float", low=low if above is None else above, open_low=above is not None, nullable=nullable)


def choice(*choices: str, nullable: bool = False) -> Kind:
    return Kind("text", choices=choices, nullable=nullable)


def setting(default: Any, kind: Kind, meaning: str, key: str | None = None) -> Any:
    """A field of a :class:`Settings` that the configuration sets.

    Args:
        default: also the value in ``conf/``; of free content an empty mapping.
        kind: type and range.
        meaning: with its range, as the comment in ``conf/`` and the documentation show it.
        key: dotted key; ``None``: ``<section>.<name of the field>``.
    """
    metadata = {"kind": kind, "meaning": meaning, "key": key}
    if isinstance(default, Mapping):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def part(kind: type[Settings]) -> Any:
    """A field of a :class:`Settings` that holds those of another section."""
    return dataclasses.field(default_factory=kind, metadata={"part": kind})


Self = TypeVar("Self", bound="Settings")


@dataclass(frozen=True)
class Settings:
    """Base of frozen dataclasses whose fields are each made by :func:`setting` or :func:`part`.

    What a class checks of its own fields together stands in its ``__post_init__``, after ``super().__post_init__()``.

    Attributes:
        section: dotted place of the settings in the configuration; empty: its top.
        title: of a table of its own in the documentation; empty: it stands in that of the class it is a part of.

    Raises:
        ConfigurationError: a setting is not of its kind.
    """

    section: ClassVar[str] = ""
    title: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for field, kind in self.kinds().items():
            value = kind.read(f"{type(self).__name__}.{field}", getattr(self, field))
            object.__setattr__(self, field, tuple(value) if isinstance(value, list) else value)

    @classmethod
    def kinds(cls) -> dict[str, Kind]:
        """Field -> its type and range."""
        return {entry.name: entry.metadata["kind"] for entry in _settings_of(cls)}

    @classmethod
    def keys(cls) -> dict[str, str]:
        """Field -> its dotted key in the configuration."""
        prefix = f"{cls.section}." if cls.section else ""
        return {entry.name: entry.metadata["key"] or f"{prefix}{entry.name}" for entry in _settings_of(cls)}

    @classmethod
    def meanings(cls) -> dict[str, str]:
        """Field -> what it means, with its range."""
        return {entry.name: entry.metadata["meaning"] for entry in _settings_of(cls)}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Field -> its default."""
        return {
            entry.name: entry.default if entry.default is not dataclasses.MISSING else {} for entry in _settings_of(cls)
        }

    @classmethod
    def part_classes(cls) -> dict[str, type[Settings]]:
        """Field -> the class of another section that it holds."""
        return {entry.name: entry.metadata["part"] for entry in dataclasses.fields(cls) if "part" in entry.metadata}

    @classmethod
    def all_sections(cls) -> list[type[Settings]]:
        """The class itself and, below it, those of its parts."""
        return [cls, *(below for kind in cls.part_classes().values() for below in kind.all_sections())]

    @classmethod
    def schema(cls) -> dict[str, Kind]:
        """Dotted key -> type and range, of all sections; the key of free content ends in ``.*``."""
        return {
            f"{key}.*" if section.kinds()[field] is FREE else key: ANY
            if section.kinds()[field] is FREE
            else section.kinds()[field]
            for section in cls.all_sections()
            for field, key in section.keys().items()
        }

    @classmethod
    def from_tree(cls: type[Self], tree: Mapping[str, Any], loop: str = LOOP) -> Self:
        """From a whole configuration, nested; what is absent there is as by default.

        Args:
            loop: name of the training loop's section.

        Raises:
            ConfigurationError: settings that do not fit together.
        """
        found: dict[str, Any] = {}
        for field, key in cls.keys().items():
            node: Any = tree
            for step in key.replace(LOOP, loop).split("."):
                node = node.get(step, _ABSENT) if isinstance(node, Mapping) else _ABSENT
            if node is not _ABSENT:
                found[field] = node
        return cls(**found, **{field: kind.from_tree(tree, loop) for field, kind in cls.part_classes().items()})

    def unread(self) -> dict[str, str]:
        """Field -> why it has no effect beside the others."""
        return {}

    def unread_keys(self) -> dict[str, str]:
        """Dotted key -> why it has no effect, of all sections."""
        own = {self.keys()[field]: reason for field, reason in self.unread().items()}
        for field in self.part_classes():
            own |= getattr(self, field).unread_keys()
        return own

    def given(self, field: str) -> str:
        """``key = value`` for a message."""
        return f"{self.keys()[field]} = {getattr(self, field)}"


_ABSENT = object()


def _settings_of(kind: type[Settings]) -> list[dataclasses.Field[Any]]:
    return [entry for entry in dataclasses.fields(kind) if "kind" in entry.metadata]
