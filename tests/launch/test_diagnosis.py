"""From what was observed of ranks to what went wrong with them: no process runs here."""

from dataclasses import replace
from typing import Any

import pytest

from launch.jobs.diagnosis import (
    Failure,
    describe,
    describe_exit_code,
    died_before_heartbeat,
    first_failure,
    launcher_failure,
    parse_mpirun_signal,
    parse_msrun_exits,
    rank_failure,
    suspended_failure,
)
from launch.jobs.heartbeats import PHASE_TIMEOUTS, ExitReport, HeartbeatRecord, RankProgress
from launch.jobs.ranks import Rank
from pipeline.train.heartbeat import Phase

NOW, CLOCK = 50.0, 1_000_000.0  # this process's clock, and Unix seconds
HANG, REPORT_WAIT = 60.0, 2.0
ERROR = "ValueError: too hot\nTraceback (most recent call last):\nValueError: too hot"


def rank(
    phase: Phase | None = "training",
    since: float = NOW,
    number: int = 1,
    error: str | None = None,
    **seen: Any,
) -> Rank:
    """A rank whose heartbeat has had `phase` since then; without a heartbeat if that is None."""
    beat = None
    if phase is not None:
        beat = HeartbeatRecord(
            rank=number,
            pid=100 + number,
            host="h",
            phase=phase,
            step=7,
            time=CLOCK - 1,
            error=error,
        )
    return Rank(number=number, progress=RankProgress(since=since, beat=beat), **seen)


def fault(seen: Rank, excused: bool = False) -> Failure | None:
    return rank_failure(
        seen, now=NOW, unix_now=CLOCK, hang=HANG, report_wait=REPORT_WAIT, excused=excused
    )


# What is wrong with a rank.


@pytest.mark.parametrize(
    "seen",
    [
        rank(None),
        rank(),
        rank("compiling", NOW - 3600),
        rank("finished", exited=CLOCK),
        rank(exit_report=ExitReport(code=0, error=None, time=CLOCK), exited=CLOCK),
        rank(exit_report=ExitReport(code=75, error=None, time=CLOCK), exited=CLOCK),
        rank("failed", NOW - REPORT_WAIT),  # its exit report may follow
    ],
)
def test_nothing_is_wrong(seen: Rank) -> None:
    assert fault(seen) is None


def test_an_exit_report_is_the_reason() -> None:
    seen = rank("failed", exited=CLOCK, exit_report=ExitReport(code=1, error=ERROR, time=CLOCK - 3))
    detail = ERROR.partition("\n")[2]
    assert fault(seen) == Failure(
        rank=1, time=CLOCK - 3, message="ValueError: too hot", detail=detail
    )
    assert fault(rank(exit_report=ExitReport(code=3, error=None, time=CLOCK))) == Failure(
        rank=1, time=CLOCK, message="exit code 3"
    )


def test_without_one_the_last_heartbeat_is_the_reason() -> None:
    for seen in (
        rank("failed", error="OSError: no", exited=CLOCK),
        rank("failed", NOW - 2 * REPORT_WAIT, error="OSError: no"),
    ):
        assert fault(seen) == Failure(rank=1, time=CLOCK - 1, message="OSError: no")


def test_a_process_that_has_ended_leaves_its_log() -> None:
    gone = Failure(
        rank=1, time=CLOCK, message="ended without an exit report", logs=("rank_1",), silent=True
    )
    assert fault(rank(exited=CLOCK)) == gone


def test_silence_beyond_the_limit_is_a_failure() -> None:
    assert fault(rank(since=NOW - HANG)) is None
    seen = fault(rank(since=NOW - HANG - 1))
    assert seen == Failure(
        rank=1, time=CLOCK - 61, message="hangs: training, nothing new for 61 s", logs=("rank_1",)
    )
    seen = fault(rank(None, since=NOW - PHASE_TIMEOUTS["starting"] - 1))
    assert seen is not None
    assert seen.message == "hangs: starting, nothing new for 1801 s"


def test_only_a_rank_that_waits_for_another_is_excused() -> None:
    assert fault(rank(since=NOW - HANG - 1), excused=True) is None
    assert (
        fault(rank("checkpoint", since=NOW - PHASE_TIMEOUTS["checkpoint"] - 1), excused=True)
        is not None
    )
    assert fault(rank(exited=CLOCK), excused=True) is not None


# What is wrong with a launcher, and what its log tells.


def ended_launcher(code: int, seconds: float) -> Failure | None:
    return launcher_failure(
        "msrun_0", code, ended_for=seconds, unix_now=CLOCK, report_wait=REPORT_WAIT
    )


def test_a_killed_launcher_is_the_cause_and_else_the_ranks_are_read_first() -> None:
    killed = ended_launcher(-9, 0.0)
    assert killed == Failure(
        time=CLOCK - 1, message="msrun_0 ended (killed by SIGKILL)", logs=("msrun_0",)
    )
    assert ended_launcher(1, REPORT_WAIT) is None
    ended = ended_launcher(1, REPORT_WAIT + 0.1)
    assert ended == Failure(time=CLOCK, message="msrun_0 ended (exit code 1)", logs=("msrun_0",))


MSRUN = """[WARNING] Worker process 101 exit with exception. Error code: -11.
Worker process 7 exit with exception. Error code: 1."""
MPIRUN = "mpirun noticed that process rank 1 with PID 0 on node h exited on signal 9 (Killed)."


def test_logs_of_launchers_are_parsed() -> None:
    assert (parse_msrun_exits(MSRUN), parse_msrun_exits(MPIRUN)) == ({101: -11, 7: 1}, {})
    assert (parse_mpirun_signal(MPIRUN), parse_mpirun_signal(MSRUN)) == (-9, None)


def test_a_rank_that_ended_before_its_first_heartbeat() -> None:
    """The first exit in msrun's log is of an unknown pid, while a rank has no heartbeat."""
    waiting, known = rank(None, number=0), rank(number=1)
    found = died_before_heartbeat([waiting, known], {7: 9}, CLOCK)
    assert found == Failure(
        time=CLOCK - 1,
        message="a rank ended before its first heartbeat (exit code 9)",
        logs=("rank_0",),
    )
    assert died_before_heartbeat([waiting, known], {101: 9, 7: 9}, CLOCK) is None
    assert died_before_heartbeat([waiting, known], {}, CLOCK) is None
    assert died_before_heartbeat([known], {7: 9}, CLOCK) is None


@pytest.mark.parametrize(
    ("code", "words"),
    [(3, "exit code 3"), (-15, "killed by SIGTERM"), (-99, "killed by signal 99")],
)
def test_exit_codes_are_described(code: int, words: str) -> None:
    assert describe_exit_code(code) == words


# Which failure was the first.

RAISED = Failure(rank=0, time=100.0, message="ValueError")
KILLED = Failure(rank=1, time=100.3, message="SIGKILL", silent=True)


def test_the_neighbour_of_a_killed_rank_is_not_the_first() -> None:
    """It raised at nearly the same time, and was still alive when the other's end was noticed."""
    assert first_failure([RAISED, KILLED], {1: 100.3}) is KILLED
    assert first_failure([RAISED, KILLED], {1: 100.3, 0: 100.8}) is KILLED


def test_a_rank_that_the_launcher_killed_is_not_the_first() -> None:
    assert first_failure([RAISED, KILLED], {1: 100.3, 0: 100.2}) is RAISED
    assert (
        first_failure(
            [RAISED, Failure(rank=1, time=103.0, message="SIGKILL", silent=True)], {1: 103.0}
        )
        is RAISED
    )


def test_else_the_earliest_is_the_first() -> None:
    later = Failure(rank=1, time=101.0, message="RuntimeError")
    assert first_failure([later, RAISED], {}) is RAISED
    dead = Failure(rank=2, time=99.0, message="SIGKILL", silent=True)
    assert first_failure([KILLED, dead], {}) is dead


# In words.


def test_a_description_has_rank_place_details_and_the_other_ranks() -> None:
    ranks = [
        rank(number=0, since=NOW - 12),
        rank(number=1),
        rank(number=2, since=NOW - 12, exited=CLOCK),
    ]
    failure = Failure(rank=1, time=CLOCK, message="ValueError: too hot", detail="line 1\nline 2")
    assert describe(failure, ranks, NOW) == (
        "rank 1 (pid 101 on h, step 7): ValueError: too hot\n  line 1\n  line 2\n"
        "meanwhile rank 0: training, step 7, nothing new for 12 s"
    )


def test_the_output_of_rank_0_is_not_repeated() -> None:
    failure = Failure(rank=0, time=CLOCK, message="ValueError: too hot", detail="line 1")
    assert (
        describe(failure, [rank(number=0)], NOW)
        == "rank 0 (pid 100 on h, step 7): ValueError: too hot"
    )


def test_without_a_heartbeat_there_is_no_pid_and_step() -> None:
    assert (
        describe(Failure(rank=1, time=CLOCK, message="hangs"), [rank(None)], NOW) == "rank 1: hangs"
    )
    assert describe(Failure(time=CLOCK, message="msrun_0 ended"), [rank()], NOW) == "msrun_0 ended"


def test_a_stopped_process_failed_at_its_last_heartbeat() -> None:
    failure = suspended_failure(rank())
    assert (failure.rank, failure.time) == (1, CLOCK - 1)
    assert first_failure([failure, replace(failure, rank=0, time=CLOCK)], {}) is failure
