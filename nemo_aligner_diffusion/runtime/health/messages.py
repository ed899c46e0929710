"""What the processes of a run tell each other about their health; what comes over a socket is bounded and cleaned."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from nemo_aligner_diffusion.errors import RankLostError

LONGEST_DETAILS = 60_000  # characters of a traceback
_LONGEST_TEXT = 4_000


def clean(value: Any, limit: int = _LONGEST_TEXT) -> str:
    """Text for a terminal and a file: lines of printable characters, the last ``limit`` of them."""
    text = str(value)[-limit:]
    return "".join(c if c.isprintable() or c == "\n" else " " if c == "\t" else "?" for c in text)


@dataclass(frozen=True)
class Member:
    """One process of the run."""

    rank: int
    host: str
    pid: int
    local_rank: int

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Member:
        return cls(int(tree["rank"]), clean(tree["host"], 255), int(tree["pid"]), int(tree["local_rank"]))


@dataclass(frozen=True)
class Position:
    """Where a process is, as of its last heartbeat.

    Attributes:
        phase: what its main thread does, in words.
        step: optimizer steps done.
        events: marks passed since the run began; who is behind has passed fewer.
        idle: seconds since the last mark.
        limit: seconds without a mark that this phase may take.
        waiting: whether the main thread is inside a collective call that says so.
        in_training: whether ``phase`` belongs to an optimizer step.
        timed: optimizer steps whose own work has been timed, and ``worked``: the seconds it took.
        stack: of the main thread, innermost call last, once it is past the limit.
    """

    phase: str = "starting"
    step: int = 0
    events: int = 0
    idle: float = 0.0
    limit: float = math.inf
    waiting: bool = False
    in_training: bool = False
    timed: int = 0
    worked: float = 0.0
    stack: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        return f"{self.phase} of step {self.step + 1}" if self.in_training else self.phase

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Position:
        plain = {name: type(value)(tree[name]) for name, value in vars(cls()).items()}
        stack = tuple(clean(line, 500) for line in plain["stack"][-200:])
        return cls(**{**plain, "phase": clean(plain["phase"], 255), "stack": stack})


@dataclass(frozen=True)
class Fault:
    """The verdict: what brings the run down. Decided once.

    Attributes:
        kind: ``error`` (the rank raised), ``lost`` (its process is gone), ``silent`` (its process gives no sign of
            life), ``hang`` (no progress), ``slow``.
        culprit: of which rank.
        reason: one or a few lines.
        details: traceback or stack, for the file ``fault.txt`` and, shortened, the screen.
        exit_code: of every process that comes down because of it.
        places: where every rank was, a line each.
    """

    kind: str
    culprit: Member
    place: str
    reason: str
    details: str = ""
    exit_code: int = RankLostError.exit_code
    places: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        return f"error on {self.culprit}, {self.place}: {self.reason}"

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Fault:
        return cls(
            clean(tree["kind"], 10),
            Member.from_json(tree["culprit"]),
            clean(tree["place"], 255),
            clean(tree["reason"]),
            clean(tree["details"], LONGEST_DETAILS),
            int(tree["exit_code"]) & 0xFF or 1,
            tuple(clean(line, 500) for line in tree["places"][:100]),
        )
