"""What to do when a reward or a gradient is NaN or infinite: skip the update, say where, give up after a while."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nemo_aligner_diffusion.errors import ConfigurationError, NumericalError
from nemo_aligner_diffusion.runtime.process import this_process

log = logging.getLogger(__name__)


class NonFinitePolicy:
    """Decides, once per optimizer step, whether the update must be skipped (``model.nan_policy``).

    Ask it when the gradients are complete (accumulated, averaged over ranks, unscaled), and to skip the update, take
    them away: ``optimizer.zero_grad(set_to_none=True)``. An optimizer that meets ``grad is None`` leaves the parameter
    *and its moments* untouched, so the skipped step has no trace in the weights, nor in the state that a checkpoint
    saves. Zero gradients would not do: Adam would still move along its first moment, and decay the weights.

    Args:
        max_consecutive: skips in a row that are tolerated; one more raises. 0 raises at the first.
    """

    def __init__(self, max_consecutive: int = 5) -> None:
        if max_consecutive < 0:
            raise ConfigurationError(f"model.nan_policy.max_consecutive={max_consecutive}: expected 0 or more")
        self.max_consecutive = max_consecutive
        self.consecutive = 0
        self.skipped = 0
        self.events: list[dict[str, Any]] = []  # the first hundred, for the report

    def check(self, step: int, prompts: Sequence[str], **values: Any) -> bool:
        """True if the update of this step must be skipped; then a collective call: all ranks come to the same answer.

        Args:
            step: the optimizer step, counted from 1 as in metrics.csv.
            prompts: those of this rank's batch; where a value holds one number per prompt, only those at fault are
                named, on whatever rank they are.
            **values: what to look at, by name (``reward=…, grad_norm=…``): numbers, tensors, or sequences of numbers.

        Raises:
            NumericalError: this is number ``max_consecutive + 1`` in a row.
        """
        numbers = {name: _numbers(value) for name, value in values.items()}
        bad = {
            name: [i for i, number in enumerate(some) if not math.isfinite(number)] for name, some in numbers.items()
        }
        if not any(bad.values()):
            self.consecutive = 0
            return False

        # a per-prompt reward points closer than the gradient norm, which concerns the whole batch of every rank
        closer = [
            bad[name] for name in bad if bad[name] and len(numbers[name]) == len(prompts) and _is_many(values[name])
        ]
        mine = [prompts[index] for index in min(closer, key=len, default=[])]
        ranks = _of_all_ranks(({name for name in bad if bad[name]}, mine, list(prompts)))
        culprits = list(dict.fromkeys(prompt for _, named, _ in ranks for prompt in named))
        culprits = culprits or list(dict.fromkeys(prompt for *_, whole in ranks for prompt in whole))
        found = [name for name in values if any(name in there for there, *_ in ranks)]
        self.consecutive += 1
        self.skipped += 1
        what = " and ".join(found)
        verb = "are" if len(found) > 1 else "is"
        event = {"step": step, "what": what, "prompts": culprits}
        if len(self.events) < 100:
            self.events.append(event)
        message = f"step {step}: {what} {verb} not finite{_quote(culprits)}"
        if self.consecutive > self.max_consecutive:
            raise NumericalError(
                f"{message}; that is {self.consecutive} in a row, and model.nan_policy.max_consecutive="
                f"{self.max_consecutive} allows no more. No NaN was written into the weights. Lower model.optim.lr, "
                "lower gradient_clip_val, use trainer.precision=32, or look at the prompts named."
            )
        log.log(
            logging.WARNING if this_process().is_rank_zero else logging.DEBUG,
            "%s; the update is skipped (%d in a row, stopping after %d)",
            message,
            self.consecutive,
            self.max_consecutive,
        )
        return True

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: a run that is resumed goes on counting."""
        return {"consecutive": self.consecutive, "skipped": self.skipped, "events": list(self.events)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.consecutive, self.skipped = int(state["consecutive"]), int(state["skipped"])
        self.events = [dict(event) for event in state["events"]]


def _of_all_ranks(value: Any) -> list[Any]:
    from nemo_aligner_diffusion.parallel.broadcast import gather  # torch, only where there is something to say

    return gather(value)


def _is_many(value: Any) -> bool:
    """Whether it is meant as one number for each prompt, be it a batch of one."""
    return value.dim() > 0 if hasattr(value, "dim") else isinstance(value, Iterable)


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
