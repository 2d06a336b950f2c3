"""`cascade train-all`: the stages of a cascade as the independent jobs that they are, in turn or
several at once.

Each job is `cascade train CONFIG`, with its own launcher and its own restarts; a stage that fails
does not stop the others, and one that is finished ends at once. The same command again goes on with
what is left.
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
from typing import Any

from launch.jobs.plan import command
from launch.jobs.status import duration, status
from pipeline.config import apply_overrides, build, read_yaml
from pipeline.errors import UserError

POLL = 0.2  # seconds between looks at the jobs
GRACE = 5.0  # seconds for the last lines of a job that has ended
OUTCOMES = {0: "finished", 2: "refused", 75: "stopped, resumable"}


@dataclass
class Job:
    """A stage's job, before, while and after it runs."""

    name: str
    argv: list[str]
    run: Path
    process: subprocess.Popen[str] | None = None
    reader: threading.Thread | None = None
    code: int | None = None
    last: str = ""  # line that it said: why it was refused


def plan(path: str, overrides: Sequence[str]) -> list[Job]:
    """The jobs of a cascade's file in the order of its stages. UserError if two have one run
    folder.
    """
    from pipeline.generate.cascade_folder import CascadeConfig

    jobs = []
    for entry in build(CascadeConfig, read_yaml(path)).stages:
        run = apply_overrides(read_yaml(entry.config), overrides).get("run")
        jobs.append(Job(entry.name, command(entry.config, overrides), Path(str(run))))
    runs = [job.run for job in jobs]
    for job in jobs:
        if runs.count(job.run) > 1:
            raise UserError(
                f"{path}: {job.name} and another stage have the run folder {job.run}; give each its own"
            )
    return jobs


def train_all(jobs: Sequence[Job], at_once: int) -> int:
    """Runs the jobs, `at_once` at a time, and prints where each is; the exit code of all.

    0: all finished. 1: one failed. 2: one was refused. 75: stopped by a signal.
    """
    stopped: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        for job in jobs:
            if job.process and job.process.poll() is None:
                job.process.send_signal(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    started = time.monotonic()
    try:
        waiting = list(jobs)
        while True:
            running = [job for job in jobs if job.process and job.code is None]
            for job in running:
                assert job.process
                job.code = job.process.poll()
            if stopped:
                waiting.clear()
            elif waiting and sum(job.code is None for job in running) < at_once:
                start(waiting.pop(0), alone=at_once == 1)
                continue
            if not waiting and all(job.code is not None for job in running):
                break
            time.sleep(POLL)
    finally:
        for job in jobs:
            if job.process and job.process.poll() is None:
                job.process.kill()
                job.process.wait()
            if job.reader:
                job.reader.join(
                    GRACE
                )  # longer only if something that it left behind holds its output open
        for number, handler in before.items():
            signal.signal(number, handler)
    print(summary(jobs, time.monotonic() - started), file=sys.stderr)
    codes = {job.code for job in jobs}
    return 75 if stopped else 0 if codes == {0} else 2 if codes <= {0, 2} else 1


def start(job: Job, alone: bool) -> None:
    """Starts a job in a session of its own: what Ctrl-C sends, it gets once, from here. What
    several say at once is marked with the stage's name.
    """
    job.process = subprocess.Popen(
        job.argv,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )

    def copy() -> None:
        assert job.process
        assert job.process.stdout
        with job.process.stdout as lines:
            for line in lines:
                job.last = line.strip() or job.last
                print(
                    line if alone else f"[{job.name}] {line}", end="", file=sys.stderr, flush=True
                )

    job.reader = threading.Thread(target=copy, daemon=True)
    job.reader.start()


def summary(jobs: Sequence[Job], seconds: float) -> str:
    """Where each stage is."""
    lines = [f"after {duration(seconds)}:"]
    for job in jobs:
        outcome = (
            "not begun"
            if job.code is None
            else OUTCOMES.get(job.code, f"failed (exit code {job.code})")
        )
        found: dict[str, Any] = status(job.run) if (job.run / "config.yaml").exists() else {}
        where = f"step {found['step']:,} of {found['steps']:,}" if found else "no run folder"
        why = f": {job.last}" if job.last and job.code not in (0, 75, None) else ""
        lines.append(f"  {job.name:<10} {outcome:<18} {where}, {job.run}{why}")
    return "\n".join(lines)
