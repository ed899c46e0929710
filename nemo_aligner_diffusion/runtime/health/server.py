"""Rank 0's thread that hears every rank's heartbeat, judges, and tells all of them."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import selectors
import threading
import time
from collections.abc import Callable
from typing import Any

from nemo_aligner_diffusion.runtime.health import lines
from nemo_aligner_diffusion.runtime.health.messages import LONGEST_DETAILS, Fault, Member, Position, clean
from nemo_aligner_diffusion.runtime.health.stragglers import StragglerReport, StragglerWatch
from nemo_aligner_diffusion.runtime.health.verdict import Watch

log = logging.getLogger(__name__)

_TICK = 0.1  # seconds between two looks at the clock
_STACKS_WITHIN = 2.0  # seconds to wait for the stacks of ranks that stand still
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
        on_straggler_report: called in this thread with every report.
        stop_if_straggler: bring the run down once a rank is named.

    Attributes:
        address: for the ranks, see :func:`.lines.call`.
    """

    def __init__(
        self,
        one_node: bool,
        watch: Watch,
        interval: float,
        stragglers: StragglerWatch | None = None,
        on_straggler_report: Callable[[StragglerReport], None] | None = None,
        stop_if_straggler: bool = False,
    ) -> None:
        super().__init__(name="health server", daemon=True)
        self.watch = watch
        self.interval = interval
        self.stragglers = stragglers
        self.on_straggler_report = on_straggler_report
        self.stop_if_straggler = stop_if_straggler
        listener, self.address, self._secret = lines.listen(one_node)
        self._listener = lines.keep_from_children(listener)
        self._listener.setblocking(False)
        self._callers: dict[_RankLine, float] = {}  # who has not said hello yet -> since when
        self._selector = selectors.DefaultSelector()
        self._lines: dict[int, _RankLine] = {}  # rank -> its connection
        self._fault: Fault | None = None
        self._errors: dict[int, float] = {}  # rank that raised -> when
        self._handed_on: set[int] = set()  # of these, who raised what another rank has met
        self._answered: set[int] = set()
        self._suspects: list[Any] = []
        self._stacks: dict[int, list[str]] = {}
        self._asked = 0.0
        self._closing = threading.Event()

    def close(self) -> None:
        """Say goodbye to everybody who is still there."""
        self._closing.set()
        self.join(timeout=5.0)

    def run(self) -> None:
        self._selector.register(self._listener, selectors.EVENT_READ, None)
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
                self._judge(now)
            except Exception:  # a bug must not end the watching, which then says that everybody is silent
                log.exception("the watch over ranks could not judge")
            if now - said >= self.interval:
                said = now
                self._tell_position()
        self._say_goodbye()

    def _say_goodbye(self) -> None:
        """To those who have called and not been heard yet, too: a connection that just closes is a crash to them."""
        self._accept()
        for key in list(self._selector.get_map().values()):
            if key.data is not None:
                with contextlib.suppress(OSError):
                    key.data.send("bye")
            key.fileobj.close()  # type: ignore[union-attr]  # sockets, all of them
        self._selector.close()

    def _accept(self) -> None:
        """Everybody who has called."""
        with contextlib.suppress(OSError):  # nobody is left, or there are no descriptors
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

    def _read(self, line: _RankLine) -> None:
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
            rank = line.rank
            if rank is not None and self._lines.get(rank) is line:
                del self._lines[rank]
                if not self.watch.ranks[rank].left:
                    if rank not in self._errors:
                        self._decide(self.watch.lost(rank, now))
                    self.watch.leave(rank)

    def _drop(self, line: _RankLine) -> None:
        self._callers.pop(line, None)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(line.connection)
        line.close()

    def _handle(self, line: _RankLine, message: dict[str, Any], now: float) -> None:
        kind = message["kind"]
        if line.rank is None:
            if kind != "hello" or not lines.knows(self._secret, message["secret"]):
                raise ValueError("unknown caller")
            member = Member.from_json(message["member"])
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
            elif self.watch.is_complete:
                members = [vars(entry.member) for entry in self.watch.ranks.values()]
                for rank in list(self._lines):
                    self._send(rank, "members", members=members)
        elif kind == "beat":
            self.watch.heard(line.rank, now, Position.from_json(message["position"]))
        elif kind == "stack":
            self._stacks[line.rank] = [clean(entry, 500) for entry in message["stack"][-200:]]
        elif kind == "bye":
            self.watch.leave(line.rank)
        elif kind == "error":
            self.watch.heard(line.rank, now, Position.from_json(message["position"]))
            self._errors[line.rank] = now
            if message.get("said"):  # whose error it is will say so, and be the one that is named
                self._handed_on.add(line.rank)
                return
            reason, details = clean(message["reason"]), clean(message["details"], LONGEST_DETAILS)
            self._decide(self.watch.error(line.rank, reason, details, int(message["exit_code"]) & 0xFF or 1, now))
            fault = self._fault
            first = fault is not None and fault.kind == "error" and fault.culprit.rank == line.rank
            self._send(line.rank, "first", first=first)

    def _judge(self, now: float) -> None:
        self._answer_errors(now)
        if self._fault is not None:
            return
        fault = self.watch.silent(now)
        if fault is not None:
            self._decide(fault)
            return
        suspects = self.watch.suspects(now)
        if not suspects:
            self._suspects = []
        elif not self._suspects:
            self._suspects, self._stacks, self._asked = suspects, {}, now
            for entry in suspects[:16]:
                self._send(entry.member.rank, "stack")
        elif now - self._asked > _STACKS_WITHIN or len(self._stacks) >= min(len(self._suspects), 16):
            self._decide(self.watch.hang(suspects, self._stacks, now))
        self._report_stragglers(now)

    def _answer_errors(self, now: float) -> None:
        """Tell a rank that raised whether to wait: rank 0 may have raised too, and be exporting what it has."""
        for rank, when in self._errors.items():
            everybody = len(self._errors) == len(self.watch.active)
            if self._fault is None and rank in self._handed_on:
                continue  # launchers end all at the first end: not before the reason has been told
            if rank not in self._answered and (everybody or now - when > _SAME_ERROR_WITHIN):
                self._answered.add(rank)
                self._send(rank, "end", wait=0 in self._errors)

    def _decide(self, fault: Fault) -> None:
        if self._fault is not None:
            return
        self._fault = fault
        for rank in list(self._lines):
            if fault.kind != "error" or rank != fault.culprit.rank:
                self._send(rank, "verdict", fault=fault.to_json())

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

    def _report_stragglers(self, now: float) -> None:
        if self.stragglers is None or not self.watch.is_complete:
            return
        active = self.watch.active
        totals = {entry.member: (entry.position.timed, entry.position.worked) for entry in active}
        step = max((entry.position.step for entry in active), default=0)
        report = self.stragglers.report(now, totals, step)
        if report is None:
            return
        if self.on_straggler_report is not None:
            try:
                self.on_straggler_report(report)
            except Exception as error:  # watching must go on
                log.warning("the report on slow ranks could not be written: %s", error)
        if report.stragglers and self.stop_if_straggler:
            member, seconds = report.stragglers[0]
            reason = (
                f"slow: {seconds:.3g} s a step where the median is {report.median:.3g} s "
                "(exp_manager.straggler_detection_params.stop_if_detected)"
            )
            place = self.watch.ranks[member.rank].position.place
            self._decide(Fault("slow", member, place, reason, places=self.watch.places(now)))


class _RankLine(lines.Line):
    """A connection whose rank is known once it has said hello."""

    rank: int | None = None
