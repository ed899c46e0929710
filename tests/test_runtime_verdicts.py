"""Who is to blame: the rules by which a fault or a straggler is named; no processes. See test_runtime_health.py."""

from __future__ import annotations

import math

import pytest

from nemo_aligner_diffusion.config.load import load_config
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.runtime.health.messages import Member, Position
from nemo_aligner_diffusion.runtime.health.progress import Progress
from nemo_aligner_diffusion.runtime.health.server import HealthServer
from nemo_aligner_diffusion.runtime.health.stragglers import StragglerWatch
from nemo_aligner_diffusion.runtime.health.verdict import Watch
from nemo_aligner_diffusion.runtime.settings import FaultToleranceSettings, StragglerSettings


def members(size: int) -> list[Member]:
    return [Member(rank, f"node{rank // 2}", 100 + rank, rank % 2) for rank in range(size)]


def watch_of(positions: list[Position]) -> Watch:
    watch = Watch(len(positions), silence=60.0)
    for member, position in zip(members(len(positions)), positions, strict=True):
        watch.join(member, 0.0)
        watch.heard(member.rank, 0.0, position)
    return watch


STEP = ("train.py:7 in step",)
SCORE = (*STEP, "reward.py:3 in score")
ALL_REDUCE = (*STEP, "torch/distributed/distributed_c10d.py:3000 in all_reduce")


def stuck(phase: str, events: int, stack: tuple[str, ...] = STEP, waiting: bool = False) -> Position:
    return Position(phase, 5, events, idle=500.0, limit=100.0, waiting=waiting, stack=stack)


def test_nobody_is_accused_while_one_rank_gets_on() -> None:
    busy = Position("saving a checkpoint", 5, 101, idle=500.0, limit=3600.0)
    assert watch_of([stuck("forward pass", 100), stuck("forward pass", 100), busy]).hanging(10.0) is None
    fault = watch_of([stuck("forward pass", 100), stuck("forward pass", 100)]).hanging(10.0)
    assert fault is not None
    assert fault.culprit.rank == 0


def test_who_waits_in_a_collective_call_is_not_to_blame() -> None:
    waits = stuck("optimizer step", 90, ALL_REDUCE, waiting=True)
    fault = watch_of([waits, stuck("optimizer step", 103), stuck("forward pass", 101, SCORE), waits]).hanging(1.0)
    assert fault is not None
    assert fault.culprit == members(4)[2]
    assert "no progress for 501 s; 100 s is the limit; 3 others wait for it" in fault.reason
    assert fault.details.endswith("reward.py:3 in score")


def test_of_ranks_at_the_same_mark_the_stacks_tell() -> None:
    waits, reads = stuck("optimizer step", 100, ALL_REDUCE), stuck("optimizer step", 100, (*STEP, "user.py:1 in read"))
    fault = watch_of([waits, reads, waits]).hanging(1.0)
    assert fault is not None
    assert fault.culprit.rank == 1
    everybody = watch_of([waits] * 3).hanging(1.0)
    assert everybody is not None
    assert "every rank waits for the others in a collective call" in everybody.reason


def test_keys_of_nemo_mean_what_they_mean_there(caplog: pytest.LogCaptureFixture) -> None:
    given = {
        "create_fault_tolerance_callback": "true",
        "fault_tolerance.initial_rank_heartbeat_timeout": "600",
        "fault_tolerance.rank_heartbeat_timeout": "null",
        "fault_tolerance.max_rank_restarts": "2",
        "straggler_detection_params.gpu_relative_perf_threshold": "0.6",
        "straggler_detection_params.calc_individual_gpu_perf": "true",
    }
    cfg = load_config("draftp_sd", [f"exp_manager.{key}={value}" for key, value in given.items()])
    section = cfg.exp_manager.fault_tolerance
    assert (section.initial_rank_heartbeat_timeout, section.rank_heartbeat_timeout) == (600, None)
    assert "max_rank_restarts" in caplog.text
    assert cfg.exp_manager.straggler_detection_params.gpu_relative_perf_threshold == 0.6
    assert "calc_individual_gpu_perf" in caplog.text
    with pytest.raises(ConfigurationError, match=r"did you mean exp_manager\.fault_tolerance\.rank_heartbeat_timeout"):
        load_config("draftp_sd", ["exp_manager.fault_tolerance.rank_heartbeat_timeot=300"])


def test_limits_follow_what_a_phase_has_taken() -> None:
    limits = FaultToleranceSettings(rank_heartbeat_timeout=1000.0, minimum_heartbeat_timeout=60.0)
    assert limits.longest_pause(None) == 3600.0
    assert [limits.longest_pause(longest) for longest in (1.0, 50.0, 500.0)] == [60.0, 250.0, 1000.0]
    assert FaultToleranceSettings(calculate_timeouts=False).longest_pause(1.0) == 2700.0
    unlimited = FaultToleranceSettings(initial_rank_heartbeat_timeout=None, rank_heartbeat_timeout=None)
    assert (unlimited.longest_pause(None), unlimited.longest_pause(math.inf)) == (math.inf, math.inf)
    progress = Progress(limits)
    progress.mark("forward pass")
    assert progress.position().limit == 3600.0
    progress.mark("validation")
    assert progress.position().limit == 3600.0
    progress.mark("forward pass")
    assert progress.position().limit == 60.0


def test_a_stack_is_sent_past_the_limit_only() -> None:
    progress = Progress(FaultToleranceSettings(initial_rank_heartbeat_timeout=60.0))
    assert progress.position().stack == ()
    progress._since -= 61.0
    assert any("test_a_stack_is_sent_past_the_limit_only" in line for line in progress.position().stack)


def test_silence_is_forgiven_where_the_watcher_slept() -> None:
    watch = watch_of([Position(), Position()])
    assert watch.silent(59.0) is None
    watch.forgive(500.0, 441.0)
    assert watch.silent(501.0) is None
    watch.heard(0, 550.0, Position())
    fault = watch.silent(561.0)
    assert fault is not None
    assert fault.culprit.rank == 1


def test_a_job_that_was_suspended_is_not_blamed_for_the_time() -> None:
    """SIGSTOP to all of it, an hour, SIGCONT: nobody stood still."""
    progress = Progress(FaultToleranceSettings())
    progress.mark("forward pass")
    progress._since -= 3600.0
    assert progress.position().idle >= 3600.0
    progress.slept(3600.0)
    assert progress.position().idle < 1800.0


class Working:
    """Ranks that do ten steps between two looks at them, in so many seconds each."""

    def __init__(self, size: int) -> None:
        self.positions = dict.fromkeys(members(size), Position())
        self.stragglers = StragglerWatch(StragglerSettings(10.0, 0.7), 0.0)

    def slow(self, now: float, *seconds: float) -> list[int]:
        for member, taken in zip(self.positions, seconds, strict=True):
            before = self.positions[member]
            self.positions[member] = Position(timed=before.timed + 10, worked=before.worked + 10 * taken)
        return [member.rank for member, _ in self.stragglers.newly_slow(now, self.positions)]


def test_a_straggler_is_named_after_two_comparisons_once() -> None:
    ranks = Working(4)
    assert ranks.slow(10.0, 1, 1, 1, 2) == []
    assert ranks.slow(20.0, 1, 1, 1, 1) == []  # it was a passing disturbance
    assert ranks.slow(30.0, 1, 1, 2, 1) == []
    assert ranks.slow(35.0, 1, 1, 2, 1) == []  # not due
    assert ranks.slow(40.0, 1, 1, 2, 1) == [2]
    assert ranks.slow(50.0, 1, 1, 2, 1) == []  # said already
    assert ranks.slow(60.0, 1.2, 1, 1.1, 0.9) == []  # ordinary differences
    assert ranks.stragglers.newly_slow(70.0, ranks.positions) == []  # no step since


def test_of_two_ranks_the_slower_one_can_be_named() -> None:
    ranks = Working(2)
    assert ranks.slow(10.0, 1, 2) == []
    assert ranks.slow(20.0, 1, 2) == [1]


@pytest.mark.parametrize("stop", [False, True])
def test_a_run_is_ended_for_a_straggler_only_where_that_was_asked_for(stop: bool) -> None:
    watch = watch_of([Position(), Position()])
    server = HealthServer(True, watch, 1.0, StragglerWatch(StragglerSettings(1.0, 0.7, stop), 0.0))
    server._listener.close()
    for now in (2, 4):
        for rank, seconds in ((0, 1.0), (1, 3.0)):
            watch.heard(rank, now, Position("data", now, now, in_training=True, timed=now, worked=now * seconds))
        server._name_stragglers(now)
    if not stop:
        assert server._fault is None
    else:
        assert server._fault is not None
        assert (server._fault.kind, server._fault.culprit.rank) == ("slow", 1)
        assert "stop_if_detected" in server._fault.headline
