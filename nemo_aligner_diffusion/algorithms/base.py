"""What a method is: its settings, their checks and its plan rule, in one file of this package. Imports no torch."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from nemo_aligner_diffusion.diffusion.plan import Plan, SamplingPath
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.settings import Settings, setting

__all__ = ["CUSTOM_SECTION", "Method", "TrainingMethod", "setting"]

CUSTOM_SECTION = "custom_algorithm"  # model.custom_algorithm.*: the settings of a user's own method
OF_ROLLOUTS = (  # keys of what a reward's gradient alone has: steps without gradient before those with one
    "model.rollout_precision", "model.rollout_compile", "model.replay_compile", "model.rollout_cache",
    "model.rollout_cache_threshold", "model.rollout_cache_interval", "model.rollout_guidance_interval",
    "model.kept_steps",
)  # fmt: skip


@dataclass(frozen=True)
class TrainingMethod(Settings, ABC):
    """What is learnt, and from what: a kind of method each has a subclass of this.

    A subclass in a file of this package is found by :func:`.registry.methods`; with ``conf/algorithm/<option>.yaml``
    beside it, the command line, the configuration's checks, reports and documentation know it. The first line of its
    docstring is what ``docs/algorithms.md`` says of it.

    Attributes:
        name: value of ``model.algorithm``.
        title: the name people use.
        source: where it was published; ``arXiv`` numbers become links.
        option: ``algorithm=<option>`` picks it, ``model.<option>`` holds its settings; by default ``name``.
        kind: which module trains it (``training/build.py``).
        data: what its batches are made of.
        ignored: keys of :class:`.settings.RewardTuningSettings` that it does not read.

    Raises:
        ConfigurationError: a setting is not of its kind.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    source: ClassVar[str] = ""
    option: ClassVar[str] = CUSTOM_SECTION
    kind: ClassVar[Literal["reward", "preference", "policy"]]
    data: ClassVar[Literal["prompts", "pairs"]] = "prompts"
    ignored: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__ and "option" not in cls.__dict__:
            cls.option = cls.name
        cls.section = f"model.{cls.option}"

    def check(self, steps: int) -> None:  # most have nothing to check
        """Whether the settings fit ``steps`` sampling steps (``model.infer.inference_steps``).

        Raises:
            ConfigurationError: they don't; names the keys, their values and what would be right.
        """

    def check_at_least_two(self, steps: int) -> None:
        """For methods that need a step before the last."""
        if steps < 2:
            raise ConfigurationError(
                f"model.infer.inference_steps = {steps} with model.algorithm = {self.name}: {self.title} needs a step "
                "before the last; expected 2 or more"
            )


@dataclass(frozen=True)
class Method(TrainingMethod):
    """A direct-gradient method: which steps of a trajectory are supervised, and where the reward looks."""

    kind = "reward"

    @abstractmethod
    def plan(self, path: SamplingPath, rng: random.Random) -> Plan:
        """The rule: drawn once an optimizer step; ``rng`` is the same on every process, so the plan is too."""
