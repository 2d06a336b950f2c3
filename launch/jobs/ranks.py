"""This node's ranks, observed from outside: by what they write (`launch.jobs.heartbeats`) and by
their processes.

A rank's process is known from its first heartbeat on, which has its pid. The kernel wakes this
process when it ends, by a descriptor (pidfd). /proc has its exit status only until its parent has
collected it, so that the status is not always known.
"""

import os
import select
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from launch.jobs import processes
from launch.jobs.heartbeats import (
    ExitReport,
    HeartbeatRecord,
    RankProgress,
    read_exit_report,
    read_heartbeat,
)
from launch.jobs.nodes import STOPPED


@dataclass(kw_only=True)
class Rank:
    """What is known of a rank."""

    number: int
    progress: RankProgress
    exit_report: ExitReport | None = None
    exit_report_read: float = 0.0  # monotonic time at which that was read
    exited: float | None = None  # Unix seconds at which its process ended
    exit_code: int | None = None  # of its process as subprocess gives it, if it was seen

    @property
    def beat(self) -> HeartbeatRecord | None:
        return self.progress.beat

    @property
    def finished(self) -> bool:
        """Whether it has trained to the end, or to the step at which all were stopped."""
        if self.exit_report:
            return self.exit_report.code in (0, STOPPED)
        return self.exited is not None and self.beat is not None and self.beat.phase == "finished"

    @property
    def running(self) -> bool:
        return self.exit_report is None and self.exited is None


class RankMonitor:
    """Observes the ranks of an attempt: all that is read of them is read here."""

    def __init__(self, folder: Path, numbers: Iterable[int]) -> None:
        now = time.monotonic()
        self.folder = folder
        self.ranks = [Rank(number=number, progress=RankProgress(since=now)) for number in numbers]
        # Of rank 0, on whatever node: it saves and samples for all.
        self.rank_0_progress = RankProgress(since=now)

        self.poller = select.poll()
        self.by_descriptor: dict[int, Rank] = {}  # pidfd of a rank's process -> the rank

    def read(self) -> None:
        """Reads heartbeats and exit reports."""
        now = time.monotonic()
        for rank in self.ranks:
            previous_pid = rank.beat.pid if rank.beat else None
            rank.progress.update(read_heartbeat(self.folder, rank.number), now)
            # The heartbeat has the pid: before the first one there is no process to follow.
            if rank.beat and rank.beat.pid != previous_pid:
                self.follow(rank, rank.beat.pid)

            if rank.exit_report is None and (report := read_exit_report(self.folder, rank.number)):
                rank.exit_report = report
                rank.exit_report_read = now

        self.rank_0_progress.update(read_heartbeat(self.folder, 0), now)

    def follow(self, rank: Rank, pid: int) -> None:
        """From now on `wait` notices the end of the rank's process."""
        try:
            # A descriptor stands for this process alone; a pid may be given to another one.
            descriptor = os.pidfd_open(pid)
        except OSError:  # it has ended already
            self.note_exit(rank)
        else:
            self.by_descriptor[descriptor] = rank
            self.poller.register(descriptor, select.POLLIN)

    def wait(self, seconds: float) -> None:
        """Returns after `seconds`, or as soon as a rank's process ends."""
        # In milliseconds. A pidfd is readable once its process has ended.
        for descriptor, _ in self.poller.poll(seconds * 1000):
            rank = self.by_descriptor.pop(descriptor)
            self.poller.unregister(descriptor)
            os.close(descriptor)
            self.note_exit(rank)

    def note_exit(self, rank: Rank) -> None:
        rank.exited = rank.exited or time.time()
        process = processes.stat(rank.beat.pid) if rank.beat else None
        # A zombie: once its parent has collected the status, the entry in /proc is gone.
        if process and process.state == "Z":
            rank.exit_code = os.waitstatus_to_exitcode(process.wait_status)

    def suspended(self) -> list[Rank]:
        """The ranks whose processes are stopped (SIGSTOP), for which the others wait in vain."""
        suspended = []
        for rank in self.ranks:
            if rank.exited is None and rank.beat:
                process = processes.stat(rank.beat.pid)
                # T: stopped by a signal. t: by a debugger.
                if process and process.state in "Tt":
                    suspended.append(rank)
        return suspended

    def close(self) -> None:
        for descriptor in self.by_descriptor:
            os.close(descriptor)
