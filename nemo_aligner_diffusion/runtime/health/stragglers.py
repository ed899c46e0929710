"""Which rank works slower than the others, from the seconds of its own work that each reports."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median_low

from nemo_aligner_diffusion.runtime.health.messages import Member

REPORTS_IN_A_ROW = 2  # a rank is named once it has been slow for so many reports: one may be a passing disturbance


@dataclass(frozen=True)
class StragglerReport:
    """Own work an optimizer step, over the time since the last report.

    Attributes:
        step: optimizer steps done.
        median: seconds; the lower median of all ranks, so that of two ranks the slower one can be named.
        slowest: the rank that took longest, and ``seconds``: how long.
        stragglers: ranks below the threshold in :data:`REPORTS_IN_A_ROW` reports, with their seconds; slowest first.
    """

    step: int
    median: float
    slowest: Member
    seconds: float
    stragglers: tuple[tuple[Member, float], ...]


class StragglerWatch:
    """Args:
    interval: seconds between reports.
    threshold: a rank is slow if ``median / its own seconds`` is below it; in (0, 1).
    """

    def __init__(self, interval: float, threshold: float, now: float) -> None:
        self.interval = interval
        self.threshold = threshold
        self._reported = now
        self._before: dict[int, tuple[int, float]] = {}
        self._slow: dict[int, int] = {}

    def report(self, now: float, totals: dict[Member, tuple[int, float]], step: int) -> StragglerReport | None:
        """A report if one is due and every rank has timed a step since the last.

        Args:
            totals: steps timed and seconds worked since the run began, of every rank.
        """
        if now - self._reported < self.interval or len(totals) < 2:
            return None
        seconds: dict[Member, float] = {}
        for member, (timed, worked) in totals.items():
            timed_before, worked_before = self._before.get(member.rank, (0, 0.0))
            if timed <= timed_before:
                return None
            seconds[member] = (worked - worked_before) / (timed - timed_before)
        self._reported = now
        self._before = {member.rank: total for member, total in totals.items()}
        median = median_low(seconds.values())
        order = sorted(seconds, key=lambda member: -seconds[member])
        for member in order:
            slow = seconds[member] > 0 and median / seconds[member] < self.threshold
            self._slow[member.rank] = self._slow.get(member.rank, 0) + 1 if slow else 0
        named = [(m, seconds[m]) for m in order if self._slow[m.rank] >= REPORTS_IN_A_ROW]
        return StragglerReport(step, median, order[0], seconds[order[0]], tuple(named))
