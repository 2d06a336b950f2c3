"""Owning a tree of processes on Linux: every one is found again, whatever it did to get away, and
ended.

A process group is left by `setsid` (msrun does that to its workers), a parent by outliving it. Two
things stay: the environment that a process was started with, where a mark is put, and the line of
parents, which the kernel continues at the nearest "subreaper" when a parent dies. Who has either is
ours; a process is ended by its id, never by name.

    python -m launch.jobs.processes MARK

waits until its standard input closes, which the kernel does however the process at the other end
dies, and then ends all that is marked: so that a supervisor that is killed with SIGKILL leaves no
ranks behind.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Collection
from pathlib import Path

from pipeline.runtime import process_environment

NAME = "CASCADE_JOB"  # the variable that carries the mark
PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Makes this process the parent of all descendants that lose theirs (Linux; elsewhere the mark
    must do).
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def stat(pid: int) -> tuple[str, int, int, int] | None:
    """(state, parent, start in clock ticks since boot, wait status if it is a zombie), or None
    where none is.
    """
    try:
        fields = (
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        )  # its name may hold anything
    except OSError:
        return None
    return fields[0], int(fields[1]), int(fields[19]), int(fields[49])


def alive(pid: int) -> bool:
    """Whether it can still do anything: a zombie cannot."""
    found = stat(pid)
    return found is not None and found[0] not in "ZX"


def ours(mark: str, spare: Collection[int] = ()) -> list[int]:
    """The living that carry the mark, or descend from this process, but for it and `spare`."""
    me, needle = os.getpid(), f"{NAME}={mark}"
    parents, found = dict[int, int](), set[int]()
    for pid in [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]:
        facts = stat(pid)
        if facts is None or facts[0] in "ZX" or pid == me:
            continue
        parents[pid] = facts[1]
        if needle in process_environment(pid):
            found.add(pid)
    for pid in parents:
        line = {pid}
        while (up := parents.get(pid, pid)) not in line:
            pid = up
            line.add(pid)
        if up == me:
            found |= line - {me}
    return sorted(found - set(spare))


def send(pids: Collection[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def end(
    mark: str, grace: float, spare: Collection[int] = (), children: Collection[int] = ()
) -> list[int]:
    """SIGTERM, `grace` seconds later SIGKILL, until nothing of ours is left; who still is, after 30
    s of that.

    SIGCONT goes with it: what was stopped does not get a SIGTERM. `children` are as in `reap`.
    """
    begun, asked = time.monotonic(), set[int]()
    while left := ours(mark, spare):
        late = time.monotonic() - begun
        if late > grace + 30:  # in the kernel, waiting for a disk that does not answer
            return left
        if late >= grace:
            send(left, signal.SIGKILL)
        else:
            new = set(left) - asked  # one may have been started while we looked
            send(new, signal.SIGTERM)
            send(new, signal.SIGCONT)
            asked |= new
        reap(children)
        time.sleep(0.05)
    reap(children)
    return []


def reap(children: Collection[int] = ()) -> None:
    """Takes the exit statuses of adopted orphans, so that no zombies gather; those of `children`
    are Popen's.
    """
    me = os.getpid()
    with contextlib.suppress(OSError):
        for pid in map(int, Path(f"/proc/{me}/task/{me}/children").read_text().split()):
            if pid not in children and (facts := stat(pid)) and facts[0] == "Z":
                os.waitpid(pid, os.WNOHANG)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while os.read(0, 1):
        pass
    end(sys.argv[1], 10)
