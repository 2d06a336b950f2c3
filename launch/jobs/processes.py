"""Ownership of a tree of processes on Linux: every process of a job is found and ended.

A process can leave its group by `setsid` (msrun does that to its workers) and its parent by
outliving it. Two things remain: the environment that it was started with, which has the job's id;
and its line of ancestors, which the kernel continues at the nearest "subreaper" when a parent dies.
A process with either belongs to the job. Processes are ended by pid, never by name.

    python -m launch.jobs.processes JOB_ID GRACE

is the guard of a job: it waits until its standard input closes, which the kernel does however the
process at the other end dies, and then ends all processes with that job id, as `end_processes`
does. A supervisor that is killed by SIGKILL so leaves no ranks behind.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from pipeline.runtime import process_environment

JOB_VARIABLE = "CASCADE_JOB"  # environment variable of the job id
PR_SET_CHILD_SUBREAPER = 36
UNKILLABLE = 30.0  # seconds of SIGKILL after which a process is given up


def adopt_orphans() -> None:
    """Makes this process the parent of all descendants that lose theirs.

    Linux only; elsewhere processes are found by the job id alone.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class ProcessStat(NamedTuple):
    """A part of /proc/PID/stat."""

    state: str  # one letter: R running, S sleeping, T stopped, Z zombie, ...
    parent: int
    start_ticks: int  # clock ticks from boot to the start of the process
    wait_status: int  # as os.wait gives it, if it is a zombie


def stat(pid: int) -> ProcessStat | None:
    """None if there is no process `pid`."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None

    # The second field, in parentheses, is the name, which may hold spaces and parentheses.
    fields = text.rpartition(")")[2].split()
    # Fields 3, 4, 22 and 52 of proc_pid_stat(5); the first two are cut off.
    return ProcessStat(
        state=fields[0],
        parent=int(fields[1]),
        start_ticks=int(fields[19]),
        wait_status=int(fields[49]),
    )


def alive(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    process = stat(pid)
    return process is not None and process.state not in "ZX"


def job_processes(job_id: str, exclude: Collection[int] = ()) -> list[int]:
    """The living processes that have the job id or descend from this process, without itself."""
    own_pid = os.getpid()
    entry = f"{JOB_VARIABLE}={job_id}"
    parents: dict[int, int] = {}
    pids: set[int] = set()

    for pid in [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]:
        process = stat(pid)
        # Processes come and go while /proc is read.
        if process is None or process.state in "ZX" or pid == own_pid:
            continue
        parents[pid] = process.parent
        if entry in process_environment(pid):
            pids.add(pid)

    # Ancestors of each process, up to one that is not listed: this process, or one of another user.
    for pid in parents:
        line = {pid}
        # A process that is not listed stands for its own parent, which ends the walk.
        while (parent := parents.get(pid, pid)) not in line:
            pid = parent
            line.add(pid)
        if parent == own_pid:
            pids |= line - {own_pid}

    return sorted(pids - set(exclude))


def send_signal(pids: Collection[int], number: int) -> None:
    for pid in pids:
        # It may have ended since it was listed.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def end_processes(
    job_id: str, grace: float, *, exclude: Collection[int] = (), children: Collection[int] = ()
) -> list[int]:
    """Ends all processes of a job: SIGTERM, and SIGKILL after `grace` seconds.

    Returns the pids of those that still exist 30 s after the first SIGKILL. SIGCONT is sent too, as
    a stopped process does not handle SIGTERM. `exclude` are not ended; `children` as in `reap`.
    """
    started = time.monotonic()
    signalled: set[int] = set()
    while remaining := job_processes(job_id, exclude):
        elapsed = time.monotonic() - started
        if elapsed > grace + UNKILLABLE:  # in the kernel, waiting for a disk or a device
            return remaining

        if elapsed >= grace:
            send_signal(remaining, signal.SIGKILL)
        else:
            new = set(remaining) - signalled  # a process may have started another meanwhile
            send_signal(new, signal.SIGTERM)
            send_signal(new, signal.SIGCONT)
            signalled |= new

        reap(children)
        time.sleep(0.05)

    reap(children)
    return []


def reap(children: Collection[int] = ()) -> None:
    """Collects the exit statuses of adopted orphans, which would else stay zombies.

    `children` are left out: their statuses belong to their Popen objects.
    """
    own_pid = os.getpid()
    with contextlib.suppress(OSError):
        for pid in map(int, Path(f"/proc/{own_pid}/task/{own_pid}/children").read_text().split()):
            process = stat(pid)
            if pid not in children and process and process.state == "Z":
                os.waitpid(pid, os.WNOHANG)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while os.read(0, 1):
        pass
    end_processes(sys.argv[1], grace=float(sys.argv[2]))
