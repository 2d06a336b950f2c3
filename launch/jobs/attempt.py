"""One attempt of a job on this node, from the start of the first process to the outcome.

Five times per second it reads what the ranks, the launcher and the other nodes have written
(`read`) and judges it (`judge`). The first of these that holds is the outcome:

    a rank found a mistake of the user           its line, and 2
    all ranks are done, here and elsewhere       0, or 75 if a signal stopped them
    a signal came, here or on another node       the ranks save and end; 1 if one of them does not
    a rank or the launcher has failed            1, once it is clear which failed first
    another node has failed or is silent         that node's code, or 1
"""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from launch.jobs import diagnosis, processes
from launch.jobs.children import Children
from launch.jobs.diagnosis import Failure
from launch.jobs.heartbeats import HANG, PAUSES, PHASE_TIMEOUTS
from launch.jobs.logs import Tail, last_lines
from launch.jobs.nodes import POLL, STOPPED, Outcome, Peers
from launch.jobs.plan import RENDEZVOUS_TIMEOUT, LaunchConfig, Process, find_port
from launch.jobs.ranks import Rank, RankMonitor

# From the folder of an attempt and the port of the rendezvous to the processes to start.
Plan = Callable[[Path, int], list[Process]]


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """How long a supervisor waits, in seconds; tests wait less."""

    # Without a new step, until a rank hangs; longer if its steps are slow.
    hang: float = HANG
    # After the first sign of a failure, for the reports that explain it.
    report_wait: float = 2.0
    # After SIGTERM, for the next sign that the ranks follow it.
    stop: float = 60.0
    # After a rank's exit report, until its process has ended.
    exit: float = 30.0
    # From SIGTERM to SIGKILL, for processes that should have ended.
    kill: float = 5.0
    # The same for the guard, which ends the processes of a supervisor that was killed.
    guard: float = 10.0
    # For the other nodes to start.
    rendezvous: float = RENDEZVOUS_TIMEOUT
    # Without a sign of another node: network file systems show changes late.
    node: float = 120.0
    # Before the first restart; doubled for each that follows.
    backoff: float = 2.0


@dataclass(frozen=True, kw_only=True)
class NodeJob:
    """A job as one node has it: what stays the same over its attempts."""

    config: LaunchConfig
    run_dir: Path
    plan: Plan
    timeouts: Timeouts
    job_id: str  # in the environment of all its processes
    signals: list[int]  # numbers of the signals that this process has received
    remotes: Children  # the ssh connections by which node 0 starts the other nodes


class Attempt:
    """The state of an attempt; `folder` has its logs and heartbeats.

    Times are of this process's monotonic clock, except where Unix seconds are mentioned.
    """

    def __init__(self, job: NodeJob, folder: Path) -> None:
        self.job = job
        self.config = job.config
        self.timeouts = job.timeouts
        self.signals = job.signals
        self.folder = folder

        self.launchers = Children(folder, job.job_id, "launch.launcher")
        self.monitor = RankMonitor(folder, job.config.ranks)
        self.ranks = self.monitor.ranks
        self.tails = [Tail(folder / f"rank_{rank}.log", rank) for rank in job.config.ranks]
        self.peers = Peers(job.config, folder, job.timeouts.node)

        # By rank or launcher, each as it was first seen.
        self.failures: dict[int | str, Failure] = {}
        self.failed_at: float | None = None  # when the first failure was seen
        self.stopped_at: float | None = None  # when the ranks were sent SIGTERM
        self.done_at: float | None = None  # when all ranks here were done

    def run(self) -> Outcome:
        """Starts the processes once all nodes are there, and returns when the attempt is over.

        Processes may then still run; the supervisor ends them.
        """
        if self.config.node_rank == 0 and self.config.launcher != "none":
            # In each attempt anew, as a port that was free may be taken by now.
            self.peers.port = find_port(self.config)
        if (outcome := self.wait_for_nodes()) is not None:
            return outcome

        # No note of node 0 is missing: all have been waited for.
        port = self.peers.port if self.config.node_rank == 0 else self.peers.notes[0]["port"]
        for process in self.job.plan(self.folder, port):
            self.launchers.start(process)

        while True:
            self.read()
            if (outcome := self.judge(time.monotonic())) is not None:
                return outcome
            self.monitor.wait(POLL)

    def close(self) -> None:
        """Once all processes have ended: shows the rest of the logs."""
        self.monitor.close()
        for tail in self.tails:
            tail.show(final=True)

    def wait_for_nodes(self) -> Outcome | None:
        """Returns once all other nodes are there; an outcome if they do not come."""
        deadline = time.monotonic() + self.timeouts.rendezvous
        while True:
            self.peers.publish()
            self.peers.read()
            missing = self.peers.missing()
            failure = self.peers.failure()
            if failure or not missing:
                return failure

            noun = "node" if len(missing) == 1 else "nodes"
            names = f"{noun} {', '.join(map(str, missing))} of {self.config.nodes}"
            if self.signals or self.peers.any_stopped():
                message = f"stopped while waiting for {names}; the same command resumes"
                return Outcome(code=STOPPED, message=message)

            # An ssh connection that failed is the reason why its node does not come.
            for name, code in self.job.remotes.exit_codes().items():
                if code:
                    how = diagnosis.describe_exit_code(code)
                    output = last_lines(self.job.remotes.log(name), 1)
                    return Outcome(code=1, message=f"{name} ended ({how}): {output}")

            if time.monotonic() > deadline:
                return Outcome(
                    code=1,
                    message=f"{names} not here within {self.timeouts.rendezvous:g} s: start the "
                    "same command there with its launch.node_rank; all nodes have to share "
                    f"{self.job.run_dir}",
                )
            time.sleep(POLL)

    def read(self) -> None:
        """Reads what ranks and nodes have written."""
        self.monitor.read()
        for tail in self.tails:
            tail.show()

        self.peers.publish()
        self.peers.read()
        processes.reap([*self.launchers.pids, *self.job.remotes.pids])

    def judge(self, now: float) -> Outcome | None:
        """The attempt's outcome, once there is one."""
        for rank in self.ranks:
            if rank.exit_report and rank.exit_report.code == 2:
                return Outcome(code=2, message=rank.exit_report.error or "a rank refused its input")

        if all(rank.finished for rank in self.ranks):
            return self.finish(now)

        if not self.signals and self.peers.any_stopped():
            self.signals.append(signal.SIGTERM)
        if self.signals and (outcome := self.stop(now)):
            return outcome

        # What was seen first stays: a later look at the same failure would date it later.
        self.failures = self.find_failures(now) | self.failures
        return self.conclude(now) if self.failures else self.peers.failure()

    def finish(self, now: float) -> Outcome | None:
        """All ranks here are done: waits for the ranks of other nodes and for the launchers."""
        if self.done_at is None:
            self.done_at = now
        outcome = Outcome(
            code=max(rank.exit_report.code if rank.exit_report else 0 for rank in self.ranks)
        )
        self.peers.done = outcome.code

        if failure := self.peers.failure():
            return failure
        if self.peers.any_running() and now - self.done_at < PHASE_TIMEOUTS["finished"]:
            return None

        # MindSpore's scheduler may wait for a rank that ended without disconnecting, so that a
        # launcher is not waited for longer than `end`.
        exits = [rank.exited for rank in self.ranks if rank.exited is not None]
        ranks_gone = len(exits) == len(self.ranks)
        all_gone = ranks_gone and (
            not self.launchers.running() or time.time() - max(exits) > self.timeouts.kill
        )
        # A single rank is connected to nothing that could be left waiting.
        single = self.config.size == 1
        if all_gone or single or now - self.done_at > self.timeouts.exit:
            return outcome
        return None

    def stop(self, now: float) -> Outcome | None:
        """After a signal: the ranks save the same step and end.

        An outcome if one of them does not, or if there is nothing to save.
        """
        if self.stopped_at is None:
            self.stopped_at = now
            pids = [rank.beat.pid for rank in self.ranks if rank.beat and rank.exited is None]
            processes.send_signal(pids, signal.SIGTERM)

        # While it compiles a rank handles no signals; before the first step nothing is lost.
        if not any(rank.progress.trained for rank in self.ranks):
            return Outcome(
                code=STOPPED, message="stopped before the first step; the same command resumes"
            )

        saving = [
            rank.progress.since
            for rank in self.ranks
            if rank.running and rank.progress.phase in PAUSES
        ]
        slowest_step = max(rank.progress.median_step for rank in self.ranks)
        limit = (
            PHASE_TIMEOUTS["checkpoint"] if saving else max(self.timeouts.stop, 4 * slowest_step)
        )
        last_sign = max([self.stopped_at, *saving, *(rank.exit_report_read for rank in self.ranks)])
        if now - last_sign <= limit:
            return None

        slow = ", ".join(str(rank.number) for rank in self.ranks if not rank.finished)
        return Outcome(
            code=1,
            message=f"rank {slow} did not stop within {limit:.0f} s of the signal and was killed; "
            "the newest checkpoint is intact, and the same command resumes from it",
        )

    def find_failures(self, now: float) -> dict[int | str, Failure]:
        """What is wrong with ranks and launchers at this moment."""
        unix_now = time.time()
        ranks_progress = [*(rank.progress for rank in self.ranks), self.monitor.rank_0_progress]
        excused = any(progress.pausing(now) for progress in ranks_progress)

        failures: dict[int | str, Failure | None] = {
            rank.number: diagnosis.rank_failure(
                rank,
                now=now,
                unix_now=unix_now,
                hang=self.timeouts.hang,
                report_wait=self.timeouts.report_wait,
                excused=excused,
            )
            for rank in self.ranks
        }

        for name, code in self.launchers.exit_codes().items():
            # A signal that was sent to all processes of the job; the ranks of msrun live on.
            if self.signals and -code in self.signals:
                continue
            failures[name] = diagnosis.launcher_failure(
                name,
                code,
                ended_for=now - self.launchers.ended_at[name],
                unix_now=unix_now,
                report_wait=self.timeouts.report_wait,
            )

        if any(rank.beat is None for rank in self.ranks):
            exit_codes = diagnosis.parse_msrun_exits(self.launchers.output())
            failures["died_before_heartbeat"] = diagnosis.died_before_heartbeat(
                self.ranks, exit_codes, unix_now
            )

        return {source: failure for source, failure in failures.items() if failure}

    def conclude(self, now: float) -> Outcome | None:
        """Which failure was the first, as soon as that is clear."""
        if self.failed_at is None:
            self.failed_at = now
        elapsed = now - self.failed_at
        report_wait = self.timeouts.report_wait
        if elapsed < report_wait:
            return None

        self.failures |= {
            rank.number: diagnosis.suspended_failure(rank) for rank in self.monitor.suspended()
        }
        exits = {rank.number: rank.exited for rank in self.ranks if rank.exited is not None}
        failure = diagnosis.first_failure(self.failures.values(), exits)

        # The launcher's log may say by now how a rank without an exit report ended.
        if failure.silent and failure.rank is not None:
            code = self.exit_code(self.ranks[failure.rank - self.config.ranks[0]])
            if code is None and elapsed < 3 * report_wait:
                return None
            if code is not None:
                failure = replace(failure, message=diagnosis.describe_exit_code(code))

        # An error may follow from a failure on another node, which needs time to arrive here.
        peer_failure = self.peers.failure()
        may_follow = bool(self.peers.others) and not failure.silent
        if may_follow and peer_failure is None and elapsed < 2 * report_wait:
            return None

        lines = [peer_failure.message] if peer_failure and not failure.silent else []
        lines.append(diagnosis.describe(self.with_log(failure), self.ranks, now))
        lines.append(f"logs: {self.folder}")
        return Outcome(code=1, message="\n".join(lines))

    def with_log(self, failure: Failure) -> Failure:
        """`failure` with the last lines of its logs as its detail, if it has none."""
        num_lines = 12 if len(failure.logs) == 1 else 4
        ends = [last_lines(self.folder / f"{name}.log", num_lines) for name in failure.logs]
        return replace(failure, detail=failure.detail or "\n".join(ends))

    def exit_code(self, rank: Rank) -> int | None:
        """How the process of a rank without an exit report ended, if that is known."""
        if rank.exit_code is not None:
            return rank.exit_code

        # With launcher none, the launcher is the rank itself.
        code = self.launchers.exit_codes().get("rank_0")
        if code is not None:
            return code

        output = self.launchers.output()
        by_pid = diagnosis.parse_msrun_exits(output)
        pid = rank.beat.pid if rank.beat else 0
        return by_pid.get(pid, diagnosis.parse_mpirun_signal(output))
