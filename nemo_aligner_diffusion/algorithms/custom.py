"""A user's own method, named by its import path in the user's configuration.

Like a reward's (:mod:`nemo_aligner_diffusion.rewards.custom`) the path is Python code that will run.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_aligner_diffusion.algorithms.base import CUSTOM_SECTION, Method
from nemo_aligner_diffusion.diffusion.plan import Plan, PlanRule, SamplingPath, check_plan
from nemo_aligner_diffusion.errors import AlignerError, ConfigurationError, first_line
from nemo_aligner_diffusion.import_path import load_callable


@dataclass(frozen=True)
class CustomMethod(Method):
    """A rule that somebody else wrote, held to the contract.

    Args:
        rule: a :class:`Method`, or any callable ``(path, rng) -> Plan``.
        origin: where it came from, for messages.
    """

    rule: Method | PlanRule
    origin: str

    def check(self, steps: int) -> None:
        if isinstance(self.rule, Method):
            self._guarded(self.rule.check, steps)

    def plan(self, path: SamplingPath, rng: random.Random) -> Plan:
        plan = self._guarded(self.rule.plan if isinstance(self.rule, Method) else self.rule, path, rng)
        if not isinstance(plan, Plan):
            raise ConfigurationError(
                f"{self.origin}: its rule gave a {type(plan).__name__}; expected a Plan of "
                "nemo_aligner_diffusion.diffusion.plan, such as Plan(active=(3, 7), cut=True)"
            )
        try:
            check_plan(plan, path.steps)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"{self.origin}: {error}") from error
        return plan

    def _guarded(self, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except AlignerError:
            raise
        except Exception as error:  # the rule is the user's: anything may happen
            raise ConfigurationError(
                f"{self.origin}: its rule failed with {type(error).__name__}: {first_line(error)}"
            ) from error


def is_import_path(algorithm: str) -> bool:
    return ":" in algorithm


def load_method(import_path: str, settings: Mapping[str, Any] | None = None) -> CustomMethod:
    """The method at ``package.module:name``.

    A class is called with ``settings`` and gives a :class:`Method` or a callable; a function is the rule, ``settings``
    are handed to it as keyword arguments; anything else is the rule as it stands.

    Raises:
        ConfigurationError: the path cannot be imported, or what stands there is no rule.
    """
    origin = f"model.algorithm = {import_path!r}"
    rule = load_callable(import_path, dict(settings or {}), origin, f"model.{CUSTOM_SECTION}", ("path", "rng"))
    if not (isinstance(rule, Method) or callable(rule)):
        raise ConfigurationError(
            f"{origin} is a {type(rule).__name__}; expected a Method, or a callable (path, rng) -> Plan"
        )
    return CustomMethod(rule, origin)
