"""What a method is: its settings, their checks and its plan rule, in one file of this package. Imports no torch."""

from __future__ import annotations

import dataclasses
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from nemo_aligner_diffusion.diffusion.plan import Plan, SamplingPath
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.settings import Kind

CUSTOM_SECTION = "custom_algorithm"  # model.custom_algorithm.*: the settings of a user's own method


def setting(default: Any, kind: Kind, meaning: str, key: str | None = None) -> Any:
    """A field of a :class:`Method` that the configuration sets.

    Args:
        default: also the value in ``conf/algorithm/``.
        kind: type and range.
        meaning: with its range, as the comment in ``conf/algorithm/`` and the documentation show it.
        key: dotted key; ``None``: ``model.<section>.<name of the field>``.
    """
    return dataclasses.field(default=default, metadata={"kind": kind, "meaning": meaning, "key": key})


@dataclass(frozen=True)
class Method(ABC):
    """A direct-gradient method: which steps of a trajectory are supervised, and where the reward looks.

    A subclass in a file of this package is found by :func:`.registry.methods`; with ``conf/algorithm/<section>.yaml``
    beside it, the command line, the configuration's checks, reports and documentation know it. The first line of its
    docstring is what ``docs/algorithms.md`` says of it.

    Attributes:
        name: value of ``model.algorithm``.
        title: the name people use.
        source: where it was published; ``arXiv`` numbers become links.
        section: ``model.<section>`` holds its settings; by default ``name``.

    Raises:
        ConfigurationError: a setting is not of its kind.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    source: ClassVar[str] = ""
    section: ClassVar[str] = CUSTOM_SECTION

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__ and "section" not in cls.__dict__:
            cls.section = cls.name

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            if "kind" in entry.metadata:
                value = entry.metadata["kind"].read(f"{type(self).__name__}.{entry.name}", getattr(self, entry.name))
                object.__setattr__(self, entry.name, tuple(value) if isinstance(value, list) else value)

    @classmethod
    def keys(cls) -> dict[str, str]:
        """Field -> its dotted key in the configuration."""
        return {
            entry.name: entry.metadata["key"] or f"model.{cls.section}.{entry.name}"
            for entry in dataclasses.fields(cls)
            if "kind" in entry.metadata
        }

    def check(self, steps: int) -> None:  # noqa: B027 (most have nothing to check)
        """Whether the settings fit ``steps`` sampling steps (``model.infer.inference_steps``).

        Raises:
            ConfigurationError: they don't; names the keys, their values and what would be right.
        """

    @abstractmethod
    def plan(self, path: SamplingPath, rng: random.Random) -> Plan:
        """The rule: drawn once an optimizer step; ``rng`` is the same on every process, so the plan is too."""

    def given(self, field: str) -> str:
        """``key = value`` for a message."""
        return f"{self.keys()[field]} = {getattr(self, field)}"

    def check_at_least_two(self, steps: int) -> None:
        """For methods that need a step before the last."""
        if steps < 2:
            raise ConfigurationError(
                f"model.infer.inference_steps = {steps} with model.algorithm = {self.name}: {self.title} needs a step "
                "before the last; expected 2 or more"
            )
