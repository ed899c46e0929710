"""What makes a sample or a shard unusable, and what then: nothing is left out without being counted."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

from nemo_aligner_diffusion.errors import DataError, printable

logger = logging.getLogger(__name__)

MESSAGES_KEPT = 5  # unusable samples described one by one before they are only counted

OnBadSample = Literal["error", "skip"]


class BadSampleError(DataError):
    """One sample is unusable; its shard may be sound."""


class BadSamples:
    """What to do about an unusable prompt or shard: stop with a DataError, or count and go on.

    Args:
        policy: ``"error"`` or ``"skip"``.
        shard_policy: the same for files that are unreadable or damaged; None: as ``policy``.
        advice: what an error says of the way to pass over such samples.

    Attributes:
        count: unusable samples and files so far.
        shards: the files among them.
        messages: what was wrong with the first of them.
    """

    def __init__(
        self,
        policy: OnBadSample = "error",
        shard_policy: OnBadSample | None = None,
        advice: str = "on_bad_sample=skip passes over such samples",
    ) -> None:
        for name, value in (("on_bad_sample", policy), ("on_bad_shard", shard_policy or policy)):
            if value not in ("error", "skip"):
                raise DataError(f"{name} is {value!r}; expected 'error' or 'skip'")
        self.policy = policy
        self.shard_policy: OnBadSample = shard_policy or policy
        self.advice = advice
        self.count = 0
        self.shards = 0
        self.messages: list[str] = []
        self._passed_over: dict[tuple[str, str], tuple[int, str]] = {}  # (what, reason) -> how many, the first

    def __call__(self, message: str) -> None:
        """A sample is unusable.

        Raises:
            BadSampleError: under ``policy="error"``.
        """
        if self.policy == "error":
            raise BadSampleError(f"{message} ({self.advice})")
        self._note(message)

    def shard(self, error: DataError) -> None:
        """A file is unusable from here on.

        Raises:
            DataError: ``error``, under ``shard_policy="error"``, or if it is about one sample.
        """
        if self.shard_policy == "error" or isinstance(error, BadSampleError):
            raise error
        self.shards += 1
        self._note(str(error))

    def pass_over(self, reason: str, example: str, what: str = "members") -> None:
        """A member is no part of a sample although its name looks like one, or a sample is not asked for: counted."""
        count, first = self._passed_over.get((what, reason), (0, printable(example)))
        self._passed_over[what, reason] = count + 1, first

    @property
    def notes(self) -> list[str]:
        """A line for each reason that something was passed over for."""
        return [
            f"{count} {what.removesuffix('s')} was passed over, {first}, {reason}"
            if count == 1
            else f"{count} {what} were passed over, {first} first, {reason}"
            for (what, reason), (count, first) in self._passed_over.items()
        ]

    def summary(self) -> dict[str, Any]:
        """All of it, for JSON and :func:`warn_of`."""
        return {"samples": self.count, "shards": self.shards, "messages": self.messages, "notes": self.notes}

    def _note(self, message: str) -> None:
        self.count += 1
        if self.count <= MESSAGES_KEPT:
            self.messages.append(printable(message, 1_000))


def warn_of(summary: Mapping[str, Any]) -> None:
    """Say what was left out."""
    for message in (*summary["messages"], *summary["notes"]):
        logger.warning("skipped: %s", message)
    if summary["samples"] > MESSAGES_KEPT:
        logger.warning("%d samples were skipped in all", summary["samples"])
