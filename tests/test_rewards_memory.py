"""With micro-batches and activation checkpointing, a reward's peak memory does not grow with the number of pictures."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.reward_memory import SETTINGS, clip_reward, difference_in_float64, image_reward, peaks


@pytest.mark.parametrize("build", [clip_reward, image_reward])
def test_peak_is_flat_where_the_naive_graph_grows(build: Any) -> None:
    reward = build(layers=24, width=128, size=64)
    one, eight = peaks(reward, [1, 8], 128, **SETTINGS["both"])
    naive_one, naive_eight = peaks(reward, [1, 8], 128, **SETTINGS["all at once"])
    assert naive_eight > 6 * naive_one
    assert eight < 1.25 * one  # what grows: the pictures at the size the network sees, and their gradients
    assert difference_in_float64(reward, 64) < 1e-9
