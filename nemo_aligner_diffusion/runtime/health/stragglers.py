"""Which rank works slower than the others, from the seconds of its own work that each reports."""

from __future__ import annotations

from statistics import median_low

from nemo_aligner_diffusion.runtime.health.messages import Member, Position
from nemo_aligner_diffusion.runtime.settings import StragglerSettings


class StragglerWatch:
    """Compares the ranks once an interval; its argument is the time of the first look."""

    def __init__(self, settings: StragglerSettings, now: float) -> None:
        self.settings = settings
        self._compared = now
        self._before: dict[int, tuple[int, float]] = {}
        self._slow: dict[int, int] = {}  # rank -> comparisons in a row in which it was slow

    def newly_slow(self, now: float, positions: dict[Member, Position]) -> list[tuple[Member, str]]:
        """Who was slow now and in the comparison before, for the first time in a row, and how slow in words.

        Nobody while no comparison is due, and until every rank has timed a step since the last one. Of two ranks the
        slower one can be named: the lower median counts.
        """
        if now - self._compared < self.settings.report_time_interval:
            return []
        seconds = {}
        for member, position in positions.items():
            timed, worked = self._before.get(member.rank, (0, 0.0))
            if position.timed <= timed:
                return []
            seconds[member] = (position.worked - worked) / (position.timed - timed)
        self._compared = now
        self._before = {member.rank: (position.timed, position.worked) for member, position in positions.items()}
        median = median_low(seconds.values())
        found = []
        for member, own in seconds.items():
            is_slow = own > 0 and median / own < self.settings.gpu_relative_perf_threshold
            self._slow[member.rank] = self._slow.get(member.rank, 0) + 1 if is_slow else 0
            if self._slow[member.rank] == 2:  # once may be a passing disturbance
                words = f"{own:.3g} s of its own work a step, {own / median:.1f} × the median of {median:.3g} s"
                found.append((member, f"slow: {words}"))
        return found
