"""From what was seen of an attempt to what went wrong with it, in words: pure functions.

The faults of the ranks (`of_rank`), of those that were gone before they could be known (`died_before_heartbeat`)
and of the launcher (`of_launcher`) are collected; `first` finds the one that the others followed
from, and `story` tells it.

Times are Unix seconds, as the ranks write them: `clock` is this moment. How long a rank has been
silent is counted by this process's own clock, whose moment is `now`.
"""

import re
import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from launch.jobs.ranks import Rank

NOTICED = 0.5  # seconds between a process's end and our notice, when the machine is busy
BEFORE = 1.0  # seconds by which what killed the ranks was earlier than what is seen of it
QUIET = 10.0  # seconds of silence that are worth a word, when another rank has failed


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What ended an attempt: who, when, how, in words."""

    rank: int | None = None
    time: float
    what: str
    detail: str = ""  # its traceback
    logs: tuple[str, ...] = ()  # those whose last lines may say more, by name
    silent: bool = False  # its process ended without a word


def of_rank(
    rank: Rank, now: float, clock: float, hang: float, settle: float, excused: bool
) -> Failure | None:
    """What is wrong with a rank: `excused`, as another one saves or samples, it need not make
    steps.
    """
    beat, silence, log = rank.beat, now - rank.pulse.since, f"rank_{rank.number}"
    if rank.finished:
        return None
    if rank.end:
        what, _, detail = (rank.end.error or f"exit code {rank.end.code}").partition("\n")
        return Failure(rank=rank.number, time=rank.end.time, what=what, detail=detail)
    if beat and beat.phase == "failed":
        if rank.exited is None and silence <= settle:  # its last word may be on its way
            return None
        what, _, detail = (beat.error or "does not say why it failed").partition("\n")
        return Failure(rank=rank.number, time=beat.time, what=what, detail=detail)
    if rank.exited is not None:
        return Failure(
            rank=rank.number,
            time=rank.exited,
            what="ended without a word",
            logs=(log,),
            silent=True,
        )
    if (excused and rank.pulse.phase == "training") or silence <= rank.pulse.limit(hang=hang):
        return None
    what = f"hangs: {rank.pulse.phase}, nothing new for {silence:.0f} s"
    return Failure(rank=rank.number, time=clock - silence, what=what, logs=(log,))


def died_before_heartbeat(
    ranks: Sequence[Rank], parse_msrun_exits: Mapping[int, int], clock: float
) -> Failure | None:
    """A rank that ended before its first heartbeat: msrun, waiting for its scheduler, has only
    written it down.
    """
    pid = next(iter(parse_msrun_exits), None)
    logs = tuple(f"rank_{rank.number}" for rank in ranks if not rank.beat)
    if pid is None or not logs or pid in [rank.beat.pid for rank in ranks if rank.beat]:
        return None
    what = f"a rank ended before its first heartbeat ({in_words(parse_msrun_exits[pid])})"
    return Failure(time=clock - BEFORE, what=what, logs=logs)


def of_launcher(
    name: str, code: int, seconds: float, clock: float, settle: float
) -> Failure | None:
    """A launcher that was seen to have ended `seconds` ago.

    Killed, it is the cause; else it ended because of a rank, of which we may have still to read.
    """
    if code >= 0 and seconds <= settle:
        return None
    what = f"{name} ended ({in_words(code)})"
    return Failure(time=clock - (BEFORE if code < 0 else 0), what=what, logs=(name,))


def suspended(rank: Rank) -> Failure:
    """A process that was stopped, since its last heartbeat."""
    when = rank.beat.time if rank.beat else 0.0
    return Failure(rank=rank.number, time=when, what="is stopped, by SIGSTOP or a debugger")


def first(failures: Iterable[Failure], exits: Mapping[int, float]) -> Failure:
    """Which of them came first; `exits` is when ranks' processes ended, as far as they have.

    The others died of it, in one of two ways. A rank whose neighbour was killed raises an error of
    communication later; that rank lives a little longer than its neighbour. A rank whose neighbour
    raised is killed by msrun or mpirun, once the neighbour's process has ended. So a death without
    a word came before an error if the rank of the error was then still alive.
    """
    ordered = sorted(failures, key=lambda failure: failure.time)
    told = [failure for failure in ordered if not failure.silent]
    silent = [failure for failure in ordered if failure.silent]
    if not told or not silent:
        return ordered[0]
    cause, death = told[0], silent[0]
    alive = cause.rank is None or death.time < exits.get(cause.rank, float("inf"))
    return death if alive and death.time - NOTICED < cause.time else cause


def parse_msrun_exits(log: str) -> dict[int, int]:
    """Exit codes by process id: of the workers that msrun's log says have failed."""
    found = re.findall(r"Worker process (\d+) exit with exception. Error code: (-?\d+)", log)
    return {int(pid): int(code) for pid, code in found}


def parse_mpirun_signal(log: str) -> int | None:
    """The exit code of the rank of which mpirun's log says that a signal ended it."""
    found = re.search(r"exited on signal (\d+)", log)
    return -int(found[1]) if found else None


def story(failure: Failure, ranks: Sequence[Rank], now: float) -> str:
    """A failure for people: who, where, how; what is known of it; what the others did meanwhile."""
    head = failure.what
    for rank in ranks:
        if rank.number == failure.rank:
            beat = rank.beat
            where = f" (pid {beat.pid} on {beat.host}, step {beat.step})" if beat else ""
            head = f"rank {rank.number}{where}: {failure.what}"
    lines = [head]
    if failure.rank != 0:  # what rank 0 printed has been shown
        lines += [f"  {line}" for line in failure.detail.splitlines()[-20:]]
    for rank in ranks:
        silence = now - rank.pulse.since
        if rank.number != failure.rank and rank.exited is None and rank.beat and silence > QUIET:
            what = f"{rank.beat.phase}, step {rank.beat.step}, nothing new for {silence:.0f} s"
            lines.append(f"meanwhile rank {rank.number}: {what}")
    return "\n".join(lines)


def in_words(code: int) -> str:
    """An exit code as subprocess gives it."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
