"""Starts a job's processes on this node and owns them to the last: whatever happens, the job ends soon, says truthfully
what happened, and leaves nothing behind.

msrun and mpirun are good at starting and poor at the rest: msrun passes no signal on, waits for its scheduler without a
limit and forgets its ranks when it is killed; both kill all other ranks as soon as one exits with a code. So they only
start the ranks. The rest is known from outside: by heartbeats (`launch.heartbeats`), by the processes themselves
(`launch.processes`), and from the other nodes (`launch.nodes`).

    all ranks are done  0
    SIGTERM, SIGINT     goes to the ranks, which save and end: 75. A second SIGINT does not wait for them: 130
    a user's mistake    that a rank found: its line, and 2
    any other failure   ends all ranks and names the first that failed: 1, or the next of `restarts` attempts
"""

import contextlib
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from launch import processes
from launch.command import MEETING, LaunchConfig, Process, find_port
from launch.heartbeats import HANG, PATIENCE, End, Failure, Pulse, first, read_beat, read_end
from launch.nodes import POLL, STOPPED, Outcome, Peers, open_attempt
from pipeline import checkpoint
from pipeline.errors import UserError
from pipeline.files import lock
from pipeline.runtime import child_environment

BACKOFF = 60.0  # seconds between two attempts, at most
QUIET = 10.0  # seconds of silence that are worth a word, when another rank has failed
DONE = (0, STOPPED)
PAUSES = ("checkpoint", "sampling")
NOISE = b"[INFO] DISTRIBUTED("  # MindSpore says these whatever GLOG_v is

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


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def supervise(
    config: LaunchConfig, run: Path, plan: Plan, remotes: Sequence[Process] = (), limits: Limits | None = None
) -> int:
    """The job on this node, from its first attempt to its last; the exit code. UserError for the user's mistakes.

    `remotes` start the other nodes. For the main thread of a process that does nothing else: it takes the signals and
    adopts all orphans.
    """
    limits, mark, signals, used, last = limits or Limits(), secrets.token_hex(8), list[int](), 0, None
    with lock(run, f".node-{config.node_rank}.lock"), handling(signals), guarded(mark) as guard:
        processes.adopt_orphans()
        (run / "logs").mkdir(exist_ok=True)
        helpers = {process.name: start(process, run / "logs", mark) for process in remotes}
        spare = [guard, *(helper.pid for helper in helpers.values())]
        while True:
            saved = progress(run)
            opened = open_attempt(config, run, last, limits.meet, lambda: bool(signals))
            if isinstance(opened, Outcome):
                return tell(opened)
            attempt = Attempt(config, run / "logs" / f"attempt-{opened}", limits, signals, helpers)
            outcome, over, grace = Outcome(code=1, what="interrupted"), True, limits.end
            try:
                outcome = attempt.run(plan, mark)
                used = 0 if progress(run) > saved else used
                may = used < config.restarts if config.node_rank == 0 else config.restarts > 0  # node 0 decides for all
                over = outcome.code != 1 or bool(signals) or not may
                attempt.peers.tell(outcome)  # the others need not wait for the end of what runs here
            except UserError as error:
                outcome = Outcome(code=2, what=str(error))
            except KeyboardInterrupt:
                grace = 0.0
                raise
            finally:
                left = processes.end(mark, grace, spare, [*spare, *attempt.children()])
                attempt.close(outcome, over)
                if over:
                    dismiss(helpers, limits.leave if grace else 0.0)
            if left:
                say(f"{run}: processes {left} cannot be ended, not even by SIGKILL: they wait for a disk or a device")
            tell(outcome)
            if over:
                if outcome.code == 1 and config.restarts and not signals:
                    say(f"{run}: given up after {used} restarts without a new checkpoint")
                return outcome.code
            pause, used, last = min(BACKOFF, limits.backoff * 2**used), used + 1, opened
            say(f"{run}: restart {used} of {config.restarts} without a new checkpoint, in {pause:g} s")
            until = time.monotonic() + pause
            while time.monotonic() < until and not signals:
                time.sleep(POLL)
            if signals:
                outcome = Outcome(code=STOPPED, what=f"{run}: stopped between attempts; the same command goes on")
                attempt.peers.tell(outcome, over=True)
                dismiss(helpers, limits.leave)
                return tell(outcome)


def tell(outcome: Outcome) -> int:
    """Says what there is to say, and is the exit code."""
    if outcome.code == 2:
        raise UserError(outcome.what)
    if outcome.what:
        say(outcome.what)
    return outcome.code


def start(process: Process, folder: Path, mark: str) -> subprocess.Popen[bytes]:
    """In a session of its own, as Ctrl-C is the supervisor's to pass on. UserError if there is no such program."""
    environment = child_environment({**process.environment, processes.NAME: mark})
    with (folder / f"{process.name}.log").open("ab") as log:
        try:
            return subprocess.Popen(
                process.argv,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(
                f"launch.launcher: {process.argv[0]} cannot be started ({error.strerror}); install it, or choose "
                "another launcher"
            ) from None


def dismiss(helpers: Mapping[str, subprocess.Popen[bytes]], patience: float) -> None:
    """Ends what started the other nodes; these end by themselves, having read that it is over."""
    until = time.monotonic() + patience
    while any(helper.poll() is None for helper in helpers.values()) and time.monotonic() < until:
        time.sleep(POLL)
    for helper in helpers.values():
        helper.kill()
        helper.wait()


def progress(run: Path) -> int:
    """The newest step that was saved whole."""
    return max(checkpoint.steps(run / "checkpoints"), default=-1)


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
    """A process, by its id, that ends all that is marked should this one be killed: then its input closes."""
    argv = [sys.executable, "-m", "launch.processes", mark]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, env=child_environment({}), start_new_session=True) as guard:
        yield guard.pid


class Tail:
    """Shows the lines that are added to a rank's log: rank 0's as they are, of the others' the warnings."""

    def __init__(self, path: Path, rank: int) -> None:
        self.path, self.rank, self.place, self.rest = path, rank, 0, b""

    def show(self, final: bool = False) -> None:
        with contextlib.suppress(OSError), self.path.open("rb") as file:
            file.seek(self.place)
            while data := file.read(2**20) or (b"\n" if final and self.rest else b""):
                self.place += len(data)
                *lines, self.rest = (self.rest + data).split(b"\n")
                for line in lines:
                    if self.rank == 0 and not line.startswith(NOISE):
                        sys.stderr.buffer.write(line + b"\n")
                    elif self.rank and line.startswith((b"warning:", b"error:")):
                        sys.stderr.buffer.write(b"[rank %d] %s\n" % (self.rank, line))
            sys.stderr.flush()

    def last(self, lines: int = 12) -> str:
        with contextlib.suppress(OSError):
            data = self.path.read_bytes()[-16384:].decode(errors="replace").rstrip()
            return "\n".join(data.replace("\r", "\n").splitlines()[-lines:])
        return ""


class Attempt:
    """What is known of one attempt's processes and ranks on this node."""

    def __init__(
        self,
        config: LaunchConfig,
        folder: Path,
        limits: Limits,
        signals: list[int],
        helpers: Mapping[str, subprocess.Popen[bytes]],
    ) -> None:
        self.config, self.folder, self.limits, self.signals, self.helpers = config, folder, limits, signals, helpers
        self.started: dict[str, subprocess.Popen[bytes]] = {}
        self.pulses = {rank: Pulse(since=time.monotonic()) for rank in config.ranks}
        self.zero = Pulse(since=time.monotonic())  # of rank 0, on whatever node: it saves and samples for all
        self.tails = {rank: Tail(folder / f"rank_{rank}.log", rank) for rank in config.ranks}
        self.ends: dict[int, End] = {}
        self.left: dict[int, float] = {}  # when that was read, by this process's clock
        self.exits: dict[int, float] = {}  # when a rank's process ended, Unix seconds
        self.statuses: dict[int, int] = {}  # and its wait status, where that could be seen
        self.poll, self.watched = select.poll(), dict[int, int]()  # descriptor of a rank's process -> the rank
        self.failures: dict[int | str, Failure] = {}
        self.gone: dict[str, float] = {}  # when a launcher was seen to have ended, by this process's clock
        self.failed = self.stopped = self.done = 0.0  # since when, by the same clock; 0 is not yet
        self.peers = Peers(config, folder, limits.node)

    # From outside.

    def run(self, plan: Plan, mark: str) -> Outcome:
        """Starts what `plan` says once all nodes are there, and returns when it is over or has to be."""
        if self.config.node_rank == 0 and self.config.launcher != "none":
            self.peers.port = find_port(self.config)
        if (outcome := self.gather()) is not None:
            return outcome
        port = self.peers.port if self.config.node_rank == 0 else self.peers.notes[0]["port"]
        for process in plan(self.folder, port):
            self.started[process.name] = start(process, self.folder, mark)
        while True:
            self.look()
            if (outcome := self.judge()) is not None:
                return outcome
            self.wait()

    def children(self) -> list[int]:
        return [process.pid for process in self.started.values()]

    def close(self, outcome: Outcome, over: bool) -> None:
        """When all processes are gone: the last of the logs, and this node's word to the others."""
        for process in self.started.values():
            process.poll()
        for descriptor in self.watched:
            os.close(descriptor)
        for tail in self.tails.values():
            tail.show(final=True)
        self.peers.tell(outcome, over)

    # Looking.

    def gather(self) -> Outcome | None:
        """Waits for the other nodes; an outcome if they do not come."""
        until = time.monotonic() + self.limits.meet
        while True:
            self.peers.tell()
            self.peers.look()
            if not (missing := self.peers.missing()):
                return self.peers.verdict()
            who = f"{'node' if len(missing) == 1 else 'nodes'} {', '.join(map(str, missing))} of {self.config.nodes}"
            if self.signals:
                return Outcome(code=STOPPED, what=f"stopped while waiting for {who}; the same command goes on")
            for name, helper in self.helpers.items():
                if helper.poll():
                    log = Tail(self.folder.parent / f"{name}.log", 0)
                    return Outcome(code=1, what=f"{name} ended ({status(helper.returncode)}): {log.last(1)}")
            if time.monotonic() > until:
                return Outcome(
                    code=1,
                    what=f"{who} not here within {self.limits.meet:g} s: start the same command there with its "
                    f"launch.node_rank; all nodes have to share {self.folder.parent.parent}",
                )
            time.sleep(POLL)

    def wait(self) -> None:
        """Until the next look is due, or a rank's process ends."""
        for descriptor, _ in self.poll.poll(POLL * 1000):
            rank = self.watched.pop(descriptor)
            self.poll.unregister(descriptor)
            os.close(descriptor)
            self.exited(rank)

    def exited(self, rank: int) -> None:
        self.exits.setdefault(rank, time.time())
        beat = self.pulses[rank].beat
        if beat and (facts := processes.stat(beat.pid)) and facts[0] == "Z":
            self.statuses[rank] = facts[3]

    def look(self) -> None:
        """Reads what there is to read."""
        now = time.monotonic()
        for rank, pulse in self.pulses.items():
            known = pulse.beat.pid if pulse.beat else None
            pulse.feel(read_beat(self.folder, rank), now)
            if pulse.beat and pulse.beat.pid != known:
                try:
                    descriptor = os.pidfd_open(pulse.beat.pid)
                except OSError:
                    self.exited(rank)
                else:
                    self.watched[descriptor] = rank
                    self.poll.register(descriptor, select.POLLIN)
            if rank not in self.ends and (end := read_end(self.folder, rank)):
                self.ends[rank], self.left[rank] = end, now
            self.tails[rank].show()
        self.zero.feel(read_beat(self.folder, 0), now)
        self.peers.tell()
        self.peers.look()
        processes.reap([*self.children(), *(helper.pid for helper in self.helpers.values())])

    # Judging.

    def judge(self) -> Outcome | None:
        """The attempt's outcome, once there is one."""
        now = time.monotonic()
        for end in self.ends.values():
            if end.code == 2:
                return Outcome(code=2, what=end.error or "a rank was given what it cannot use")
        if all(map(self.finished, self.pulses)):
            return self.leave(now)
        if not self.signals and self.peers.stopped():
            self.signals.append(signal.SIGTERM)
        if self.signals and (outcome := self.stop(now)):
            return outcome
        self.find_failures(now)
        if not self.failures:
            return self.peers.verdict()
        self.failed = self.failed or now
        if now - self.failed < self.limits.settle:
            return None
        self.find_stopped()
        failure = first(self.failures.values(), self.exits)
        if failure.silent and failure.rank is not None:  # by now its launcher may have said how it ended
            how = self.death(failure.rank)
            if how is None and now - self.failed < 3 * self.limits.settle:
                return None
            failure = replace(failure, what=how or failure.what)
        verdict = self.peers.verdict()
        if failure.silent or not self.peers.others:
            return Outcome(code=1, what=self.story(failure, now))
        if verdict is None and now - self.failed < 2 * self.limits.settle:  # it may be another node's that was first
            return None
        return Outcome(code=1, what="\n".join([*([verdict.what] if verdict else []), self.story(failure, now)]))

    def finished(self, rank: int) -> bool:
        """Whether it has done its part, to the end or to the step where all were stopped."""
        if rank in self.ends:
            return self.ends[rank].code in DONE
        beat = self.pulses[rank].beat
        return rank in self.exits and beat is not None and beat.phase == "finished"

    def leave(self, now: float) -> Outcome | None:
        """All ranks here are done: waits for those of the other nodes, and for those who started them."""
        self.done = self.done or now
        outcome = Outcome(code=max((end.code for end in self.ends.values()), default=0))
        self.peers.done = outcome.code
        if (verdict := self.peers.verdict()) or (self.peers.busy() and now - self.done < PATIENCE["finished"]):
            return verdict
        gone = len(self.exits) == len(self.pulses) and all(p.poll() is not None for p in self.started.values())
        if len(self.exits) == len(self.pulses) and time.time() - max(self.exits.values()) > self.limits.end:
            gone = True  # the scheduler may wait for a rank that had no time to say goodbye
        alone = self.config.size == 1  # nobody to meet, and so the scheduler waits for nothing
        return outcome if gone or alone or now - self.done > self.limits.leave else None

    def stop(self, now: float) -> Outcome | None:
        """After a signal the ranks save the same step and end. An outcome if they do not, or have nothing to save."""
        pulses = self.pulses.values()
        if not self.stopped:
            self.stopped = now
            alive = [pulse.beat.pid for rank, pulse in self.pulses.items() if pulse.beat and rank not in self.exits]
            processes.send(alive, signal.SIGTERM)
        if not any(pulse.trained for pulse in pulses):  # compilers do not listen, and there is nothing to lose
            return Outcome(code=STOPPED, what="stopped before the first step; the same command goes on")
        busy = [pulse for rank, pulse in self.pulses.items() if rank not in self.ends and rank not in self.exits]
        saving = [pulse.since for pulse in busy if pulse.beat and pulse.beat.phase in PAUSES]
        limit = PATIENCE["checkpoint"] if saving else max(self.limits.stop, *(4 * pulse.pace for pulse in pulses))
        if now - max([self.stopped, *saving, *self.left.values()]) <= limit:
            return None
        slow = ", ".join(str(rank) for rank in self.pulses if not self.finished(rank))
        return Outcome(
            code=1,
            what=f"told to stop, rank {slow} did not within {limit:.0f} s and was killed; the newest checkpoint is as "
            "it was, and the same command goes on from it",
        )

    def find_failures(self, now: float) -> None:
        """Notes what is wrong with ranks and with those who started them, each once."""
        # While one saves or samples, the others wait for it in their next step.
        all_known = (*self.pulses.values(), self.zero)
        waits = any(p.beat and p.beat.phase in PAUSES and now - p.since < p.limit() for p in all_known)
        for rank, pulse in self.pulses.items():
            beat, end = pulse.beat, self.ends.get(rank)
            if rank in self.failures or self.finished(rank):
                continue
            if end:
                what, _, detail = (end.error or f"exit code {end.code}").partition("\n")
                self.failures[rank] = Failure(rank=rank, time=end.time, what=what, detail=detail)
            elif beat and beat.phase == "failed":
                if rank in self.exits or now - pulse.since > self.limits.settle:  # its last word may be on its way
                    what, _, detail = (beat.error or "does not say why it failed").partition("\n")
                    self.failures[rank] = Failure(rank=rank, time=beat.time, what=what, detail=detail)
            elif rank in self.exits:
                log = self.tails[rank].last()
                self.failures[rank] = Failure(
                    rank=rank, time=self.exits[rank], what="ended without a word", detail=log, silent=True
                )
            elif not (waits and beat and beat.phase == "training") and now - pulse.since > pulse.limit(
                hang=self.limits.hang
            ):
                phase = beat.phase if beat else "starting"
                what = f"hangs: {phase}, nothing new for {now - pulse.since:.0f} s"
                when = time.time() - (now - pulse.since)
                self.failures[rank] = Failure(rank=rank, time=when, what=what, detail=self.tails[rank].last())
        for name, process in self.started.items():
            if name in self.failures or (code := process.poll()) is None:
                continue
            # Killed, it is the cause; else it ended because of a rank, of which we may have still to read.
            since = self.gone.setdefault(name, now)
            if code < 0 or now - since > self.limits.settle:
                when = time.time() - (1 if code < 0 else 0)
                log = Tail(self.folder / f"{name}.log", 0).last()
                self.failures[name] = Failure(rank=None, time=when, what=f"{name} ended ({status(code)})", detail=log)
        # msrun, having lost a rank, waits for its scheduler: all that is to be had is its log.
        if not all(pulse.beat for pulse in self.pulses.values()) and (found := self.mourned()):
            pid, code = found[0]
            if pid not in {pulse.beat.pid for pulse in self.pulses.values() if pulse.beat}:
                logs = "\n".join(self.tails[rank].last(4) for rank, pulse in self.pulses.items() if not pulse.beat)
                what = f"a rank ended before its first heartbeat ({status(code)})"
                when = time.time() - 1  # before msrun killed the others for it
                self.failures.setdefault("a rank", Failure(rank=None, time=when, what=what, detail=logs))

    def find_stopped(self) -> None:
        """A stopped process is why others give up waiting for it, and says nothing itself."""
        for rank, pulse in self.pulses.items():
            facts = processes.stat(pulse.beat.pid) if pulse.beat and rank not in self.exits else None
            if pulse.beat and facts and facts[0] in "Tt":
                what = "is stopped, by SIGSTOP or a debugger"
                self.failures[rank] = Failure(rank=rank, time=pulse.beat.time, what=what)

    def mourned(self) -> list[tuple[int, int]]:
        """(pid, exit code) of the workers that msrun's log says have failed."""
        found = re.findall(r"Worker process (\d+) exit with exception. Error code: (-?\d+)", self.log("msrun"))
        return [(int(pid), int(code)) for pid, code in found]

    def log(self, name: str) -> str:
        with contextlib.suppress(OSError):
            return (self.folder / f"{name}_{self.config.node_rank}.log").read_text(errors="replace")
        return ""

    def death(self, rank: int) -> str | None:
        """How a rank's process ended that left no word, if that is known."""
        if rank in self.statuses:
            return status(os.waitstatus_to_exitcode(self.statuses[rank]))
        if "rank_0" in self.started and (code := self.started["rank_0"].poll()) is not None:
            return status(code)
        beat = self.pulses[rank].beat
        codes = [code for pid, code in self.mourned() if beat and pid == beat.pid]
        codes += [-int(number) for number in re.findall(r"exited on signal (\d+)", self.log("mpirun"))]
        return status(codes[0]) if codes else None

    def story(self, failure: Failure, now: float) -> str:
        """A failure for people: who, where, how; what is known of it; what the others did meanwhile."""
        if failure.rank is None:
            head = failure.what
        else:
            beat = self.pulses[failure.rank].beat
            where = f" (pid {beat.pid} on {beat.host}, step {beat.step})" if beat else ""
            head = f"rank {failure.rank}{where}: {failure.what}"
        lines = [head]
        if failure.rank != 0:  # what rank 0 printed has been shown
            lines += [f"  {line}" for line in failure.detail.splitlines()[-20:]]
        for rank, pulse in self.pulses.items():
            if rank != failure.rank and rank not in self.exits and pulse.beat and now - pulse.since > QUIET:
                what = f"{pulse.beat.phase}, step {pulse.beat.step}, nothing new for {now - pulse.since:.0f} s"
                lines.append(f"meanwhile rank {rank}: {what}")
        return "\n".join([*lines, f"logs: {self.folder}"])


def status(code: int) -> str:
    """An exit code as subprocess gives it, in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
