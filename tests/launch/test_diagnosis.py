"""From what was seen of ranks to what is said of them: nothing runs here."""

from dataclasses import replace
from typing import Any

import pytest

from launch.jobs.diagnosis import (
    Failure,
    died_before_heartbeat,
    first,
    in_words,
    of_launcher,
    of_rank,
    parse_mpirun_signal,
    parse_msrun_exits,
    story,
    suspended,
)
from launch.jobs.heartbeats import PATIENCE, Beat, End, Pulse
from launch.jobs.ranks import Rank

NOW, CLOCK = 50.0, 1_000_000.0  # this process's clock, and Unix seconds
HANG, SETTLE = 60.0, 2.0
ERROR = "ValueError: too hot\nTraceback (most recent call last):\nValueError: too hot"


def rank(phase: str | None = "training", since: float = NOW, number: int = 1, **seen: Any) -> Rank:
    """A rank that has said `phase` since then, and nothing if that is None."""
    facts: Any = {
        "rank": number,
        "pid": 100 + number,
        "host": "h",
        "phase": phase,
        "step": 7,
        "time": CLOCK - 1,
    }
    error = seen.pop("error", None)
    return Rank(
        number=number, pulse=Pulse(since=since, beat=phase and Beat(**facts, error=error)), **seen
    )  # type: ignore[arg-type]


def fault(seen: Rank, excused: bool = False) -> Failure | None:
    return of_rank(seen, NOW, CLOCK, HANG, SETTLE, excused)


# What is wrong with a rank.


@pytest.mark.parametrize(
    "seen",
    [
        rank(None),
        rank(),
        rank("compiling", NOW - 3600),
        rank("finished", exited=CLOCK),
        rank(end=End(code=0, error=None, time=CLOCK), exited=CLOCK),
        rank(end=End(code=75, error=None, time=CLOCK), exited=CLOCK),
        rank("failed", NOW - SETTLE),  # its last word may be on its way
    ],
)
def test_nothing_is_wrong(seen: Rank) -> None:
    assert fault(seen) is None


def test_a_last_word_is_taken() -> None:
    seen = rank("failed", exited=CLOCK, end=End(code=1, error=ERROR, time=CLOCK - 3))
    detail = ERROR.partition("\n")[2]
    assert fault(seen) == Failure(rank=1, time=CLOCK - 3, what="ValueError: too hot", detail=detail)
    assert fault(rank(end=End(code=3, error=None, time=CLOCK))) == Failure(
        rank=1, time=CLOCK, what="exit code 3"
    )


def test_else_the_last_heartbeat_says_why() -> None:
    for seen in (
        rank("failed", error="OSError: no", exited=CLOCK),
        rank("failed", NOW - 2 * SETTLE, error="OSError: no"),
    ):
        assert fault(seen) == Failure(rank=1, time=CLOCK - 1, what="OSError: no")


def test_a_process_that_is_gone_has_left_its_log() -> None:
    gone = Failure(rank=1, time=CLOCK, what="ended without a word", logs=("rank_1",), silent=True)
    assert fault(rank(exited=CLOCK)) == gone


def test_silence_is_a_fault_in_time() -> None:
    assert fault(rank(since=NOW - HANG)) is None
    seen = fault(rank(since=NOW - HANG - 1))
    assert seen == Failure(
        rank=1, time=CLOCK - 61, what="hangs: training, nothing new for 61 s", logs=("rank_1",)
    )
    seen = fault(rank(None, since=NOW - PATIENCE["starting"] - 1))
    assert seen is not None
    assert seen.what == "hangs: starting, nothing new for 1801 s"


def test_who_waits_for_another_is_excused_and_no_one_else() -> None:
    assert fault(rank(since=NOW - HANG - 1), excused=True) is None
    assert (
        fault(rank("checkpoint", since=NOW - PATIENCE["checkpoint"] - 1), excused=True) is not None
    )
    assert fault(rank(exited=CLOCK), excused=True) is not None


# What is wrong with a launcher, and what it knows.


def test_a_launcher_that_was_killed_is_the_cause_and_else_the_ranks_are_read_first() -> None:
    killed = of_launcher("msrun_0", -9, 0.0, CLOCK, SETTLE)
    assert killed == Failure(
        time=CLOCK - 1, what="msrun_0 ended (killed by SIGKILL)", logs=("msrun_0",)
    )
    assert of_launcher("msrun_0", 1, SETTLE, CLOCK, SETTLE) is None
    ended = of_launcher("msrun_0", 1, SETTLE + 0.1, CLOCK, SETTLE)
    assert ended == Failure(time=CLOCK, what="msrun_0 ended (exit code 1)", logs=("msrun_0",))


MSRUN = """[WARNING] Worker process 101 exit with exception. Error code: -11.
Worker process 7 exit with exception. Error code: 1."""
MPIRUN = "mpirun noticed that process rank 1 with PID 0 on node h exited on signal 9 (Killed)."


def test_what_the_launchers_logs_say() -> None:
    assert (parse_msrun_exits(MSRUN), parse_msrun_exits(MPIRUN)) == ({101: -11, 7: 1}, {})
    assert (parse_mpirun_signal(MPIRUN), parse_mpirun_signal(MSRUN)) == (-9, None)


def test_a_rank_that_was_gone_before_its_first_heartbeat() -> None:
    """What msrun mourns first is one that was never heard of, while another is missing."""
    waiting, known = rank(None, number=0), rank(number=1)
    found = died_before_heartbeat([waiting, known], {7: 9}, CLOCK)
    assert found == Failure(
        time=CLOCK - 1,
        what="a rank ended before its first heartbeat (exit code 9)",
        logs=("rank_0",),
    )
    assert died_before_heartbeat([waiting, known], {101: 9, 7: 9}, CLOCK) is None
    assert died_before_heartbeat([waiting, known], {}, CLOCK) is None
    assert died_before_heartbeat([known], {7: 9}, CLOCK) is None


@pytest.mark.parametrize(
    ("code", "words"),
    [(3, "exit code 3"), (-15, "killed by SIGTERM"), (-99, "killed by signal 99")],
)
def test_an_exit_code_in_words(code: int, words: str) -> None:
    assert in_words(code) == words


# Which was the first.

RAISED = Failure(rank=0, time=100.0, what="ValueError")
KILLED = Failure(rank=1, time=100.3, what="SIGKILL", silent=True)


def test_the_neighbour_of_a_killed_rank_is_not_the_first() -> None:
    """It raised at nearly the same time, and was still alive when the other's end was noticed."""
    assert first([RAISED, KILLED], {1: 100.3}) is KILLED
    assert first([RAISED, KILLED], {1: 100.3, 0: 100.8}) is KILLED


def test_a_rank_that_the_launcher_killed_is_not_the_first() -> None:
    assert first([RAISED, KILLED], {1: 100.3, 0: 100.2}) is RAISED
    assert (
        first([RAISED, Failure(rank=1, time=103.0, what="SIGKILL", silent=True)], {1: 103.0})
        is RAISED
    )


def test_else_the_earliest_is() -> None:
    later = Failure(rank=1, time=101.0, what="RuntimeError")
    assert first([later, RAISED], {}) is RAISED
    dead = Failure(rank=2, time=99.0, what="SIGKILL", silent=True)
    assert first([KILLED, dead], {}) is dead


# In words.


def test_a_story_says_who_where_and_how_and_what_the_others_did() -> None:
    ranks = [
        rank(number=0, since=NOW - 12),
        rank(number=1),
        rank(number=2, since=NOW - 12, exited=CLOCK),
    ]
    failure = Failure(rank=1, time=CLOCK, what="ValueError: too hot", detail="line 1\nline 2")
    assert story(failure, ranks, NOW) == (
        "rank 1 (pid 101 on h, step 7): ValueError: too hot\n  line 1\n  line 2\n"
        "meanwhile rank 0: training, step 7, nothing new for 12 s"
    )


def test_what_rank_0_printed_is_not_said_again() -> None:
    failure = Failure(rank=0, time=CLOCK, what="ValueError: too hot", detail="line 1")
    assert (
        story(failure, [rank(number=0)], NOW)
        == "rank 0 (pid 100 on h, step 7): ValueError: too hot"
    )


def test_a_rank_without_a_heartbeat_and_a_launcher_have_no_place() -> None:
    assert story(Failure(rank=1, time=CLOCK, what="hangs"), [rank(None)], NOW) == "rank 1: hangs"
    assert story(Failure(time=CLOCK, what="msrun_0 ended"), [rank()], NOW) == "msrun_0 ended"


def test_a_stopped_process_has_been_silent_since_its_last_heartbeat() -> None:
    failure = suspended(rank())
    assert (failure.rank, failure.time) == (1, CLOCK - 1)
    assert first([failure, replace(failure, rank=0, time=CLOCK)], {}) is failure
