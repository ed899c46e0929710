"""Oracle 4: the denoiser's activation memory does not grow with the number of active steps."""

from __future__ import annotations

import pytest
from tiny.stable_diffusion import tiny_stable_diffusion

from benchmarks.memory_vs_active_steps import step_peak_bytes
from nemo_aligner_diffusion.diffusion.lora import add_lora

STEPS = 10


@pytest.mark.parametrize("cut", [False, True])
def test_oracle_4_peak_is_flat_where_the_naive_graph_grows(cut):
    model = tiny_stable_diffusion(channels=(96, 96))  # activations well above the latents that are held
    add_lora(model.denoiser, rank=2)
    step_peak_bytes(model, 1, STEPS, cut, True)  # one-time allocations
    # Uncut, a single active step is a little cheaper than any other number: no gradient passes the layers before the
    # first adapter, so that they save nothing.
    one, two, eight, all_steps = (step_peak_bytes(model, active, STEPS, cut, True) for active in (1, 2, 8, STEPS))
    assert eight < (1.05 if cut else 1.15) * one
    assert all_steps < 1.05 * two
    assert step_peak_bytes(model, 8, STEPS, cut, False) > 2.5 * one
