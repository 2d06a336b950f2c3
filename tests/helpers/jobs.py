"""Jobs of real processes: how a test starts them, waits for them, and sees that none outlives it."""

import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.jobs import processes
from launch.jobs.heartbeats import read_beat
from pipeline.runtime import process_environment

ROOT = Path(__file__).parents[2]
WAIT = (
    240.0  # seconds for what takes a few, or thirty under a real launcher: the machine may be busy
)
QUICK = {
    "hang": 4.0,
    "settle": 1.0,
    "stop": 3.0,
    "end": 1.0,
    "backoff": 0.2,
    "meet": 60.0,
}  # a supervisor's limits
TWO = {"nodes": 2, "master": "10.0.0.1", "node": 4.0}  # nodes

Process = subprocess.Popen[str]


def left(folder: Path) -> list[int]:
    """The processes that know this folder, by their arguments or their environment."""
    found = []
    for pid in [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if (
            str(folder) in words or any(str(folder) in word for word in process_environment(pid))
        ) and processes.alive(pid):
            found.append(pid)
    return found


def until(true: Callable[[], object], what: str, seconds: float = WAIT) -> None:
    """Returns when it holds; fails, and says `what` was waited for, when it does not in time."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def until_step(
    number: int, attempt: Path, ranks: Iterable[int], started: Sequence[Process]
) -> None:
    """Returns when each of `ranks` says that it is at step `number`; fails when one of `started`
    ends before.
    """

    def there(rank: int) -> bool:
        beat = read_beat(attempt, rank)
        return beat is not None and beat.step >= number

    def all_there() -> bool:
        ended = [process for process in started if process.poll() is not None]
        assert not ended, [process.communicate()[1] for process in ended]
        return all(there(rank) for rank in ranks)

    until(all_there, f"step {number} of ranks {ranks}")


@contextmanager
def leaving_nothing(folder: Path) -> Iterator[Callable[..., Process]]:
    """Yields what starts a program, with Popen's options, in the project's folder and with pipes
    for what it says.

    At the end all that were started must have ended, and within WAIT nothing may be left that knows
    `folder`. Whatever happens, none is left afterwards; what they said is printed, for pytest to
    show with a failure.
    """
    started: list[Process] = []

    def start(argv: Sequence[str], **options: Any) -> Process:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(argv, text=True, **{"cwd": ROOT, **pipes, **options}))
        return started[-1]

    try:
        yield start
        assert all(process.poll() is not None for process in started), "a process has not ended"
        until(lambda: not left(folder), "a process was left behind")
    finally:
        for process in started:
            process.kill()
        processes.send(left(folder), signal.SIGKILL)
        for process in started:
            print(*process.communicate(timeout=WAIT), sep="\n")


@dataclass
class Running:
    """A supervisor at work."""

    run: Path
    process: Process

    @property
    def attempt(self) -> Path:
        return self.run / "logs" / "attempt-0"

    def steps(self, number: int, rank: int = 0) -> None:
        """Waits until `rank` is at step `number`."""
        until_step(number, self.attempt, [rank], [self.process])

    def end(self) -> tuple[int, str]:
        """The exit code, and what it said on stderr but for the ranks' steps."""
        out, err = self.process.communicate(timeout=WAIT)
        assert out == ""
        return self.process.returncode, "".join(
            line for line in err.splitlines(True) if " step " not in line[:20]
        )
