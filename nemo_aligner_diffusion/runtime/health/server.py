"""Rank 0's thread that hears every rank's heartbeat, judges, and tells all of them."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import selectors
import threading
import time
from typing import Any

from nemo_aligner_diffusion.runtime.health import lines
from nemo_aligner_diffusion.runtime.health.messages import LONGEST_DETAILS, Fault, Member, Position, clean
from nemo_aligner_diffusion.runtime.health.stragglers import StragglerWatch
from nemo_aligner_diffusion.runtime.health.verdict import Watch

log = logging.getLogger(__name__)

_TICK = 0.1  # seconds between two looks at the clock
_SAME_ERROR_WITHIN = 0.7  # seconds in which other ranks may raise the same error as the first one
_HELLO_WITHIN = 5.0  # seconds; then a caller is turned away
_MOST_CALLERS = 64  # at a time, beside as many as there are ranks; then the one who has waited longest is turned away


class HealthServer(threading.Thread):
    """Start it on rank 0.

    Args:
        one_node: whether it listens on this machine only.
        watch: the judge.
        interval: seconds between the server's own signs of life.
        stragglers: looks for slow ranks; None: nobody does.

    Attributes:
        address: for the ranks, see :func:`.lines.call`.
    """

    def __init__(self, one_node: bool, watch: Watch, interval: float, stragglers: StragglerWatch | None = None) -> None:
        super().__init__(name="health server", daemon=True)
        self.watch = watch
        self.interval = interval
        self.stragglers = stragglers
        listener, self.address, self._secret = lines.listen(one_node)
        self._listener = lines.keep_from_children(listener)
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._callers: dict[_RankLine, float] = {}  # who has not said hello yet -> since when
        self._lines: dict[int, _RankLine] = {}  # rank -> its connection
        self._fault: Fault | None = None
        self._errors: dict[int, float] = {}  # rank that raised -> when
        self._handed_on: set[int] = set()  # of these, who raised what another rank has met
        self._answered: set[int] = set()
        self._closing = threading.Event()

    def close(self) -> None:
        """Say goodbye to everybody who is still there."""
        self._closing.set()
        self.join(timeout=5.0)

    def run(self) -> None:
        said = looked = time.monotonic()
        while not self._closing.is_set():
            for key, _ in self._selector.select(_TICK):
                if key.data is None:
                    self._accept()
                else:
                    self._read(key.data)
            now = time.monotonic()
            if now - looked > self.watch.silence / 2:  # this whole process was stopped: nobody could be heard
                self.watch.forgive(now, now - looked)
                self._callers = dict.fromkeys(self._callers, now)
            looked = now
            for caller in [caller for caller, since in self._callers.items() if now - since > _HELLO_WITHIN]:
                self._drop(caller)
            try:
                self._answer_errors(now)
                self._decide(self.watch.silent(now) or self.watch.hanging(now))
                self._name_stragglers(now)
            except Exception:  # a bug must not end the watching, which then says that everybody is silent
                log.exception("the watch over ranks could not judge")
            if now - said >= self.interval:
                said = now
                self._tell_position()
        self._say_goodbye()

    def _say_goodbye(self) -> None:
        """To those who have called and not been heard yet, too: a connection that just closes is a crash to them."""
        self._accept()
        for line in [*self._callers, *self._lines.values()]:
            with contextlib.suppress(OSError):
                line.send("bye")
            line.close()
        self._listener.close()
        self._selector.close()

    def _accept(self) -> None:
        """Everybody who has called."""
        with contextlib.suppress(OSError):  # nobody is left, there are no descriptors, or all ranks are there
            while True:
                connection, _ = self._listener.accept()
                line = _RankLine(connection, lines.LONGEST_HELLO)
                if not line.is_own_user:
                    line.close()
                    continue
                self._selector.register(connection, selectors.EVENT_READ, line)
                self._callers[line] = time.monotonic()
                if len(self._callers) > _MOST_CALLERS + self.watch.world_size:
                    self._drop(next(iter(self._callers)))

    def _close_the_door(self) -> None:
        """All ranks are there: whoever else calls, and whatever secret they know, is no longer heard."""
        self._selector.unregister(self._listener)
        self._listener.close()
        for caller in list(self._callers):
            self._drop(caller)

    def _read(self, line: _RankLine) -> None:
        if line.is_dropped:
            return
        now = time.monotonic()
        try:
            messages = line.receive()
            for message in messages or []:
                self._handle(line, message, now)
        except Exception as error:  # not one of us: whatever it says must not end this thread
            log.debug("turned away: %r", error)
            messages = None
        if messages is None:
            self._drop(line)
            if line.rank is not None:
                del self._lines[line.rank]
                if not self.watch.ranks[line.rank].left:
                    if line.rank not in self._errors:
                        self._decide(self.watch.lost(line.rank, now))
                    self.watch.leave(line.rank)

    def _drop(self, line: _RankLine) -> None:
        self._callers.pop(line, None)
        self._selector.unregister(line.connection)
        line.is_dropped = True
        line.close()

    def _handle(self, line: _RankLine, message: dict[str, Any], now: float) -> None:
        kind, rank = message["kind"], line.rank
        if rank is None:
            if kind != "hello" or not lines.knows(self._secret, message["secret"]):
                raise ValueError("unknown caller")
            self._welcome(line, Member.from_json(message["member"]), now)
        elif kind == "beat":
            self.watch.heard(rank, now, Position.from_json(message["position"]))
        elif kind == "bye":
            self.watch.leave(rank)
        elif kind == "error":
            self.watch.heard(rank, now, Position.from_json(message["position"]))
            self._errors[rank] = now
            if message["said"]:  # whose error it is will say so, and be the one that is named
                self._handed_on.add(rank)
                return
            reason, details = clean(message["reason"]), clean(message["details"], LONGEST_DETAILS)
            self._decide(self.watch.error(rank, reason, details, int(message["exit_code"]) & 0xFF or 1, now))

    def _welcome(self, line: _RankLine, member: Member, now: float) -> None:
        if line.is_by_kernel:
            member = dataclasses.replace(member, pid=line.pid)
        if not 0 <= member.rank < self.watch.world_size or member.rank in self.watch.ranks:
            raise ValueError(f"not a rank, or one that is there already: {member.rank}")
        del self._callers[line]
        line.rank, line.longest = member.rank, lines.LONGEST_LINE
        self._lines[member.rank] = line
        self.watch.join(member, now)
        if self._fault is not None:  # it comes up into a run that is coming down
            self._send(member.rank, "verdict", fault=self._fault.to_json())
        if self.watch.is_complete:
            self._close_the_door()
            members = [vars(entry.member) for entry in self.watch.ranks.values()]
            for rank in list(self._lines):
                self._send(rank, "members", members=members)

    def _answer_errors(self, now: float) -> None:
        """Tell a rank that raised whether it is the first, and whether to wait: rank 0 may be exporting what it has."""
        everybody = len(self._errors) == len(self.watch.active)
        for rank, when in self._errors.items():
            if self._fault is None and rank in self._handed_on:
                continue  # launchers end all at the first end: not before the reason has been told
            if rank not in self._answered and (everybody or now - when > _SAME_ERROR_WITHIN):
                self._answered.add(rank)
                first = self._fault is not None and self._fault.kind == "error" and self._fault.culprit.rank == rank
                self._send(rank, "answer", first=first, wait=0 in self._errors)

    def _decide(self, fault: Fault | None) -> None:
        if fault is None or self._fault is not None:
            return
        self._fault = fault
        for rank in list(self._lines):
            if fault.kind != "error" or rank != fault.culprit.rank:
                self._send(rank, "verdict", fault=fault.to_json())

    def _name_stragglers(self, now: float) -> None:
        if self.stragglers is None or not self.watch.is_complete or self._fault is not None:
            return
        positions = {entry.member: entry.position for entry in self.watch.active}
        for member, reason in self.stragglers.newly_slow(now, positions):
            log.warning("%s is %s; all ranks wait for it", member, reason)
            if self.stragglers.settings.stop_if_detected:
                because = f"{reason} (exp_manager.straggler_detection_params.stop_if_detected)"
                self._decide(self.watch.slow(member.rank, because, now))

    def _tell_position(self) -> None:
        """A sign of life of rank 0, with where its main thread is: what the others know of it should it go."""
        entry = self.watch.ranks.get(0)
        position = vars(entry.position) if entry is not None else vars(Position())
        for rank in list(self._lines):
            self._send(rank, "alive", position=position)

    def _send(self, rank: int, kind: str, **content: Any) -> None:
        line = self._lines.get(rank)  # None: it has left meanwhile
        if line is not None:
            with contextlib.suppress(OSError):  # its end of the line is seen when it is read
                line.send(kind, **content)


class _RankLine(lines.Line):
    """A connection whose rank is known once it has said hello."""

    rank: int | None = None
    is_dropped = False
