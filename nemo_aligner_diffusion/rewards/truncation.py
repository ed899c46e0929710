"""Prompts that a reward's text model cannot read to the end: counted, and said in the log."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


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
