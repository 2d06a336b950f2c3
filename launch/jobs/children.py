"""The processes that a node starts itself: the launcher of its ranks, and on node 0 what starts the
other nodes.
"""

import subprocess
import time
from pathlib import Path

from launch.jobs import processes
from launch.jobs.plan import Process
from pipeline.errors import UserError
from pipeline.runtime import child_environment


class Children:
    """Processes by name, marked as the job's, which `option` asks for; each has NAME.log in
    `folder`.
    """

    def __init__(self, folder: Path, mark: str, option: str) -> None:
        self.folder, self.mark, self.option = folder, mark, option
        self.started: dict[str, subprocess.Popen[bytes]] = {}
        self.seen: dict[str, float] = {}  # when one was seen to have ended, by this process's clock

    def start(self, process: Process) -> None:
        """In a session of its own, as Ctrl-C is the supervisor's to pass on. UserError if there is
        no such program.
        """
        environment = child_environment({**process.environment, processes.NAME: self.mark})
        with self.log(process.name).open("ab") as log:
            try:
                self.started[process.name] = subprocess.Popen(
                    process.argv,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise UserError(
                    f"{self.option}: {process.argv[0]} cannot be started ({error.strerror}); install it, or give "
                    "another value"
                ) from None

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.started.values()]

    @property
    def codes(self) -> dict[str, int]:
        """The exit codes of those that have ended, as subprocess gives them."""
        polled = {name: process.poll() for name, process in self.started.items()}
        ended = {name: code for name, code in polled.items() if code is not None}
        for name in ended:
            self.seen.setdefault(name, time.monotonic())
        return ended

    @property
    def running(self) -> bool:
        return len(self.codes) < len(self.started)

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    @property
    def said(self) -> str:
        """All that they have printed."""
        return "".join(self.log(name).read_text(errors="replace") for name in self.started)

    def kill(self) -> None:
        for process in self.started.values():
            process.kill()
            process.wait()
