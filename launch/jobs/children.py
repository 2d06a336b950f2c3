"""The processes that a supervisor starts itself: the launcher of its ranks, and on node 0 the ssh
connections to the other nodes.
"""

import subprocess
import time
from pathlib import Path

from launch.jobs.plan import Process
from launch.jobs.processes import JOB_VARIABLE
from pipeline.errors import UserError
from pipeline.runtime import child_environment


class Children:
    """Processes by name, started with the job's id; each has NAME.log in `folder`.

    `option` is the configuration key that asks for them, which errors name.
    """

    def __init__(self, folder: Path, job_id: str, option: str) -> None:
        self.folder = folder
        self.job_id = job_id
        self.option = option
        self.started: dict[str, subprocess.Popen[bytes]] = {}
        # Monotonic time at which the end of a process was noticed.
        self.ended_at: dict[str, float] = {}

    def start(self, process: Process) -> None:
        """Starts the process in a session of its own: the supervisor passes Ctrl-C on.

        UserError if the program is not installed.
        """
        environment = child_environment({**process.environment, JOB_VARIABLE: self.job_id})

        # The process has a copy of the descriptor, so that it is closed here at once.
        with self.log(process.name).open("ab") as log:
            try:
                self.started[process.name] = subprocess.Popen(
                    process.argv,
                    env=environment,
                    # A program that asks for input fails instead of waiting for it.
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise UserError(
                    f"{self.option}: {process.argv[0]} cannot be started ({error.strerror}); "
                    "install it, or give another value"
                ) from None

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.started.values()]

    def exit_codes(self) -> dict[str, int]:
        """The exit codes of those that have ended, as subprocess gives them."""
        polled = {name: process.poll() for name, process in self.started.items()}
        codes = {name: code for name, code in polled.items() if code is not None}

        # The first call that sees the end sets its time: `report_wait` is counted from there.
        for name in codes:
            self.ended_at.setdefault(name, time.monotonic())
        return codes

    def running(self) -> bool:
        return len(self.exit_codes()) < len(self.started)

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def output(self) -> str:
        """All that they have printed."""
        return "".join(self.log(name).read_text(errors="replace") for name in self.started)

    def kill(self) -> None:
        for process in self.started.values():
            process.kill()
            process.wait()
