"""Who is to blame: the rules by which a fault or a straggler is named; no processes. See test_runtime_health.py."""

from __future__ import annotations

import pytest

from nemo_aligner_diffusion.config.load import load_config
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.runtime.health.messages import Member, Position
from nemo_aligner_diffusion.runtime.health.progress import Limits, Progress
from nemo_aligner_diffusion.runtime.health.server import HealthServer
from nemo_aligner_diffusion.runtime.health.stragglers import StragglerWatch
from nemo_aligner_diffusion.runtime.health.verdict import Watch


def members(size: int) -> list[Member]:
    return [Member(rank, f"node{rank // 2}", 100 + rank, rank % 2) for rank in range(size)]


def watch_of(positions: list[Position]) -> Watch:
    watch = Watch(len(positions), silence=60.0)
    for member, position in zip(members(len(positions)), positions, strict=True):
        watch.join(member, 0.0)
        watch.heard(member.rank, 0.0, position)
    return watch


def test_nobody_is_accused_while_one_rank_gets_on() -> None:
    stuck = Position("forward pass", 5, 100, idle=500.0, limit=100.0)
    busy = Position("saving a checkpoint", 5, 101, idle=500.0, limit=3600.0)
    assert watch_of([stuck, stuck, busy]).suspects(10.0) == []
    assert [s.member.rank for s in watch_of([stuck, stuck]).suspects(10.0)] == [0, 1]


def test_who_waits_in_a_collective_call_is_not_to_blame() -> None:
    waits = Position("optimizer step", 5, 90, idle=500.0, limit=100.0, waiting=True)
    ahead = Position("optimizer step", 5, 103, idle=500.0, limit=100.0)
    behind = Position("forward pass", 5, 101, idle=500.0, limit=100.0)
    watch = watch_of([waits, ahead, behind, waits])
    assert [suspect.member.rank for suspect in watch.suspects(1.0)] == [2]
    fault = watch.hang(watch.suspects(1.0), {2: ["train.py:7 in step", "reward.py:3 in score"]}, 1.0)
    assert fault.culprit == members(4)[2]
    assert "no progress for 501 s; 100 s is the limit; 3 others wait for it" in fault.reason
    assert fault.details.endswith("reward.py:3 in score")


def test_of_ranks_at_the_same_mark_the_stacks_tell() -> None:
    watch = watch_of([Position("optimizer step", 5, 100, idle=500.0, limit=100.0)] * 3)
    waits = ["train.py:7 in step", "torch/distributed/distributed_c10d.py:3000 in all_reduce"]
    stacks = {0: waits, 1: ["train.py:7 in step", "user.py:1 in read"], 2: waits}
    assert watch.hang(watch.suspects(1.0), stacks, 1.0).culprit.rank == 1
    everybody = watch.hang(watch.suspects(1.0), dict.fromkeys(range(3), waits), 1.0)
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
    assert cfg.exp_manager.straggler_detection_params.gpu_relative_perf_threshold == 0.6
    assert "max_rank_restarts" in caplog.text
    assert "calc_individual_gpu_perf" in caplog.text
    with pytest.raises(ConfigurationError, match=r"did you mean exp_manager\.fault_tolerance\.rank_heartbeat_timeout"):
        load_config("draftp_sd", ["exp_manager.fault_tolerance.rank_heartbeat_timeot=300"])


def test_limits_follow_what_a_phase_has_taken() -> None:
    limits = Limits(first=3600.0, later=1000.0, calculate=True, safety_factor=5.0, least=60.0)
    assert limits.of(None) == 3600.0
    assert [limits.of(longest) for longest in (1.0, 50.0, 500.0)] == [60.0, 250.0, 1000.0]
    assert Limits(first=3600.0, later=1000.0, calculate=False).of(1.0) == 1000.0
    progress = Progress(limits)
    progress.mark("forward pass")
    assert progress.position().limit == 3600.0
    progress.mark("validation")
    assert progress.position().limit == 3600.0
    progress.mark("forward pass")
    assert progress.position().limit == 60.0


def test_silence_is_forgiven_where_the_watcher_slept() -> None:
    watch = watch_of([Position(), Position()])
    assert watch.silent(59.0) is None
    watch.forgive(500.0, 441.0)
    assert watch.silent(501.0) is None
    watch.heard(0, 550.0)
    fault = watch.silent(561.0)
    assert fault is not None
    assert fault.culprit.rank == 1


def test_a_job_that_was_suspended_is_not_blamed_for_the_time() -> None:
    """SIGSTOP to all of it, an hour, SIGCONT: nobody stood still."""
    progress = Progress(Limits())
    progress.mark("forward pass")
    progress._since -= 3600.0
    assert progress.position().idle >= 3600.0
    progress.slept(3600.0)
    assert progress.position().idle < 1800.0


def test_a_straggler_is_named_after_two_reports_and_not_before() -> None:
    ranks = members(4)
    stragglers = StragglerWatch(interval=10.0, threshold=0.7, now=0.0)
    totals = dict.fromkeys(ranks, (0, 0.0))

    def after(now: float, *seconds: float) -> list[int] | None:
        for member, taken in zip(ranks, seconds, strict=True):
            timed, worked = totals[member]
            totals[member] = (timed + 10, worked + 10 * taken)
        report = stragglers.report(now, dict(totals), int(now))
        return None if report is None else [member.rank for member, _ in report.stragglers]

    assert after(5.0, 1, 1, 1, 1) is None  # not due
    assert after(10.0, 1, 1, 1, 2) == []
    assert after(20.0, 1, 1, 1, 1) == []  # it was a passing disturbance
    assert after(30.0, 1, 1, 2, 1) == []
    assert after(40.0, 1, 1, 2, 1) == [2]
    assert after(50.0, 1.2, 1, 1.1, 0.9) == []  # ordinary differences
    assert stragglers.report(60.0, dict(totals), 60) is None  # no step since


@pytest.mark.parametrize("stop", [False, True])
def test_a_run_is_ended_for_a_straggler_only_where_that_was_asked_for(stop: bool) -> None:
    watch = Watch(2, silence=600.0)
    server = HealthServer(True, watch, 1.0, StragglerWatch(1.0, 0.7, 0.0), stop_if_straggler=stop)
    server._listener.close()
    for member in members(2):
        watch.join(member, 0.0)
    for now in (2, 4):
        for rank, seconds in ((0, 1.0), (1, 3.0)):
            watch.heard(rank, now, Position("data", now, now, in_training=True, timed=now, worked=now * seconds))
        server._judge(now)
    if not stop:
        assert server._fault is None
    else:
        assert server._fault is not None
        assert (server._fault.kind, server._fault.culprit.rank) == ("slow", 1)
        assert "stop_if_detected" in server._fault.headline


def test_of_two_ranks_the_slower_one_can_be_named() -> None:
    ranks = members(2)
    stragglers = StragglerWatch(interval=1.0, threshold=0.7, now=0.0)
    for number in (1, 2):
        report = stragglers.report(number * 2.0, {ranks[0]: (number, number), ranks[1]: (number, 2.0 * number)}, 1)
    assert report is not None
    assert report.stragglers == ((ranks[1], 2.0),)
    assert StragglerWatch(1.0, 0.7, 0.0).report(5.0, {ranks[0]: (1, 1.0)}, 1) is None  # one rank alone
