"""One attempt of a job on this node, from the first process that is started to the outcome.

Five times a second it reads what the ranks, the launcher and the other nodes have written (`look`)
and judges it (`judge`): the first of these that holds is the outcome.

    a rank found a user's mistake                      its line, and 2
    all ranks here are done, and those elsewhere       0, or 75 if a signal stopped them
    a signal came, here or on another node             the ranks save and end; 1 if one of them does not
    a rank or the launcher has failed (launch.jobs.diagnosis)  1, as soon as it is clear which was the first
    another node has failed or says nothing any more   that node's code, or 1
"""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from launch.jobs import diagnosis, processes
from launch.jobs.children import Children
from launch.jobs.heartbeats import HANG, PATIENCE, PAUSES
from launch.jobs.logs import Tail, last_lines
from launch.jobs.nodes import POLL, STOPPED, Outcome, Peers
from launch.jobs.plan import MEETING, LaunchConfig, Process, find_port
from launch.jobs.ranks import Watch

Plan = Callable[[Path, int], list[Process]]  # the attempt's folder and port -> what to start


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Seconds that are waited; tests wait less."""

    hang: float = HANG
    settle: float = 2.0  # after the first sign of a failure, for those that explain it
    stop: float = 60.0  # after SIGTERM, for the next sign that the ranks get on with it
    leave: float = 30.0  # after a rank's last word, until its process is gone
    end: float = 5.0  # from SIGTERM to SIGKILL, for what has no reason to live
    meet: float = MEETING
    node: float = 120.0  # without a sign of another node: network file systems show changes late
    backoff: float = 2.0  # before the first restart, doubled for each that follows


class Attempt:
    """What is known of it; `signals` are those that came to this process, `remotes` what started
    the other nodes.
    """

    def __init__(
        self,
        config: LaunchConfig,
        folder: Path,
        mark: str,
        limits: Limits,
        signals: list[int],
        remotes: Children,
    ) -> None:
        self.config, self.folder, self.limits, self.signals, self.remotes = (
            config,
            folder,
            limits,
            signals,
            remotes,
        )
        self.launchers = Children(folder, mark, "launch.launcher")
        self.watch = Watch(folder, config.ranks)
        self.ranks = self.watch.ranks
        self.tails = [Tail(folder / f"rank_{rank}.log", rank) for rank in config.ranks]
        self.peers = Peers(config, folder, limits.node)
        self.failures: dict[int | str, diagnosis.Failure] = {}  # by rank or launcher, as first seen
        self.failed = self.stopped = self.done = (
            0.0  # since when, by this process's clock; 0 is not yet
        )

    def run(self, plan: Plan) -> Outcome:
        """Starts what `plan` says once all nodes are there, and returns when it is over or has to
        be.
        """
        if self.config.node_rank == 0 and self.config.launcher != "none":
            self.peers.port = find_port(self.config)
        if (outcome := self.gather()) is not None:
            return outcome
        port = self.peers.port if self.config.node_rank == 0 else self.peers.notes[0]["port"]
        for process in plan(self.folder, port):
            self.launchers.start(process)
        while True:
            self.look()
            if (outcome := self.judge(time.monotonic())) is not None:
                return outcome
            self.watch.wait(POLL)

    def close(self) -> None:
        """When all processes are gone: shows the last of the logs."""
        self.watch.close()
        for tail in self.tails:
            tail.show(final=True)

    def gather(self) -> Outcome | None:
        """Waits for the other nodes; an outcome if they do not come."""
        until = time.monotonic() + self.limits.meet
        while True:
            self.peers.tell()
            self.peers.look()
            missing = self.peers.missing()
            if (verdict := self.peers.verdict()) or not missing:
                return verdict
            who = f"{'node' if len(missing) == 1 else 'nodes'} {', '.join(map(str, missing))} of {self.config.nodes}"
            if self.signals or self.peers.stopped():
                return Outcome(
                    code=STOPPED, what=f"stopped while waiting for {who}; the same command goes on"
                )
            for name, code in self.remotes.codes.items():
                if code:
                    said = last_lines(self.remotes.log(name), 1)
                    return Outcome(
                        code=1, what=f"{name} ended ({diagnosis.in_words(code)}): {said}"
                    )
            if time.monotonic() > until:
                return Outcome(
                    code=1,
                    what=f"{who} not here within {self.limits.meet:g} s: start the same command there with its "
                    f"launch.node_rank; all nodes have to share {self.folder.parent.parent}",
                )
            time.sleep(POLL)

    def look(self) -> None:
        """Reads what there is to read."""
        self.watch.look()
        for tail in self.tails:
            tail.show()
        self.peers.tell()
        self.peers.look()
        processes.reap([*self.launchers.pids, *self.remotes.pids])

    def judge(self, now: float) -> Outcome | None:
        """The attempt's outcome, once there is one."""
        for rank in self.ranks:
            if rank.end and rank.end.code == 2:
                return Outcome(code=2, what=rank.end.error or "a rank was given what it cannot use")
        if all(rank.finished for rank in self.ranks):
            return self.leave(now)
        if not self.signals and self.peers.stopped():
            self.signals.append(signal.SIGTERM)
        if self.signals and (outcome := self.stop(now)):
            return outcome
        self.failures = self.find_failures(now) | self.failures
        return self.conclude(now) if self.failures else self.peers.verdict()

    def leave(self, now: float) -> Outcome | None:
        """All ranks here are done: waits for those of the other nodes, and for those who started
        them.
        """
        self.done = self.done or now
        outcome = Outcome(code=max(rank.end.code if rank.end else 0 for rank in self.ranks))
        self.peers.done = outcome.code
        if (verdict := self.peers.verdict()) or (
            self.peers.busy() and now - self.done < PATIENCE["finished"]
        ):
            return verdict
        exits = [rank.exited for rank in self.ranks if rank.exited is not None]
        gone = len(exits) == len(self.ranks) and (
            # the scheduler may wait for a rank that had no time to say goodbye
            not self.launchers.running or time.time() - max(exits) > self.limits.end
        )
        alone = self.config.size == 1  # nobody to meet, and so the scheduler waits for nothing
        return outcome if gone or alone or now - self.done > self.limits.leave else None

    def stop(self, now: float) -> Outcome | None:
        """After a signal the ranks save the same step and end. An outcome if they do not, or have
        nothing to save.
        """
        if not self.stopped:
            self.stopped = now
            alive = [rank.beat.pid for rank in self.ranks if rank.beat and rank.exited is None]
            processes.send(alive, signal.SIGTERM)
        if not any(
            rank.pulse.trained for rank in self.ranks
        ):  # compilers do not listen, and there is nothing to lose
            return Outcome(
                code=STOPPED, what="stopped before the first step; the same command goes on"
            )
        saving = [
            rank.pulse.since for rank in self.ranks if rank.busy and rank.pulse.phase in PAUSES
        ]
        slowest = max(rank.pulse.pace for rank in self.ranks)
        limit = PATIENCE["checkpoint"] if saving else max(self.limits.stop, 4 * slowest)
        if now - max([self.stopped, *saving, *(rank.left for rank in self.ranks)]) <= limit:
            return None
        slow = ", ".join(str(rank.number) for rank in self.ranks if not rank.finished)
        return Outcome(
            code=1,
            what=f"told to stop, rank {slow} did not within {limit:.0f} s and was killed; the newest checkpoint is as "
            "it was, and the same command goes on from it",
        )

    def find_failures(self, now: float) -> dict[int | str, diagnosis.Failure]:
        """What is wrong with ranks and with those who started them."""
        clock, hang, settle = time.time(), self.limits.hang, self.limits.settle
        excused = any(
            pulse.pausing(now) for pulse in (*(rank.pulse for rank in self.ranks), self.watch.zero)
        )
        found: dict[int | str, diagnosis.Failure | None] = {
            rank.number: diagnosis.of_rank(rank, now, clock, hang, settle, excused)
            for rank in self.ranks
        }
        for name, code in self.launchers.codes.items():
            if (
                self.signals and -code in self.signals
            ):  # it was sent to all that this job is; msrun's ranks live on
                continue
            found[name] = diagnosis.of_launcher(
                name, code, now - self.launchers.seen[name], clock, settle
            )
        if any(rank.beat is None for rank in self.ranks):
            found["died_before_heartbeat"] = diagnosis.died_before_heartbeat(
                self.ranks, diagnosis.parse_msrun_exits(self.launchers.said), clock
            )
        return {who: failure for who, failure in found.items() if failure}

    def conclude(self, now: float) -> Outcome | None:
        """Which failure was the first, as soon as that is clear; then the other nodes need not be
        heard.
        """
        self.failed = self.failed or now
        since, settle = now - self.failed, self.limits.settle
        if since < settle:
            return None
        self.failures |= {rank.number: diagnosis.suspended(rank) for rank in self.watch.suspended()}
        exits = {rank.number: rank.exited for rank in self.ranks if rank.exited is not None}
        failure = diagnosis.first(self.failures.values(), exits)
        if (
            failure.silent and failure.rank is not None
        ):  # by now its launcher may have said how it ended
            code = self.death(failure.rank)
            if code is None and since < 3 * settle:
                return None
            failure = failure if code is None else replace(failure, what=diagnosis.in_words(code))
        verdict = self.peers.verdict()
        if verdict is None and self.peers.others and not failure.silent and since < 2 * settle:
            return None  # it may be another node's that was first
        before = [verdict.what] if verdict and not failure.silent else []
        said = [
            last_lines(self.folder / f"{name}.log", 12 if len(failure.logs) == 1 else 4)
            for name in failure.logs
        ]
        failure = replace(failure, detail=failure.detail or "\n".join(said))
        story = diagnosis.story(failure, self.ranks, now)
        return Outcome(code=1, what="\n".join([*before, story, f"logs: {self.folder}"]))

    def death(self, number: int) -> int | None:
        """How the process of a rank ended that left no word, if that is known."""
        rank = next(rank for rank in self.ranks if rank.number == number)
        if rank.code is not None:
            return rank.code
        if (
            code := self.launchers.codes.get("rank_0")
        ) is not None:  # launcher none: it is the rank's own
            return code
        said = self.launchers.said
        return diagnosis.parse_msrun_exits(said).get(
            rank.beat.pid if rank.beat else 0, diagnosis.parse_mpirun_signal(said)
        )
