"""Which steps of a sampled trajectory are supervised, and where the reward looks. Imports no torch.

Every direct-gradient method is a *plan* over one trajectory of a pipeline's own loop (design notes, section 2). Steps
are calls of ``scheduler.step``, counted from pure noise: ``z_{i+1} = S_i(z_i, e_i)``, ``e_i`` the guided prediction.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from nemo_aligner_diffusion.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor


class SamplingPath(Protocol):
    """What a plan may know of the trajectory before it begins (:class:`.schedule.SchedulerPath`).

    Attributes:
        steps: ``T``, the number of ``scheduler.step`` calls.
        levels: ``(α_i, σ_i)`` of ``z_i = α_i x + σ_i n`` for ``i = 0 … T``, in the scheduler's own variable; the last
            is ``(1, 0)``.
        weights: ``a_i``, the factor of ``e_i`` in ``z_T`` through the solver alone (Euler on a flow:
            ``σ_{i+1} − σ_i``).
        flow: whether ``z = (1 − σ) x + σ n`` and the network predicts ``n − x``.
    """

    @property
    def steps(self) -> int: ...

    @property
    def levels(self) -> Sequence[tuple[float, float]]: ...

    @property
    def weights(self) -> Sequence[float]: ...

    @property
    def flow(self) -> bool: ...

    def clean(self, step: int, latents: Tensor, prediction: Tensor) -> Tensor:
        """The clean-latent estimate ``Ẑ``: ``x`` of ``z = α x + σ n`` and the prediction."""
        ...

    def noise(self, step: int, latents: Tensor, prediction: Tensor) -> Tensor:
        """``n``, from the same two equations."""
        ...


class Trace(Protocol):
    """What a surrogate is built from, in the middle of a trajectory.

    Attributes:
        path: see :class:`SamplingPath`.
        latents: ``z_0 … z_i``, each ``(B, …)``, with the gradient that the loop gave them.
        predictions: guided ``e_i`` of the steps so far; those of active steps with gradient.
    """

    @property
    def path(self) -> SamplingPath: ...

    @property
    def latents(self) -> Sequence[Tensor]: ...

    @property
    def predictions(self) -> Mapping[int, Tensor]: ...

    def connect(self, estimate: Tensor, value: Tensor) -> Tensor:
        """``ẑ + sg[z − ẑ]``: the value of ``value``, to the bit, and the gradient of ``estimate``."""
        ...

    def share(self, tensor: Tensor, factor: float) -> Tensor:
        """``α x + (1 − α) sg[x]``: the value of ``x``, to the bit, and ``α`` times its gradient."""
        ...


@dataclass(frozen=True)
class Plan:
    """One draw of a method's rule.

    Attributes:
        active: steps whose network calls carry gradient to the parameters; at least one, unless ``renoise``.
        cut: the network's input at active steps is ``sg[z_i]``: the gradient reaches earlier steps only through the
            solver's own dependence on ``z_i``, never through the network's Jacobian (DRTune).
        input_share: step → the share of its gradient that the network's input keeps there, in place of ``cut``.
        gain: step → a factor on the gradient of its guided prediction; its value stays.
        stop: the reward reads the clean estimate ``Ẑ_stop`` and the trajectory ends there; ``None``: it reads ``z_T``.
        renoise: noise the finished ``z_T`` this many times to the level of the last step, and supervise that one step
            from each (DRaFT-LV); 0: off.
        own_step: with ``renoise``: supervise the trajectory's own last step too, as one read more.
    """

    active: tuple[int, ...]
    cut: bool = False
    input_share: Mapping[int, float] = field(default_factory=dict)
    gain: Mapping[int, float] = field(default_factory=dict)
    stop: int | None = None
    renoise: int = 0
    own_step: bool = False

    def carry(self, step: int, latents: Tensor, trace: Trace) -> Tensor:
        """What goes on as ``z_step`` (``step`` = 1 … T) in place of the solver's ``latents``; must have their value.

        A surrogate overrides this (LeapAlign): it returns ``trace.connect(its own estimate, latents)``.
        """
        return latents

    def sample_weights(self, trace: Trace) -> Tensor | None:
        """A factor ``(B,)`` on each sample's loss, without gradient; asked at the end. ``None``: 1."""
        return None

    @property
    def network_reads(self) -> int:
        """Latents that are decoded and scored."""
        return self.renoise + self.own_step if self.renoise else 1


PlanRule = Callable[[SamplingPath, random.Random], Plan]  # drawn once an optimizer step, equal on every rank


def check_plan(plan: Plan, steps: int) -> None:
    """Raise ``ValueError`` for a plan that names steps outside of a trajectory of ``steps`` steps."""
    if not (isinstance(plan.renoise, int) and plan.renoise >= 0):
        raise ValueError(f"renoise must be an integer of 0 or more, got {plan.renoise!r}")
    if plan.stop is not None and not _is_step(plan.stop, steps - 1):
        raise ValueError(f"the plan stops at step {plan.stop!r}, but the trajectory has the steps 0 … {steps - 1}")
    if plan.renoise:
        if plan.stop is not None:
            raise ValueError("a plan that re-noises z_T cannot also stop early")
        if steps < 2:
            raise ValueError("a plan that re-noises z_T (DRaFT-LV) needs 2 sampling steps or more, got 1")
        return
    last = steps - 1 if plan.stop is None else plan.stop
    within = f"0 … {last}" + ("" if plan.stop is None else ", where the plan stops")
    active = plan.active
    if not isinstance(active, (tuple, list)) or not active or not all(_is_step(i, last) for i in active):
        raise ValueError(f"active steps must be integers in {within}, at least one, in a tuple; got {active!r}")
    for name, factors in (("input_share", plan.input_share), ("gain", plan.gain)):
        if not isinstance(factors, Mapping) or not all(_is_step(i, last) for i in factors):
            raise ValueError(f"{name} must map steps in {within} to numbers; got {factors!r}")


def drawn(rule: PlanRule, path: SamplingPath, rng: random.Random) -> Plan:
    """A rule's plan, checked.

    Raises:
        ConfigurationError: it names steps that the trajectory does not have.
    """
    plan = rule(path, rng)
    try:
        check_plan(plan, path.steps)
    except ValueError as error:
        raise ConfigurationError(f"{type(plan).__name__} for {path.steps} sampling steps: {error}") from error
    return plan


def _is_step(step: object, last: int) -> bool:
    return isinstance(step, int) and not isinstance(step, bool) and 0 <= step <= last
