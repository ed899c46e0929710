"""What the processes of a run tell each other about their health: lines of JSON over a socket."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import weakref
from dataclasses import dataclass
from typing import Any

LONGEST_LINE = 1 << 20  # bytes; whoever sends more is not one of us
LONGEST_DETAILS = 60_000  # characters of a traceback

EXIT_CODE = 4  # of every process, after one was lost or hung: nothing is wrong with the input (2), so try again


@dataclass(frozen=True)
class Member:
    """One process of the run."""

    rank: int
    host: str
    pid: int
    local_rank: int

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


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
        timed: marks of own work timed so far, and ``worked``: the seconds they took.
    """

    phase: str = "starting"
    step: int = 0
    events: int = 0
    idle: float = 0.0
    limit: float = float("inf")
    waiting: bool = False
    in_training: bool = False
    timed: int = 0
    worked: float = 0.0

    @property
    def place(self) -> str:
        return f"{self.phase} of step {self.step + 1}" if self.in_training else self.phase


@dataclass(frozen=True)
class Fault:
    """The verdict: what brings the run down. Decided once.

    Attributes:
        kind: ``error`` (the rank raised), ``lost`` (its process is gone), ``silent`` (its process gives no sign of
            life), ``hang`` (no progress), ``absent`` (it never came up).
        culprit: of which rank; host and pid are unknown for ``absent``.
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
    exit_code: int = EXIT_CODE
    places: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        return f"error on {self.culprit}, {self.place}: {self.reason}"

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Fault:
        tree = {**tree, "culprit": Member(**tree["culprit"]), "places": tuple(tree["places"])}
        return cls(**tree)


_own: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def keep_from_children(connection: socket.socket) -> socket.socket:
    """Have it closed in forked children (data workers), which would hold it open beyond this process's end."""
    _own.add(connection)
    return connection


def _let_go() -> None:
    for connection in list(_own):
        connection.close()


os.register_at_fork(after_in_child=_let_go)


class Line:
    """A socket that carries one JSON object a line. Not thread-safe: each belongs to one thread."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = keep_from_children(connection)
        self._received = b""

    def send(self, kind: str, **content: Any) -> None:
        """Raises OSError where the other side is gone or does not read for 5 s."""
        data = json.dumps({"kind": kind, **content}).encode() + b"\n"
        self.connection.settimeout(5.0)
        self.connection.sendall(data)

    def receive(self) -> list[dict[str, Any]] | None:
        """What has arrived, once the socket is readable; None: the other side is gone, or talks something else."""
        try:
            self.connection.settimeout(5.0)
            data = self.connection.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self._received += data
        *lines, self._received = self._received.split(b"\n")
        if len(self._received) > LONGEST_LINE:
            return None
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

    def close(self) -> None:
        self.connection.close()
