"""What to do when a reward or a gradient is NaN or infinite: skip the update, say where, give up after a while."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nemo_aligner_diffusion.errors import NumericalError
from nemo_aligner_diffusion.parallel.broadcast import gather
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
        bad = {name: ~torch.isfinite(torch.as_tensor(value).detach()) for name, value in values.items()}
        mine = [name for name, which in bad.items() if which.any()]
        if not mine:
            self.consecutive = 0
            return False

        # a per-prompt reward points closer than the gradient norm, which concerns the whole batch of every rank
        per_prompt = [bad[name].tolist() for name in mine if bad[name].shape == (len(prompts),)]
        worst = min(per_prompt, key=sum, default=[False] * len(prompts))
        named = [prompt for prompt, is_bad in zip(prompts, worst, strict=True) if is_bad]
        ranks = gather((mine, named, list(prompts)))
        culprits = list(dict.fromkeys(prompt for _, some, _ in ranks for prompt in some))
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


def _quote(prompts: Sequence[str], limit: int = 3) -> str:
    if not prompts:
        return ""
    shown = ", ".join(repr(prompt if len(prompt) <= 80 else prompt[:77] + "...") for prompt in prompts[:limit])
    rest = len(prompts) - limit
    return f" for prompt{'s' if len(prompts) > 1 else ''} {shown}" + (f" and {rest} more" if rest > 0 else "")
