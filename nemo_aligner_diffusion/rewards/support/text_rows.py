"""What a reward's text model makes of each prompt, kept; and prompts that it cannot read to the end, counted."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nemo_aligner_diffusion.rewards.support.micro_batches import own_precision

logger = logging.getLogger(__name__)


class TextRows:
    """Embeddings of prompts, without gradient, computed once.

    Args:
        size: prompts whose rows are kept.
    """

    def __init__(self, size: int = 4096) -> None:
        self.size = size
        self._rows: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, embed: Callable[[str], Tensor], prompts: Sequence[str], device_type: str) -> Tensor:
        """``(B, D)``; ``embed`` makes a row ``(D,)`` of a prompt."""
        found = {prompt: self._rows[prompt] for prompt in prompts if prompt in self._rows}
        # Inference mode is left, not only entered: its tensors, once kept, could never meet autograd again.
        with torch.inference_mode(False), torch.no_grad(), own_precision(device_type):
            for prompt in dict.fromkeys(prompts):
                # One at a time, which is cheap beside making a picture: in a batch the last digits would depend on the
                # neighbours, so on what happened to be kept, and a resumed run would differ from one that went on.
                if prompt not in found:
                    found[prompt] = embed(prompt)
                self._rows[prompt] = found[prompt]
                self._rows.move_to_end(prompt)
        while len(self._rows) > self.size:
            self._rows.popitem(last=False)
        return torch.stack([found[prompt] for prompt in prompts])

    def __len__(self) -> int:
        return len(self._rows)

    def clear(self) -> None:
        """Forget all: the weights changed, or moved to another device or dtype."""
        self._rows.clear()


class TruncationCounter:
    """Counts truncated prompts; warns at the 1st, 10th, 100th, …: a count, not a flood.

    Attributes:
        max_length: tokens a prompt may have.
        prompts: how many were truncated so far.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.prompts = 0

    def count(self, prompt: str) -> None:
        self.prompts += 1
        if str(self.prompts).rstrip("0") == "1":
            logger.warning(
                "%d prompt(s) so far are longer than the reward's %d tokens and were truncated; the latest: %.80r",
                self.prompts,
                self.max_length,
                prompt,
            )
