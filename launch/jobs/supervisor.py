"""Starts a job's processes on this node and owns them to the last: whatever happens, the job ends
soon, says truthfully what happened, and leaves nothing behind.

msrun and mpirun are good at starting and poor at the rest: msrun passes no signal on, waits for its
scheduler without a limit and forgets its ranks when it is killed; both kill all other ranks as soon
as one exits with a code. So they only start the ranks. The rest is known from outside: by
heartbeats and by the processes themselves (`launch.jobs.ranks`), and from the other nodes
(`launch.jobs.nodes`). One start of all ranks is an attempt (`launch.jobs.attempt`); a job is one or
more.

    all ranks are done  0
    SIGTERM, SIGINT     goes to the ranks, which save and end: 75. A second SIGINT does not wait for
        them: 130
    a user's mistake    that a rank found: its line, and 2
    any other failure   ends all ranks and names the first that failed: 1, or the next of `restarts`
        attempts
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

from launch.jobs import processes
from launch.jobs.attempt import Attempt, Limits, Plan
from launch.jobs.children import Children
from launch.jobs.nodes import POLL, STOPPED, Outcome, Peers, open_attempt
from launch.jobs.plan import NODE_LOCK, LaunchConfig, Process
from pipeline.errors import UserError
from pipeline.files import lock
from pipeline.runtime import child_environment
from pipeline.train import checkpoint

BACKOFF = 60.0  # seconds between two attempts, at most


def supervise(
    config: LaunchConfig,
    run: Path,
    plan: Plan,
    remotes: Sequence[Process] = (),
    limits: Limits | None = None,
) -> int:
    """The job on this node, from its first attempt to its last; the exit code. UserError for the
    user's mistakes.

    `remotes` start the other nodes. For the main thread of a process that does nothing else: it
    takes the signals and adopts all orphans.
    """
    mark, signals = secrets.token_hex(8), list[int]()
    with lock(run, NODE_LOCK.format(config.node_rank)), handling(signals), guarded(mark) as guard:
        processes.adopt_orphans()
        (run / "logs").mkdir(exist_ok=True)
        nodes = Children(run / "logs", mark, "launch.hosts")
        for process in remotes:
            nodes.start(process)
        outcome = Job(config, run, plan, limits or Limits(), signals, mark, guard, nodes).work()
    if outcome.code == 2:
        raise UserError(outcome.what)
    say(outcome.what)
    return outcome.code


@contextlib.contextmanager
def handling(signals: list[int]) -> Iterator[None]:
    """SIGTERM and SIGINT are noted in `signals` meanwhile; a second SIGINT raises."""

    def note(number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGINT and number in signals
        signals.append(number)
        if again and signals.count(number) == 2:  # a third must not disturb the ending
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def guarded(mark: str) -> Iterator[int]:
    """A process, by its id, that ends all that is marked should this one be killed: then its input
    closes.
    """
    argv = [sys.executable, "-m", "launch.jobs.processes", mark]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, env=child_environment({}), start_new_session=True
    ) as guard:
        yield guard.pid


class Job:
    """A node's share of it: attempts, until one is the last. `nodes` are what started the others,
    with node 0.
    """

    def __init__(
        self, config: LaunchConfig, run: Path, plan: Plan, limits: Limits, signals: list[int], mark: str, guard: int,
        nodes: Children,
    ) -> None:  # fmt: skip
        self.config, self.run, self.plan, self.limits, self.signals = (
            config,
            run,
            plan,
            limits,
            signals,
        )
        self.mark, self.guard, self.nodes = mark, guard, nodes
        self.used = 0  # restarts since the newest checkpoint

    def work(self) -> Outcome:
        """How the last attempt ended."""
        last = None
        while True:
            opened = open_attempt(
                self.config, self.run, last, self.limits.meet, lambda: bool(self.signals)
            )
            if isinstance(opened, Outcome):
                return opened
            folder, last = self.run / "logs" / f"attempt-{opened}", opened
            attempt = Attempt(self.config, folder, self.mark, self.limits, self.signals, self.nodes)
            outcome, over = self.carry_out(attempt)
            if over:
                if outcome.code == 1 and self.config.restarts and not self.signals:
                    given_up = (
                        f"{self.run}: given up after {self.used} restarts without a new checkpoint"
                    )
                    return Outcome(code=1, what=f"{outcome.what}\n{given_up}")
                return outcome
            say(outcome.what)
            self.pause()
            if self.signals:
                outcome = Outcome(
                    code=STOPPED,
                    what=f"{self.run}: stopped between attempts; the same command goes on",
                )
                self.dismiss(attempt.peers, outcome, self.limits.leave)
                return outcome

    def carry_out(self, attempt: Attempt) -> tuple[Outcome, bool]:
        """An attempt until nothing is left of it: how it ended, and whether the job is over with
        it.
        """
        saved, grace = self.saved(), self.limits.end
        outcome, over = Outcome(code=1, what="interrupted"), True
        try:
            outcome = attempt.run(self.plan)
            self.used = 0 if self.saved() > saved else self.used
            over = outcome.code != 1 or bool(self.signals) or not self.may_restart()
            attempt.peers.tell(outcome)  # the others need not wait for the end of what runs here
        except UserError as error:
            outcome = Outcome(code=2, what=str(error))
        except KeyboardInterrupt:
            grace = 0.0
            raise
        finally:
            spare = [self.guard, *self.nodes.pids]
            left = processes.end(self.mark, grace, spare, [*spare, *attempt.launchers.pids])
            attempt.close()
            if over:
                self.dismiss(attempt.peers, outcome, self.limits.leave if grace else 0.0)
        if left:
            say(
                f"{self.run}: processes {left} cannot be ended, not even by SIGKILL: they wait for a disk or a device"
            )
        return outcome, over

    def saved(self) -> int:
        """The newest step that was saved whole."""
        return max(checkpoint.steps(self.run / "checkpoints"), default=-1)

    def may_restart(self) -> bool:
        """Node 0 decides for all; the others follow it."""
        return (
            self.used < self.config.restarts
            if self.config.node_rank == 0
            else self.config.restarts > 0
        )

    def pause(self) -> None:
        """Before a restart, longer each time; until a signal comes."""
        seconds = min(BACKOFF, self.limits.backoff * 2**self.used)
        self.used += 1
        say(
            f"{self.run}: restart {self.used} of {self.config.restarts} without a new checkpoint, in {seconds:g} s"
        )
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.signals:
            time.sleep(POLL)

    def dismiss(self, peers: Peers, outcome: Outcome, patience: float) -> None:
        """The job is over, which ends the other nodes once they have read it; then also what
        started them.
        """
        until = time.monotonic() + patience
        while True:
            peers.tell(outcome, over=True)  # and goes on telling, for one that has only now come
            if not self.nodes.running or time.monotonic() >= until:
                break
            time.sleep(POLL)
        self.nodes.kill()


def say(text: str) -> None:
    """On stderr; who started this may be gone, and the job goes on all the same."""
    with contextlib.suppress(OSError):
        if text:
            print(text, file=sys.stderr, flush=True)
