"""Time to the first step: phases that add up, the file and the line a run leaves."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from nemo_aligner_diffusion.runtime.startup import Startup, begin, process_age, summary, take


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_phases_add_up_nest_and_go_on_where_they_were_left():
    clock = Clock()
    startup = Startup(clock, age=0.5)
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
    assert startup.seconds == {"python": 1.5, "imports": 2.5, "reading weights": 5.0, "handing on": 0.25}
    assert startup.total == 9.25
    assert startup.line() == "first step after 9.2 s: python 1.5, imports 2.5, reading weights 5.0, handing on 0.2"


def test_a_phase_ends_when_it_fails():
    clock = Clock()
    startup = Startup(clock, age=0.0)
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


def test_a_run_takes_what_its_command_line_began_once():
    begun = begin()
    assert take() is begun
    assert take() is not begun


def test_the_line_leaves_out_what_took_no_time():
    clock = Clock()
    startup = Startup(clock, age=0.0)
    startup.enter("optimizer")
    clock.now += 0.01
    startup.enter("imports")
    clock.now += 1.0
    startup.finish()
    assert startup.line() == "first step after 1.0 s: imports 1.0"


def test_of_several_processes_the_slowest_is_named():
    found = summary([{"imports": 2.0, "reading weights": 5.0}, {"imports": 3.0, "reading weights": 4.0, "odd": 0.5}])
    assert found["first_step_seconds"] == 7.0
    assert found["line"] == "first step after 7.0 s: imports 2.0, reading weights 5.0"
    assert found["phases"] == {"imports": 2.0, "reading weights": 5.0}
    assert found["slowest"] == {
        "imports": {"seconds": 3.0, "rank": 1},
        "reading weights": {"seconds": 5.0, "rank": 0},
        "odd": {"seconds": 0.5, "rank": 1},
    }
    assert "slowest" not in summary([{"imports": 2.0}])


@pytest.mark.alone
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has /proc")
def test_the_time_before_our_first_line_is_known():
    program = (
        "import time; time.sleep(0.6)\n"
        "from nemo_aligner_diffusion.runtime.startup import Startup\n"
        "import sys; assert 'torch' not in sys.modules\n"
        "print(Startup().seconds['python'])"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 0.6 <= float(done.stdout) <= time.monotonic() - started + 0.02
    assert process_age() > 0.6
