"""This node's ranks as they are seen from outside: what they write (`launch.jobs.heartbeats`), and
their processes.

A rank's process is known from its first heartbeat on, which has its id. The kernel wakes us when it
ends, by a descriptor (pidfd), and says how, in /proc, until its parent has asked: so it is only
sometimes known.
"""

import os
import select
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from launch.jobs import processes
from launch.jobs.heartbeats import Beat, End, Pulse, read_beat, read_end
from launch.jobs.nodes import STOPPED


@dataclass(kw_only=True)
class Rank:
    """What is known of one."""

    number: int
    pulse: Pulse
    end: End | None = None
    left: float = 0.0  # when that was read, by this process's clock
    exited: float | None = None  # when its process ended, Unix seconds
    code: int | None = None  # and how, as subprocess gives it, where that could be seen

    @property
    def beat(self) -> Beat | None:
        return self.pulse.beat

    @property
    def finished(self) -> bool:
        """Whether it has done its part, to the end or to the step where all were stopped."""
        if self.end:
            return self.end.code in (0, STOPPED)
        return self.exited is not None and self.beat is not None and self.beat.phase == "finished"

    @property
    def busy(self) -> bool:
        return self.end is None and self.exited is None


class Watch:
    """Sees the ranks of an attempt: all that is read of them is read here."""

    def __init__(self, folder: Path, numbers: Iterable[int]) -> None:
        now = time.monotonic()
        self.folder = folder
        self.ranks = [Rank(number=number, pulse=Pulse(since=now)) for number in numbers]
        self.zero = Pulse(since=now)  # of rank 0, on whatever node: it saves and samples for all
        self.poll, self.watched = (
            select.poll(),
            dict[int, Rank](),
        )  # descriptor of a rank's process -> the rank

    def look(self) -> None:
        """Reads what there is to read."""
        now = time.monotonic()
        for rank in self.ranks:
            known = rank.beat and rank.beat.pid
            rank.pulse.feel(read_beat(self.folder, rank.number), now)
            if rank.beat and rank.beat.pid != known:
                self.follow(rank, rank.beat.pid)
            if rank.end is None and (end := read_end(self.folder, rank.number)):
                rank.end, rank.left = end, now
        self.zero.feel(read_beat(self.folder, 0), now)

    def follow(self, rank: Rank, pid: int) -> None:
        try:
            descriptor = os.pidfd_open(pid)
        except OSError:
            self.note_exit(rank)
        else:
            self.watched[descriptor] = rank
            self.poll.register(descriptor, select.POLLIN)

    def wait(self, seconds: float) -> None:
        """For as long, or until a rank's process ends."""
        for descriptor, _ in self.poll.poll(seconds * 1000):
            rank = self.watched.pop(descriptor)
            self.poll.unregister(descriptor)
            os.close(descriptor)
            self.note_exit(rank)

    def note_exit(self, rank: Rank) -> None:
        rank.exited = rank.exited or time.time()
        if rank.beat and (facts := processes.stat(rank.beat.pid)) and facts[0] == "Z":
            rank.code = os.waitstatus_to_exitcode(facts[3])

    def suspended(self) -> list[Rank]:
        """Those whose processes are stopped: that is why others give up waiting for them, and they
        cannot say so.
        """
        states = [
            (rank, rank.beat and processes.stat(rank.beat.pid))
            for rank in self.ranks
            if rank.exited is None
        ]
        return [rank for rank, facts in states if facts and facts[0] in "Tt"]

    def close(self) -> None:
        for descriptor in self.watched:
            os.close(descriptor)
