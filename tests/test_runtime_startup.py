"""Time to the first step: phases that add up, the file and the line a run leaves."""

from __future__ import annotations

import pytest

from nemo_aligner_diffusion.runtime.startup import Startup


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_phases_add_up_nest_and_go_on_where_they_were_left():
    clock = Clock()
    startup = Startup(clock)
    clock.now += 1.0  # nobody's: still starting
    startup.enter("imports")
    clock.now += 2.0
    with startup.phase("reading weights"):
        clock.now += 3.0
        with startup.phase("handing on"):
            clock.now += 0.25
        clock.now += 1.0
    clock.now += 0.5
    startup.enter("reading weights")
    clock.now += 1.0
    startup.finish()
    clock.now += 50.0
    startup.enter("later")  # after the first step nothing counts
    assert startup.seconds == {"start": 1.0, "imports": 2.5, "reading weights": 5.0, "handing on": 0.25}
    assert startup.summary()["first_step_seconds"] == 8.75
    assert startup.line() == "first step after 8.8 s: start 1.0, imports 2.5, reading weights 5.0, handing on 0.2"


def test_a_phase_ends_when_it_fails():
    clock = Clock()
    startup = Startup(clock)
    startup.enter("a")

    def fail() -> None:
        with startup.phase("b"):
            clock.now += 2.0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    clock.now += 1.0
    startup.finish()
    assert startup.seconds == {"start": 0.0, "a": 1.0, "b": 2.0}


def test_the_line_leaves_out_what_took_no_time():
    clock = Clock()
    startup = Startup(clock)
    startup.enter("optimizer")
    clock.now += 0.01
    startup.enter("imports")
    clock.now += 1.0
    startup.finish()
    assert startup.line() == "first step after 1.0 s: imports 1.0"
