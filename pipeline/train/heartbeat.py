"""Heartbeats: what a rank is doing, for the supervisor that watches the job from outside.

Each rank writes `rank_R.json` in the folder of the attempt's logs:

    {"rank": 1, "pid": 4711, "host": "node3",
     "phase": "training", "step": 1200, "time": 1730000000.0, "error": null}

The training thread itself writes the file, at each change of phase and otherwise at most once per
second, so the file of a rank that hangs grows old. Only the phase `training` is refreshed that
often: compiling, or waiting for other ranks, has no time limit.
"""

import json
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

log = logging.getLogger("cascade")

INTERVAL = 1.0  # seconds between two writes within a phase

Phase = Literal[
    "starting",
    "compiling",
    "training",
    "checkpoint",
    "sampling",
    "validation",
    "finished",
    "failed",
]


class Heartbeat:
    """Writes the heartbeats of one rank.

    Args:
        folder: of the attempt's logs; without one, nothing is written.
        rank: of this process.
        clock: seconds from any origin, monotonic.
    """

    def __init__(
        self, folder: Path | None, rank: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.path = folder and folder / f"rank_{rank}.json"
        self.process = {"rank": rank, "pid": os.getpid(), "host": socket.gethostname()}
        self.clock = clock
        self.phase: str | None = None
        self.step = 0
        self.last_write = 0.0

    def beat(
        self, phase: Phase, step: int | None = None, error: BaseException | None = None
    ) -> None:
        """Reports `phase` after `step` steps (None: as many as in the last call)."""
        if step is not None:
            self.step = step
        if self.path is None:
            return

        # A change of phase is written at once: how long a rank may be silent depends on the phase.
        if phase == self.phase and self.clock() - self.last_write < INTERVAL:
            return

        self.phase = phase
        self.last_write = self.clock()
        record = {
            **self.process,
            "phase": phase,
            "step": self.step,
            "time": time.time(),
            "error": error and describe(error),
        }

        # Renamed but not synced: after a power cut the file is useless, and a step must not wait
        # for the disk. A failure to write must not end the training.
        temporary = self.path.with_name(f".tmp-{self.path.name}")
        try:
            temporary.write_text(json.dumps(record))
            temporary.replace(self.path)
        except OSError as problem:
            log.warning(
                "%s: cannot be written (%s); the supervisor may take this rank for dead",
                self.path,
                problem.strerror,
            )
            self.path = None


def describe(error: BaseException) -> str:
    """One line: the type of the error and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
