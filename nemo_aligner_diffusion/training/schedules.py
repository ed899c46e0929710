"""Learning-rate schedules by the names and with the numbers of NeMo (``model.optim.sched``), per optimizer step.

Each is a factor on the peak rate as a function of the number of optimizer steps already taken. ``LambdaLR`` keeps no
copy of that function in its state, so a run resumed with a larger ``max_steps`` follows the *new* schedule.
Source of the formulas: ``nemo/core/optim/lr_scheduler.py`` (``WarmupHoldPolicy``, ``CosineAnnealing``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.training.optimizers import _did_you_mean

SCHEDULE_NAMES = ("WarmupHoldPolicy", "CosineAnnealing", "constant")
_KEYS = {
    "WarmupHoldPolicy": {"warmup_steps", "warmup_ratio", "hold_steps", "hold_ratio", "min_lr"},
    "CosineAnnealing": {"warmup_steps", "warmup_ratio", "hold_steps", "constant_steps", "constant_ratio", "min_lr"},
    "constant": {"warmup_steps", "warmup_ratio"},
}
_FOREVER = 10**12  # NeMo's configurations hold for 10,000,000,000,000 steps to say "for good"
_NO_EFFECT = {"last_epoch", "max_steps", "monitor", "reduce_on_plateau"}  # set by NeMo's machinery, not by users


def build_schedule(
    optimizer: torch.optim.Optimizer, sched_cfg: Mapping[str, Any] | None, max_steps: int | None
) -> LRScheduler:
    """The schedule that ``model.optim.sched`` names; step it once per optimizer step (Lightning ``interval: step``).

    - ``WarmupHoldPolicy``: linear from ``lr/(warmup_steps+1)`` to ``lr`` over ``warmup_steps``, then ``lr`` for good.
      In NeMo too the rate stays at ``lr`` after ``hold_steps``, and drops to ``min_lr`` only past ``max_steps``.
    - ``CosineAnnealing``: the warmup, ``hold_steps`` at ``lr``, then half a cosine down to ``min_lr`` at
      ``max_steps - constant_steps``, then ``min_lr``. With ``constant_steps`` the warmup starts from 0, as in
      Megatron-LM and NeMo. ``hold_steps`` is ours (NeMo has none there); a hold "for good", which is what
      ``WarmupHoldPolicy``'s settings leave behind when only the name is changed, counts as none.
    - ``constant``: ``lr``, after the warmup if one is set.

    Args:
        optimizer: its groups' ``lr`` is the peak rate.
        sched_cfg: ``name`` and its numbers; ``None`` or ``name: null`` means constant.
        max_steps: optimizer steps of the whole run; ``None`` or -1 if open (then no ratios and no cosine).

    Raises:
        ConfigurationError: unknown name or key, or numbers that do not fit together.
    """
    cfg = {key: value for key, value in dict(sched_cfg or {}).items() if value is not None}
    name = str(cfg.pop("name", "constant"))
    by_lower = {known.lower(): known for known in SCHEDULE_NAMES}
    if name.lower() not in by_lower:
        raise ConfigurationError(
            f"model.optim.sched.name={name!r} is not a schedule here; the known ones are "
            f"{', '.join(SCHEDULE_NAMES)}{_did_you_mean(name, SCHEDULE_NAMES)}"
        )
    name = by_lower[name.lower()]
    for key in set(cfg) - _KEYS[name] - _NO_EFFECT:
        known = {other for keys in _KEYS.values() for other in keys}
        if key not in known:
            raise ConfigurationError(f"unknown key model.optim.sched.{key}{_did_you_mean(key, known)}")
        # a key of another schedule: configuration groups share them, and NeMo ignores them too
    total = None if max_steps is None or max_steps < 0 else int(max_steps)
    min_lr = float(cfg.get("min_lr", 0.0))
    factor: Callable[[int, float], float]
    if name == "WarmupHoldPolicy":
        factor = _warmup_hold(_steps(cfg, "warmup", total), total)
    elif name == "CosineAnnealing":
        hold = _steps(cfg, "hold", total)
        factor = _cosine(
            _steps(cfg, "warmup", total), 0 if hold >= _FOREVER else hold, _steps(cfg, "constant", total), total
        )
    else:
        factor = _warmup_hold(_steps(cfg, "warmup", total), None)
    functions = []
    for group in optimizer.param_groups:
        peak = float(group["lr"])
        if min_lr > peak:
            raise ConfigurationError(f"model.optim.sched.min_lr={min_lr} is above model.optim.lr={peak}")
        functions.append(_scaled(factor, min_lr / peak if peak else 0.0))
    return LambdaLR(optimizer, functions)


def _scaled(factor: Callable[[int, float], float], floor: float) -> Callable[[int], float]:
    # A function, not a partial or an object: LambdaLR puts the attributes of callable objects into its state.
    def at(step: int) -> float:
        return factor(step, floor)

    return at


def _warmup_hold(warmup: int, total: int | None) -> Callable[[int, float], float]:
    def factor(step: int, floor: float) -> float:
        if warmup > 0 and step <= warmup:
            return (step + 1) / (warmup + 1)
        return floor if total is not None and step > total else 1.0

    return factor


def _cosine(warmup: int, hold: int, constant: int, total: int | None) -> Callable[[int, float], float]:
    if total is None:
        raise ConfigurationError(
            "model.optim.sched.name=CosineAnnealing needs the length of the run: set trainer.max_steps"
        )
    decay = total - warmup - hold - constant
    if decay <= 0:
        raise ConfigurationError(
            f"model.optim.sched: warmup_steps={warmup}, hold_steps={hold} and constant_steps={constant} leave no step "
            f"of max_steps={total} for the cosine; lower them or raise max_steps"
        )

    def factor(step: int, floor: float) -> float:
        if warmup > 0 and step <= warmup:
            return step / warmup if constant else (step + 1) / (warmup + 1)
        done = min(max((step - warmup - hold) / decay, 0.0), 1.0)
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))

    return factor


def _steps(cfg: Mapping[str, Any], which: str, total: int | None) -> int:
    steps, ratio = cfg.get(f"{which}_steps"), cfg.get(f"{which}_ratio")
    if steps is not None and ratio is not None:
        raise ConfigurationError(f"model.optim.sched: give {which}_steps or {which}_ratio, not both")
    if ratio is not None:
        if total is None:
            raise ConfigurationError(f"model.optim.sched.{which}_ratio needs trainer.max_steps")
        if not 0 <= float(ratio) <= 1:
            raise ConfigurationError(f"model.optim.sched.{which}_ratio={ratio}: expected a share between 0 and 1")
        return int(float(ratio) * total)
    if steps is None:
        return 0
    if float(steps) != int(steps) or int(steps) < 0:
        raise ConfigurationError(f"model.optim.sched.{which}_steps={steps}: expected a whole number of at least 0")
    return int(steps)
