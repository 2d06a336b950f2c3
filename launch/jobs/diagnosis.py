"""From what was observed of an attempt to what went wrong, in words: pure functions.

The failures of ranks (`rank_failure`), of ranks that ended before they could be observed
(`died_before_heartbeat`) and of launchers (`launcher_failure`) are collected; `first_failure` finds
the one that caused the others, and `describe` puts it into words.

There are two clocks. `unix_now` is in Unix seconds, as are the times that ranks write. `now` is of
this process's monotonic clock, by which silence is counted.
"""

import re
import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from launch.jobs.ranks import Rank

# Seconds from a process's end until it is noticed, on a busy machine.
NOTICE_DELAY = 0.5
# Seconds by which what killed the ranks came before the first sign of it.
CAUSE_LEAD = 1.0
# Seconds of silence of other ranks that are mentioned when one has failed.
NOTABLE_SILENCE = 10.0
MAX_DETAIL_LINES = 20


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What ended an attempt."""

    rank: int | None = None  # None if it is not a rank's
    time: float  # Unix seconds
    message: str
    detail: str = ""  # a traceback, or the last lines of logs
    logs: tuple[str, ...] = ()  # names of logs whose last lines may say more
    silent: bool = False  # its process ended without an exit report


def rank_failure(
    rank: Rank, *, now: float, unix_now: float, hang: float, report_wait: float, excused: bool
) -> Failure | None:
    """What is wrong with a rank, or None.

    `hang`: seconds without a new step that are a hang, at least. `report_wait`: seconds that a
    failed rank has for its exit report. `excused`: another rank saves or samples, so that this one
    need not make steps.
    """
    if rank.finished:
        return None

    # From the most precise source to the least: exit report, heartbeat, process, silence.
    if rank.exit_report:
        message, _, detail = (
            rank.exit_report.error or f"exit code {rank.exit_report.code}"
        ).partition("\n")
        return Failure(rank=rank.number, time=rank.exit_report.time, message=message, detail=detail)

    silence = now - rank.progress.since
    beat = rank.beat
    if beat and beat.phase == "failed":
        if rank.exited is None and silence <= report_wait:  # its exit report may follow
            return None
        message, _, detail = (beat.error or "failed without an error message").partition("\n")
        return Failure(rank=rank.number, time=beat.time, message=message, detail=detail)

    logs = (f"rank_{rank.number}",)
    if rank.exited is not None:
        return Failure(
            rank=rank.number,
            time=rank.exited,
            message="ended without an exit report",
            logs=logs,
            silent=True,
        )

    # While one rank saves or samples, the others wait for it in their next collective.
    waits_for_another = excused and rank.progress.phase == "training"
    if waits_for_another or silence <= rank.progress.limit(hang):
        return None
    return Failure(
        rank=rank.number,
        # Dated at its last progress, as the failure of another rank may have followed from it.
        time=unix_now - silence,
        message=f"hangs: {rank.progress.phase}, nothing new for {silence:.0f} s",
        logs=logs,
    )


def died_before_heartbeat(
    ranks: Sequence[Rank], exit_codes: Mapping[int, int], unix_now: float
) -> Failure | None:
    """A rank that ended before its first heartbeat, or None.

    `exit_codes` are those by pid that msrun's log has (`parse_msrun_exits`). msrun only logs the
    end of a rank and goes on waiting for its scheduler.
    """
    # msrun reports pids; which rank a pid is, only its heartbeat says.
    pid = next(iter(exit_codes), None)
    silent_ranks = [rank for rank in ranks if not rank.beat]
    known_pids = [rank.beat.pid for rank in ranks if rank.beat]
    if pid is None or not silent_ranks or pid in known_pids:
        return None

    how = describe_exit_code(exit_codes[pid])
    return Failure(
        time=unix_now - CAUSE_LEAD,
        message=f"a rank ended before its first heartbeat ({how})",
        logs=tuple(f"rank_{rank.number}" for rank in silent_ranks),
    )


def launcher_failure(
    name: str, code: int, *, ended_for: float, unix_now: float, report_wait: float
) -> Failure | None:
    """What is wrong with a launcher that was seen to have ended `ended_for` seconds ago, or None.

    A launcher that was killed is the cause of what follows. Else it ended because of a rank, whose
    exit report may be still to read: `report_wait` seconds are allowed for that.
    """
    if code >= 0 and ended_for <= report_wait:
        return None
    return Failure(
        # A killed launcher is dated back, before the ends of the ranks that follow from it.
        time=unix_now - (CAUSE_LEAD if code < 0 else 0),
        message=f"{name} ended ({describe_exit_code(code)})",
        logs=(name,),
    )


def suspended_failure(rank: Rank) -> Failure:
    """Of a rank whose process is stopped, since its last heartbeat."""
    return Failure(
        rank=rank.number,
        time=rank.beat.time if rank.beat else 0.0,
        message="is stopped, by SIGSTOP or a debugger",
    )


def first_failure(failures: Iterable[Failure], exits: Mapping[int, float]) -> Failure:
    """The failure from which the others followed.

    `exits` are the Unix times at which ranks' processes ended, as far as they have.

    A failure spreads in one of two ways. A rank whose neighbour was killed raises an error of
    communication later; that rank lives a little longer than its neighbour. A rank whose neighbour
    raised is killed by msrun or mpirun, once the neighbour's process has ended. So a silent death
    came before an error if the rank with the error was still alive then.
    """
    ordered = sorted(failures, key=lambda failure: failure.time)
    reported = [failure for failure in ordered if not failure.silent]
    silent = [failure for failure in ordered if failure.silent]
    if not reported or not silent:
        return ordered[0]

    error = reported[0]
    death = silent[0]
    # Ends are noticed late, by NOTICE_DELAY at most; a rank without a known end is alive.
    alive = error.rank is None or death.time < exits.get(error.rank, float("inf"))
    return death if alive and death.time - NOTICE_DELAY < error.time else error


def parse_msrun_exits(log: str) -> dict[int, int]:
    """Exit codes by pid of the workers that msrun's log reports as failed."""
    # The wording of mindspore/parallel/cluster/process_entity/_api.py.
    matches = re.findall(r"Worker process (\d+) exit with exception. Error code: (-?\d+)", log)
    return {int(pid): int(code) for pid, code in matches}


def parse_mpirun_signal(log: str) -> int | None:
    """The exit code (-signal) of the rank that mpirun's log reports as ended by a signal."""
    match = re.search(r"exited on signal (\d+)", log)
    return -int(match[1]) if match else None


def describe(failure: Failure, ranks: Sequence[Rank], now: float) -> str:
    """A failure in words: rank, pid, host and step; its details; the state of the other ranks."""
    headline = failure.message
    for rank in ranks:
        if rank.number == failure.rank:
            beat = rank.beat
            where = f" (pid {beat.pid} on {beat.host}, step {beat.step})" if beat else ""
            headline = f"rank {rank.number}{where}: {failure.message}"

    lines = [headline]
    if failure.rank != 0:  # the output of rank 0 has been shown already
        lines += [f"  {line}" for line in failure.detail.splitlines()[-MAX_DETAIL_LINES:]]

    for rank in ranks:
        beat = rank.beat
        silence = now - rank.progress.since
        # A rank that has been silent for long may be the one that all others wait for.
        other = rank.number != failure.rank and rank.exited is None
        if other and beat and silence > NOTABLE_SILENCE:
            state = f"{beat.phase}, step {beat.step}, nothing new for {silence:.0f} s"
            lines.append(f"meanwhile rank {rank.number}: {state}")

    return "\n".join(lines)


def describe_exit_code(code: int) -> str:
    """An exit code as subprocess gives it, in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        # A real-time signal: most of them have no name.
        return f"killed by signal {-code}"
