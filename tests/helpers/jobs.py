"""Jobs of real processes: how a test starts them, waits for them, and checks that none is left."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.jobs import processes
from launch.jobs.heartbeats import HeartbeatRecord, read_heartbeat
from pipeline.runtime import process_environment

ROOT = Path(__file__).parents[2]

# Seconds for what takes a few, or thirty under a real launcher: the machine may be busy.
WAIT = 240.0
# Timeouts of a supervisor, in seconds.
QUICK = {
    "hang": 4.0,
    "report_wait": 1.0,
    "stop": 3.0,
    "kill": 1.0,
    "guard": 1.0,
    "backoff": 0.2,
    "rendezvous": 60.0,
}
# Options of a supervisor in a job of two nodes.
TWO_NODES: dict[str, Any] = {"nodes": 2, "master": "10.0.0.1", "node": 4.0}

Process = subprocess.Popen[str]


def remaining_processes(folder: Path) -> list[int]:
    """The living processes with this folder in their arguments or their environment."""
    pids = []
    for pid in [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]:
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue

        words = [arguments, *process_environment(pid)]
        if any(str(folder) in word for word in words) and processes.alive(pid):
            pids.append(pid)
    return pids


def until(condition: Callable[[], object], expected: str, seconds: float = WAIT) -> None:
    """Returns once the condition holds; fails with `expected` if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, expected
        time.sleep(0.01)


def until_step(step: int, attempt: Path, ranks: Iterable[int], started: Sequence[Process]) -> None:
    """Returns once each of `ranks` reports `step`; fails if one of `started` ends before."""

    def reached(rank: int) -> bool:
        beat = read_heartbeat(attempt, rank)
        return beat is not None and beat.step >= step

    def all_reached() -> bool:
        ended = [process for process in started if process.poll() is not None]
        assert not ended, [process.communicate()[1] for process in ended]
        return all(reached(rank) for rank in ranks)

    until(all_reached, f"step {step} of ranks {ranks}")


def beat_of(attempt: Path, rank: int) -> HeartbeatRecord:
    """The last heartbeat of a rank, which must exist."""
    beat = read_heartbeat(attempt, rank)
    assert beat is not None
    return beat


@contextmanager
def leaving_nothing(folder: Path) -> Iterator[Callable[..., Process]]:
    """Yields a function that starts a program in the project's folder, with Popen's options.

    At the end all that were started must have ended, and within WAIT no process with `folder` in
    its arguments or environment may be left. Whatever happens, none is left afterwards; the outputs
    are printed, so that pytest shows them with a failure.
    """
    started: list[Process] = []

    def start(argv: Sequence[str], **options: Any) -> Process:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(argv, text=True, **{"cwd": ROOT, **pipes, **options}))
        return started[-1]

    try:
        yield start
        assert all(process.poll() is not None for process in started), "a process has not ended"
        until(lambda: not remaining_processes(folder), "no process is left")
    finally:
        for process in started:
            process.kill()
        processes.send_signal(remaining_processes(folder), signal.SIGKILL)
        for process in started:
            print(*process.communicate(timeout=WAIT), sep="\n")


def supervisor_argv(run: Path, *faults: str, **options: object) -> list[str]:
    """A supervisor of the run folder `run` over `tests.helpers.fake_ranks` with these faults."""
    options_json = json.dumps(QUICK | options)
    return [sys.executable, "-m", "tests.helpers.supervised", str(run), options_json, *faults]


@dataclass
class Running:
    """A supervisor that a test has started."""

    run: Path
    process: Process

    @property
    def attempt(self) -> Path:
        return self.run / "logs" / "attempt-0"

    def steps(self, number: int, rank: int = 0) -> None:
        """Waits until `rank` reports step `number`."""
        until_step(number, self.attempt, [rank], [self.process])

    def end(self) -> tuple[int, str]:
        """The exit code, and stderr without the step lines of rank 0."""
        out, err = self.process.communicate(timeout=WAIT)
        assert out == ""
        lines = [line for line in err.splitlines(True) if " step " not in line[:20]]
        return self.process.returncode, "".join(lines)


# The `supervise` fixture: starts a supervisor with faults of ranks and options.
Supervise = Callable[..., Running]
