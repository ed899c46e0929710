"""What to do when a reward or a gradient is NaN or infinite: skip the update, say where, give up after a while."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from nemo_aligner_diffusion.errors import ConfigurationError, NumericalError

log = logging.getLogger(__name__)


class NonFinitePolicy:
    """Decides, once per optimizer step, whether the update must be skipped (``model.nan_policy``).

    Use it under Lightning's automatic optimisation in ``configure_gradient_clipping``: the last hook before the
    optimizer acts, where the gradients are complete (accumulated, averaged over ranks, unscaled)::

        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            grad_norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
            if self.policy.check(step, prompts, reward=reward, grad_norm=grad_norm):
                drop_gradients(optimizer)
                return
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    An optimizer that meets ``grad is None`` leaves the parameter *and its moments* untouched, so the skipped step has
    no trace in the weights, nor in the state that a checkpoint saves. Zero gradients would not do: Adam would still
    move along its first moment, and decay the weights.

    Args:
        max_consecutive: skips in a row that are tolerated; one more raises. 0 raises at the first.
        any_rank: turns this rank's finding into that of any rank, so that all skip together
            (``lambda bad: trainer.strategy.reduce_boolean_decision(bad, all=False)``). ``None`` on one process.
    """

    def __init__(self, max_consecutive: int = 5, any_rank: Callable[[bool], bool] | None = None) -> None:
        if max_consecutive < 0:
            raise ConfigurationError(f"model.nan_policy.max_consecutive={max_consecutive}: expected 0 or more")
        self.max_consecutive = max_consecutive
        self.any_rank = any_rank
        self.consecutive = 0
        self.skipped = 0
        self.events: list[dict[str, Any]] = []  # the first hundred, for the report

    def check(self, step: int, prompts: Sequence[str], **values: Any) -> bool:
        """True if the update of this step must be skipped.

        Args:
            step: the optimizer step, counted from 1 as in metrics.csv.
            prompts: those of this rank's batch; where a value holds one number per prompt, only those at fault are
                named.
            **values: what to look at, by name (``reward=…, grad_norm=…``): numbers, tensors, or sequences of numbers.

        Raises:
            NumericalError: this is number ``max_consecutive + 1`` in a row.
        """
        found: dict[str, list[int]] = {}
        for name, value in values.items():
            numbers = _numbers(value)
            bad = [index for index, number in enumerate(numbers) if not math.isfinite(number)]
            if bad:
                found[name] = bad if len(numbers) == len(prompts) else list(range(len(prompts)))
        here = bool(found)
        anywhere = self.any_rank(here) if self.any_rank is not None else here
        if not anywhere:
            self.consecutive = 0
            return False

        self.consecutive += 1
        self.skipped += 1
        # a per-prompt reward points closer than the gradient norm, which concerns the whole batch
        at_fault = min(found.values(), key=len) if found else []
        culprits = [prompts[index] for index in at_fault]
        what = " and ".join(found) if found else "a value on another process"
        verb = "are" if len(found) > 1 else "is"
        event = {"step": step, "what": what, "prompts": culprits}
        if len(self.events) < 100:
            self.events.append(event)
        message = f"step {step}: {what} {verb} not finite{_quote(culprits)}"
        if self.consecutive > self.max_consecutive:
            raise NumericalError(
                f"{message}; that is {self.consecutive} in a row, and model.nan_policy.max_consecutive="
                f"{self.max_consecutive} allows no more. No NaN was written into the weights. Lower model.optim.lr, "
                "set trainer.draftp_sd.gradient_clip_val, use trainer.precision=32, or look at the prompts named."
            )
        log.warning(
            "%s; the update is skipped (%d in a row, stopping after %d)",
            message,
            self.consecutive,
            self.max_consecutive,
        )
        return True


def drop_gradients(optimizer: Any) -> None:
    """Make the coming ``optimizer.step()`` a no-op: no gradient, so neither weights nor moments change.

    Args:
        optimizer: a torch optimizer or Lightning's wrapper of one (anything with ``param_groups``).
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def _numbers(value: Any) -> list[float]:
    if hasattr(value, "detach"):  # a tensor, without importing torch for it
        return [float(number) for number in value.detach().float().flatten().tolist()]
    if isinstance(value, Iterable):
        return [float(number) for number in value]
    return [float(value)]


def _quote(prompts: Sequence[str], limit: int = 3) -> str:
    if not prompts:
        return ""
    shown = ", ".join(repr(prompt if len(prompt) <= 80 else prompt[:77] + "...") for prompt in prompts[:limit])
    rest = len(prompts) - limit
    return f" for prompt{'s' if len(prompts) > 1 else ''} {shown}" + (f" and {rest} more" if rest > 0 else "")
