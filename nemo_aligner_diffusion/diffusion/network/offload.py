"""Frozen parts that are on the device in their turn alone: text encoders, decoder and reward work one after another."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


class Offload:
    """Whose turn it is. Weights of parts that are not named in ``parts`` stay where they are.

    Args:
        parts: by the names of ``model.offload``; outside of its turn a part's weights are in the host's memory.

    Attributes:
        here: names of the parts whose turn it is.
    """

    def __init__(self, parts: Mapping[str, nn.Module] | None = None) -> None:
        self.parts = dict(parts or {})
        self.here: set[str] = set()

    def bring(self, name: str, device: torch.device) -> None:
        """``name``'s turn begins: before it is called."""
        if name in self.parts and name not in self.here:
            self.parts[name].to(device)
            self.here.add(name)

    def end(self, device: torch.device) -> None:
        """All parts stay on ``device`` from here on: the model is whole again for whoever uses it next."""
        for name in self.parts:
            self.parts[name].to(device)
        self.parts, self.here = {}, set()

    def release(self, *names: str) -> None:
        """The turns of ``names`` end, without any of all: when no graph needs their weights any more."""
        for name in names or self.parts:
            if name in self.parts:  # whether or not it was brought: Lightning moves all to the device before it begins
                self.parts[name].to("cpu")
                self.here.discard(name)
