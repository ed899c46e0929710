"""Learning-rate schedules by the names and with the numbers of NeMo (``model.optim.sched``), per optimizer step.

Each is a factor on the peak rate as a function of the number of optimizer steps already taken. ``LambdaLR`` keeps no
copy of that function in its state, so a run resumed with a larger ``max_steps`` follows the *new* schedule.
Source of the formulas: ``nemo/core/optim/lr_scheduler.py`` (``WarmupHoldPolicy``, ``CosineAnnealing``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.settings import SHARE, Settings, choice, integer, number, setting

if TYPE_CHECKING:
    import torch
    from torch.optim.lr_scheduler import LRScheduler

# name in `model.optim.sched` -> what it reads beside the warm-up
SCHEDULES: dict[str, tuple[str, ...]] = {
    "WarmupHoldPolicy": ("min_lr",),
    "CosineAnnealing": ("hold_steps", "hold_ratio", "constant_steps", "constant_ratio", "min_lr"),
    "constant": (),
}
# Two ways to say one thing: who gives one of them takes the other back.
EITHER_OR: dict[str, str] = {
    f"model.optim.sched.{name}_{way}": f"model.optim.sched.{name}_{other}"
    for name in ("warmup", "hold", "constant")
    for way, other in (("steps", "ratio"), ("ratio", "steps"))
}
_FOREVER = 10**12  # NeMo's configurations hold for 10,000,000,000,000 steps to say "for good"

Factor = Callable[[int, float], float]  # (optimizer steps taken, min_lr / peak) -> share of the peak


@dataclass(frozen=True)
class ScheduleSettings(Settings):
    """Learning-rate schedule.

    - ``WarmupHoldPolicy``: linear from ``lr/(warmup_steps+1)`` to ``lr`` over ``warmup_steps``, then ``lr`` for good.
      In NeMo too the rate stays at ``lr`` after ``hold_steps``, and drops to ``min_lr`` only past ``max_steps``.
    - ``CosineAnnealing``: the warmup, ``hold_steps`` at ``lr``, then half a cosine down to ``min_lr`` at
      ``max_steps - constant_steps``, then ``min_lr``. With ``constant_steps`` the warmup starts from 0, as in
      Megatron-LM and NeMo. ``hold_steps`` is ours (NeMo has none there); a hold "for good", which is what
      ``WarmupHoldPolicy``'s settings leave behind when only the name is changed, counts as none.
    - ``constant``: ``lr``, after the warmup if one is set.
    """

    section = "model.optim.sched"
    title = "Learning-rate schedule"

    name: str = setting("CosineAnnealing", choice(*SCHEDULES), "WarmupHoldPolicy, CosineAnnealing or constant")
    warmup_steps: int | None = setting(
        0,
        integer(0, nullable=True),
        "optimizer steps of the rise; integer >= 0; or warmup_ratio, a share of all steps",
    )
    warmup_ratio: float | None = setting(
        None, SHARE, "in place of warmup_steps: their share of all optimizer steps; in [0, 1]"
    )
    hold_steps: int | None = setting(
        None,
        integer(0, nullable=True),
        "CosineAnnealing: optimizer steps at the full rate between rise and fall; integer >= 0; WarmupHoldPolicy holds "
        "it to the end whatever stands here",
    )
    hold_ratio: float | None = setting(
        None, SHARE, "in place of hold_steps: their share of all optimizer steps; in [0, 1]"
    )
    constant_steps: int | None = setting(
        0,
        integer(0, nullable=True),
        "CosineAnnealing: last optimizer steps, spent at min_lr; integer >= 0; or constant_ratio",
    )
    constant_ratio: float | None = setting(
        None, SHARE, "in place of constant_steps: their share of all optimizer steps; in [0, 1]"
    )
    min_lr: float = setting(
        0.0,
        number(0),
        "learning rate at the end of CosineAnnealing, and of WarmupHoldPolicy past the run's max_steps; >= 0",
    )

    def unread(self) -> dict[str, str]:
        read = ("name", "warmup_steps", "warmup_ratio", *SCHEDULES[self.name])
        reason = f"model.optim.sched.name={self.name} does not read it"
        return {field: reason for field in self.kinds() if field not in read}

    def factor(self, max_steps: int) -> Factor:
        """The schedule of a run of ``max_steps`` optimizer steps.

        Raises:
            ConfigurationError: the numbers do not fit together.
        """
        warmup = self._steps("warmup", max_steps)
        if self.name != "CosineAnnealing":
            return _warmup_hold(warmup, max_steps if self.name == "WarmupHoldPolicy" else None)
        hold, constant = self._steps("hold", max_steps), self._steps("constant", max_steps)
        hold = 0 if hold >= _FOREVER else hold
        decay = max_steps - warmup - hold - constant
        if decay <= 0:
            raise ConfigurationError(
                f"model.optim.sched: warmup_steps={warmup}, hold_steps={hold} and constant_steps={constant} leave no "
                f"step of max_steps={max_steps} for the cosine; lower them or raise max_steps"
            )
        return _cosine(warmup, hold, decay, from_zero=constant > 0)

    def _steps(self, which: str, max_steps: int) -> int:
        steps, ratio = getattr(self, f"{which}_steps"), getattr(self, f"{which}_ratio")
        if ratio is None:
            return steps or 0
        if steps:
            raise ConfigurationError(f"model.optim.sched: give {which}_steps or {which}_ratio, not both")
        return int(ratio * max_steps)


def build_schedule(optimizer: torch.optim.Optimizer, settings: ScheduleSettings, max_steps: int) -> LRScheduler:
    """The schedule, to be stepped once per optimizer step (Lightning ``interval: step``).

    Args:
        optimizer: its groups' ``lr`` is the peak rate.
        max_steps: as for :meth:`ScheduleSettings.factor`.

    Raises:
        ConfigurationError: numbers that do not fit together.
    """
    from torch.optim.lr_scheduler import LambdaLR

    factor = settings.factor(max_steps)
    return LambdaLR(optimizer, [_scaled(factor, settings.min_lr / group["lr"]) for group in optimizer.param_groups])


def _scaled(factor: Factor, floor: float) -> Callable[[int], float]:
    # A function, not a partial or an object: LambdaLR puts the attributes of callable objects into its state.
    def at(step: int) -> float:
        return factor(step, floor)

    return at


def _warmup_hold(warmup: int, end: int | None) -> Factor:
    def factor(step: int, floor: float) -> float:
        if warmup > 0 and step <= warmup:
            return (step + 1) / (warmup + 1)
        return floor if end is not None and step > end else 1.0

    return factor


def _cosine(warmup: int, hold: int, decay: int, from_zero: bool) -> Factor:
    def factor(step: int, floor: float) -> float:
        if warmup > 0 and step <= warmup:
            return step / warmup if from_zero else (step + 1) / (warmup + 1)
        done = min(max((step - warmup - hold) / decay, 0.0), 1.0)
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))

    return factor
