"""Who brings the run down: judged from the heartbeats of all ranks. No threads, no sockets, no clock of its own."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_aligner_diffusion.errors import RankLostError
from nemo_aligner_diffusion.runtime.health.messages import Fault, Member, Position
from nemo_aligner_diffusion.runtime.health.processes import is_waiting

_MOST_PLACES = 64  # lines about ranks; on more, those furthest behind


@dataclass
class _Rank:
    member: Member
    position: Position = field(default_factory=Position)
    heard: float = 0.0
    left: bool = False


class Watch:
    """The heartbeats of all ranks.

    Args:
        world_size: processes of the run.
        silence: seconds without any sign of life after which a process counts as gone or stopped.
    """

    def __init__(self, world_size: int, silence: float) -> None:
        self.world_size = world_size
        self.silence = silence
        self.ranks: dict[int, _Rank] = {}

    @property
    def active(self) -> list[_Rank]:
        """Ranks that have come up and not said goodbye."""
        return [rank for rank in self.ranks.values() if not rank.left]

    @property
    def is_complete(self) -> bool:
        """Whether every rank has come up."""
        return len(self.ranks) == self.world_size

    def join(self, member: Member, now: float) -> None:
        self.ranks[member.rank] = _Rank(member, heard=now)

    def heard(self, rank: int, now: float, position: Position) -> None:
        self.ranks[rank].heard = now
        self.ranks[rank].position = position

    def leave(self, rank: int) -> None:
        self.ranks[rank].left = True

    def forgive(self, now: float, slept: float) -> None:
        """The watcher itself was stopped so long: whoever is silent may have spoken, or was stopped with it."""
        for entry in self.ranks.values():
            entry.heard = min(entry.heard + slept, now)

    def lost(self, rank: int, now: float) -> Fault:
        """Its connection closed without a goodbye."""
        reason = "the process is gone; it closed its connection without a word"
        return self._fault("lost", self.ranks[rank], reason, now)

    def silent(self, now: float) -> Fault | None:
        """A process that is connected and sends nothing: stopped, or its machine or network is gone."""
        for entry in self.active:
            if now - entry.heard > self.silence:
                reason = f"no sign of life for {now - entry.heard:.0f} s, with its connection still open"
                return self._fault("silent", entry, reason, now)
        return None

    def hanging(self, now: float) -> Fault | None:
        """Every rank is past its limit, and has said so with its stack.

        While one rank still gets on, nobody is accused: the others may just be waiting for it. Of ranks that all
        stand still, the one to blame is not in a collective call and has passed fewer marks than the rest.
        """
        active = self.active
        if not active or not all(entry.position.stack for entry in active):
            return None
        outside = [entry for entry in active if not entry.position.waiting] or active
        least = min((entry.position.step, entry.position.events) for entry in outside)
        behind = [entry for entry in outside if (entry.position.step, entry.position.events) == least]
        behind.sort(key=lambda entry: entry.member.rank)
        working = [entry for entry in behind if not is_waiting(entry.position.stack)]
        culprit = (working or behind)[0]
        idle = culprit.position.idle + now - culprit.heard
        reason = f"no progress for {idle:.0f} s; {culprit.position.limit:.0f} s is the limit"
        others = [entry for entry in active if entry is not culprit]
        if not working and len(behind) > 1:
            reason += "; every rank waits for the others in a collective call"
        elif len(others) == 1:
            reason += f"; rank {others[0].member.rank} waits for it [{others[0].position.place}]"
        elif others:
            reason += f"; {len(others)} others wait for it"
        return self._fault("hang", culprit, reason, now, "\n".join(culprit.position.stack))

    def error(self, rank: int, reason: str, details: str, exit_code: int, now: float) -> Fault:
        """It has raised."""
        return self._fault("error", self.ranks[rank], reason, now, details, exit_code)

    def slow(self, rank: int, reason: str, now: float) -> Fault:
        """It works slower than the others, and the run is to end then."""
        return self._fault("slow", self.ranks[rank], reason, now)

    def _places(self, now: float) -> tuple[str, ...]:
        """A line for each rank: where it is, and for how long."""
        entries = sorted(self.ranks.values(), key=lambda e: (e.left, e.position.step, e.position.events, e.member.rank))
        lines = []
        for entry in entries[:_MOST_PLACES]:
            position, idle = entry.position, entry.position.idle + now - entry.heard
            line = f"{entry.member}: " + ("ended" if entry.left else f"{position.place}, {idle:.1f} s")
            if position.waiting:
                line += ", in a collective call"
            lines.append(line)
        if len(entries) > _MOST_PLACES:
            lines.append(f"and {len(entries) - _MOST_PLACES} more ranks, further on")
        return tuple(lines)

    def _fault(
        self,
        kind: str,
        entry: _Rank,
        reason: str,
        now: float,
        details: str = "",
        exit_code: int = RankLostError.exit_code,
    ) -> Fault:
        place = entry.position.place
        if kind in ("lost", "silent"):  # as of its last heartbeat: it may have got further
            place = f"last heard of in {place}"
        return Fault(kind, entry.member, place, reason, details, exit_code, self._places(now))
