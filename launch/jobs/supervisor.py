"""Starts a job's processes on this node and owns them to the end: whatever happens, the job ends
soon, says what happened, and leaves no process behind.

msrun and mpirun start the ranks, and no more is left to them: msrun passes no signals on, waits for
its scheduler without a limit and leaves its ranks behind when it is killed; both kill all other
ranks as soon as one exits with a code. The state of a job is observed from outside: by heartbeats
and processes (`launch.jobs.ranks`) and by the notes of the other nodes (`launch.jobs.nodes`). One
start of all ranks is an attempt (`launch.jobs.attempt`); a job is one attempt or more.

    all ranks are done  0
    SIGTERM, SIGINT     is passed on to the ranks, which save and end: 75. After a second SIGINT all
                        are killed: 130
    a user's mistake    that a rank found: its line, and 2
    any other failure   ends all ranks and is named: 1, or the next of `restarts` attempts
"""

import contextlib
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from launch.jobs import processes
from launch.jobs.attempt import Attempt, NodeJob, Plan, Timeouts
from launch.jobs.children import Children
from launch.jobs.nodes import POLL, STOPPED, Outcome, Peers, open_attempt
from launch.jobs.plan import NODE_LOCK, LaunchConfig, Process
from pipeline.errors import UserError
from pipeline.files import lock
from pipeline.runtime import child_environment
from pipeline.train import checkpoint

MAX_BACKOFF = 60.0  # seconds between two attempts, at most


def supervise(
    config: LaunchConfig,
    run_dir: Path,
    plan: Plan,
    *,
    remotes: Sequence[Process] = (),
    timeouts: Timeouts | None = None,
) -> int:
    """Runs this node's part of a job, from its first attempt to its last; the exit code.

    `remotes` start the other nodes. To be called from the main thread of a process that does
    nothing else: it handles signals and adopts all orphans. UserError for the user's mistakes.
    """
    job_id = secrets.token_hex(8)
    signals: list[int] = []
    timeouts = timeouts or Timeouts()

    # The lock comes first: a second supervisor of this node must not start anything.
    with (
        lock(run_dir, NODE_LOCK.format(config.node_rank)),
        recording_signals(signals),
        guarded(job_id, timeouts.guard) as guard_pid,
    ):
        # Before any process is started, as what its children leave behind has to come here.
        processes.adopt_orphans()
        (run_dir / "logs").mkdir(exist_ok=True)

        nodes = Children(run_dir / "logs", job_id, "launch.hosts")
        for process in remotes:
            nodes.start(process)

        job = NodeJob(
            config=config,
            run_dir=run_dir,
            plan=plan,
            timeouts=timeouts,
            job_id=job_id,
            signals=signals,
            remotes=nodes,
        )
        outcome = Supervisor(job, guard_pid).run()

    if outcome.code == 2:
        raise UserError(outcome.message)
    say(outcome.message)
    return outcome.code


@contextlib.contextmanager
def recording_signals(signals: list[int]) -> Iterator[None]:
    """Appends each SIGTERM and SIGINT to `signals`; a second SIGINT raises KeyboardInterrupt."""

    def record(number: int, frame: FrameType | None) -> None:
        repeated = number == signal.SIGINT and number in signals
        signals.append(number)
        # Not at the third: the processes are being ended then.
        if repeated and signals.count(number) == 2:
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, record) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def guarded(job_id: str, grace: float) -> Iterator[int]:
    """Runs the job's guard (`launch.jobs.processes`); its pid.

    When this process ends, even by SIGKILL, the guard's input closes and it ends the job's
    processes: SIGTERM, and SIGKILL after `grace` seconds.
    """
    argv = [sys.executable, "-m", "launch.jobs.processes", job_id, str(grace)]
    # In a session of its own: Ctrl-C and the end of the terminal must not end the guard.
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, env=child_environment({}), start_new_session=True
    ) as guard:
        # Leaving the block closes the guard's input and waits for its end.
        yield guard.pid


class AttemptEnd(NamedTuple):
    """The end of an attempt, and whether the job ends with it."""

    outcome: Outcome
    last: bool


class Supervisor:
    """A node's part of a job: attempts, until one is the last."""

    def __init__(self, job: NodeJob, guard_pid: int) -> None:
        self.job = job
        self.guard_pid = guard_pid
        self.restarts = 0  # since the newest checkpoint

    def run(self) -> Outcome:
        """Makes attempts; the outcome of the last."""
        job = self.job
        previous: int | None = None
        while True:
            opened = open_attempt(
                job.config,
                job.run_dir,
                previous=previous,
                timeout=job.timeouts.rendezvous,
                stopping=lambda: bool(job.signals),
            )
            if isinstance(opened, Outcome):
                return opened
            previous = opened

            attempt = Attempt(job, job.run_dir / "logs" / f"attempt-{opened}")
            end = self.run_attempt(attempt)
            if end.last:
                return self.final_outcome(end.outcome)

            say(end.outcome.message)
            self.pause()
            if job.signals:
                # The other nodes may wait for the next attempt: they are told that there is none.
                message = f"{job.run_dir}: stopped between attempts; the same command resumes"
                outcome = Outcome(code=STOPPED, message=message)
                self.release_nodes(attempt.peers, outcome, job.timeouts.exit)
                return outcome

    def final_outcome(self, outcome: Outcome) -> Outcome:
        """The last attempt's outcome, with the number of restarts if they were used up."""
        job = self.job
        if outcome.code != 1 or not job.config.restarts or job.signals:
            return outcome

        ending = f"{job.run_dir}: given up after {self.restarts} restarts without a new checkpoint"
        return Outcome(code=1, message=f"{outcome.message}\n{ending}")

    def run_attempt(self, attempt: Attempt) -> AttemptEnd:
        """Runs an attempt until none of its processes is left."""
        job = self.job
        step_before = self.newest_step()
        grace = job.timeouts.kill
        # What the other nodes learn if an exception leaves this method.
        outcome = Outcome(code=1, message="interrupted")
        last = True
        try:
            outcome = attempt.run()
            # A new checkpoint is progress, after which restarts are counted from 0.
            if self.newest_step() > step_before:
                self.restarts = 0
            last = outcome.code != 1 or bool(job.signals) or not self.may_restart()
            attempt.peers.publish(outcome)  # the other nodes need not wait until all here has ended
        except UserError as error:
            outcome = Outcome(code=2, message=str(error))
        except KeyboardInterrupt:
            # A second Ctrl-C: the ranks get no time to save.
            grace = 0.0
            raise
        finally:
            # The guard and the ssh connections belong to the job, not to the attempt.
            exclude = [self.guard_pid, *job.remotes.pids]
            remaining = processes.end_processes(
                job.job_id,
                grace,
                exclude=exclude,
                children=[*exclude, *attempt.launchers.pids],
            )
            attempt.close()
            if last:
                patience = job.timeouts.exit if grace else 0.0
                self.release_nodes(attempt.peers, outcome, patience)

        if remaining:
            say(
                f"{job.run_dir}: processes {remaining} do not end, not even by SIGKILL: they wait "
                "for a disk or a device"
            )
        return AttemptEnd(outcome, last)

    def newest_step(self) -> int:
        """The step of the newest complete checkpoint; -1 if there is none."""
        # By their names: to verify gigabytes would delay each attempt.
        return max(checkpoint.steps(self.job.run_dir / "checkpoints"), default=-1)

    def may_restart(self) -> bool:
        """Whether another attempt may follow: node 0 decides, the others follow it."""
        config = self.job.config
        if config.node_rank == 0:
            return self.restarts < config.restarts
        # How many are left only node 0 knows; `open_attempt` waits for its next attempt, or for its
        # note that there is none.
        return config.restarts > 0

    def pause(self) -> None:
        """Waits before a restart, longer each time; a signal ends it."""
        job = self.job

        seconds = min(MAX_BACKOFF, job.timeouts.backoff * 2**self.restarts)
        self.restarts += 1
        say(
            f"{job.run_dir}: restart {self.restarts} of {job.config.restarts} without a new "
            f"checkpoint, in {seconds:g} s"
        )

        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not job.signals:
            time.sleep(POLL)

    def release_nodes(self, peers: Peers, outcome: Outcome, patience: float) -> None:
        """Publishes that the job is over, waits for the other nodes to end, and ends their ssh.

        A node that starts only now needs a beat that changes, so the note is published repeatedly.
        """
        deadline = time.monotonic() + patience
        while True:
            peers.publish(outcome, over=True)
            if not self.job.remotes.running() or time.monotonic() >= deadline:
                break
            time.sleep(POLL)

        self.job.remotes.kill()


def say(text: str) -> None:
    """Prints to stderr. Its reader may be gone, which must not end the job."""
    with contextlib.suppress(OSError):
        if text:
            print(text, file=sys.stderr, flush=True)
