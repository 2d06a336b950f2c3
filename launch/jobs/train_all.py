"""`cascade train-all`: the stages of a cascade as the independent jobs that they are, one after the
other or several at once.

Each job is `cascade train CONFIG`, with its own launcher and its own restarts. A stage that fails
does not stop the others, and one that is finished ends at once. The same command resumes what is
not finished.
"""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from launch.jobs.nodes import STOPPED
from launch.jobs.plan import train_command
from launch.jobs.status import duration, status
from pipeline.config import apply_overrides, build, read_yaml
from pipeline.errors import UserError

POLL = 0.2  # seconds between two looks at the jobs
OUTPUT_TIMEOUT = 5.0  # seconds for the last lines of a job that has ended
EXIT_STATES = {0: "finished", 2: "refused", STOPPED: "stopped, resumable"}


@dataclass(kw_only=True)
class StageJob:
    """A stage's job, before, while and after it runs."""

    name: str
    argv: list[str]
    run_dir: Path
    process: "subprocess.Popen[str] | None" = None  # once it is started
    reader: threading.Thread | None = None  # copies its output
    exit_code: int | None = None  # once it has ended
    last_line: str = ""  # of its output: why it failed or was refused

    @property
    def running(self) -> bool:
        return self.process is not None and self.exit_code is None


def plan_jobs(path: str, overrides: Sequence[str]) -> list[StageJob]:
    """The jobs of a cascade's file in the order of its stages.

    UserError if two stages have the same run folder.
    """
    from pipeline.generate.cascade_folder import CascadeConfig

    jobs = []
    for entry in build(CascadeConfig, read_yaml(path)).stages:
        # From plain values: to build the configuration takes the stage's class, which imports
        # MindSpore.
        run_dir = Path(str(apply_overrides(read_yaml(entry.config), overrides).get("run")))
        argv = train_command(entry.config, overrides)
        jobs.append(StageJob(name=entry.name, argv=argv, run_dir=run_dir))

    # Each job locks its run folder, and refuses one that has another stage's configuration.
    run_dirs = [job.run_dir for job in jobs]
    for job in jobs:
        if run_dirs.count(job.run_dir) > 1:
            raise UserError(
                f"{path}: {job.name} and another stage have the run folder {job.run_dir}; give "
                "each its own"
            )
    return jobs


def train_all(jobs: Sequence[StageJob], at_once: int) -> int:
    """Runs the jobs, `at_once` at a time, and prints where each is; the exit code of all.

    0: all finished. 1: one failed. 2: one was refused. 75: stopped by a signal.
    """
    signals: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        for job in jobs:
            if job.process and job.process.poll() is None:
                job.process.send_signal(number)

    previous = {
        number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)
    }
    started = time.monotonic()
    try:
        run_jobs(jobs, at_once, signals)
    finally:
        for job in jobs:
            # No job outlives this command, even if it fails.
            close(job)
        for number, handler in previous.items():
            signal.signal(number, handler)

    print(summary(jobs, time.monotonic() - started), file=sys.stderr)
    if signals:
        return STOPPED

    # From here on each job has ended by itself.
    exit_codes = {job.exit_code for job in jobs}
    if exit_codes == {0}:
        return 0
    return 2 if exit_codes <= {0, 2} else 1


def run_jobs(jobs: Sequence[StageJob], at_once: int, signals: Sequence[int]) -> None:
    """Starts the jobs in turn and returns when all have ended; after a signal starts no more."""
    waiting = list(jobs)
    while True:
        for job in jobs:
            if job.process and job.running:
                job.exit_code = job.process.poll()
        num_running = sum(job.running for job in jobs)

        if signals:
            waiting.clear()
        elif waiting and num_running < at_once:
            # One only, and then the jobs that run are counted anew.
            start(waiting.pop(0), prefixed=at_once > 1)
            continue

        if not waiting and not num_running:
            return
        time.sleep(POLL)


def start(job: StageJob, prefixed: bool) -> None:
    """Starts a job and copies its output to stderr, each line after the stage's name if `prefixed`.

    It has a session of its own, so that Ctrl-C reaches it once, from `train_all`.
    """
    # Assigned at once: a signal may come at any moment and has to reach it.
    job.process = process = subprocess.Popen(
        job.argv,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    prefix = f"[{job.name}] " if prefixed else ""

    def copy() -> None:
        assert process.stdout
        with process.stdout as lines:
            for line in lines:
                job.last_line = line.strip() or job.last_line
                print(f"{prefix}{line}", end="", file=sys.stderr, flush=True)

    job.reader = threading.Thread(target=copy, daemon=True)
    job.reader.start()


def close(job: StageJob) -> None:
    """Ends a job that still runs, and waits for its output."""
    if job.process and job.process.poll() is None:
        job.process.kill()
        job.process.wait()

    # The output stays open longer only if a process that the job left behind holds it.
    if job.reader:
        job.reader.join(OUTPUT_TIMEOUT)


def summary(jobs: Sequence[StageJob], seconds: float) -> str:
    """Where each stage is, one line each."""
    lines = [f"after {duration(seconds)}:"]
    for job in jobs:
        code = job.exit_code
        state = "not begun"
        if code is not None:
            state = EXIT_STATES.get(code, f"failed (exit code {code})")

        where = "no run folder"
        # A job that was refused has not made its run folder.
        if (job.run_dir / "config.yaml").exists():
            report = status(job.run_dir)
            where = f"step {report['step']:,} of {report['steps']:,}"

        failed = code not in (0, STOPPED, None)
        reason = f": {job.last_line}" if failed and job.last_line else ""
        lines.append(f"  {job.name:<10} {state:<18} {where}, {job.run_dir}{reason}")

    return "\n".join(lines)
