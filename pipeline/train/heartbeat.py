"""What a rank is doing, for whoever watches the job from outside: `rank_R.json` in the folder of
the attempt's logs.

    {"rank": 1, "pid": 4711, "host": "node3", "phase": "training", "step": 1200, "time": 1730000000.0, "error": null}

The phases are starting, compiling, training, checkpoint, sampling, finished and failed. It is the
training thread that writes, at each change of phase and else once a second at most: a rank that
hangs falls silent. Only training says so often; to compile, or to wait for the others, takes as
long as it takes.
"""

import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import Literal

log = logging.getLogger("cascade")
EVERY = 1.0  # seconds

Phase = Literal["starting", "compiling", "training", "checkpoint", "sampling", "finished", "failed"]


class Heartbeat:
    """The file of `rank` in `folder`; nothing at all without one."""

    def __init__(self, folder: Path | None, rank: int) -> None:
        self.path = folder and folder / f"rank_{rank}.json"
        self.facts = {"rank": rank, "pid": os.getpid(), "host": socket.gethostname()}
        self.phase: str | None = None
        self.step, self.told = 0, 0.0

    def beat(
        self, phase: Phase, step: int | None = None, error: BaseException | None = None
    ) -> None:
        """In `phase`, after `step` steps (None: as many as before)."""
        self.step = self.step if step is None else step
        if self.path is None or (phase == self.phase and time.monotonic() - self.told < EVERY):
            return
        self.phase, self.told = phase, time.monotonic()
        said = {
            "phase": phase,
            "step": self.step,
            "time": time.time(),
            "error": error and describe(error),
        }
        side = self.path.with_name(f".tmp-{self.path.name}")
        try:  # not synced: it is worth nothing after a power cut, and must not cost the step a wait for the disk
            side.write_text(json.dumps(self.facts | said))
            side.replace(self.path)
        except OSError as problem:  # the watched must not fail for the watcher
            log.warning(
                "%s: cannot be written (%s); this rank may be taken for dead",
                self.path,
                problem.strerror,
            )
            self.path = None


def describe(error: BaseException) -> str:
    """One line: the kind of error and what it says first."""
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
