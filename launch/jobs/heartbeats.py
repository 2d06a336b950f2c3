"""What the ranks write about themselves, and for how long they may write the same.

An attempt's folder has, of each rank R on whatever node,

    rank_R.json      its heartbeat, replaced at every change of phase and at most once a second:
                     {"rank", "pid", "host", "phase", "step", "time": Unix seconds, "error": its
                     last traceback or null}
    rank_R.end.json  {"code", "error": one line and then the traceback, or null, "time"}: its last word, written by
                     `launch.jobs.worker` before it exits, as msrun and mpirun do not pass exit codes on.
    rank_R.log       what it printed

A rank that was killed leaves no word: it is known by its process (`launch.jobs.ranks`). One that
hangs, by a heartbeat that says the same for longer than its phase may take: in training, 20 of its
own median steps.
"""

import json
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.train.heartbeat import Phase

# Seconds in which a phase has to come to an end, or its step to change: what no sane run exceeds.
PATIENCE = {
    "starting": 1800.0,
    "compiling": 7200.0,
    "checkpoint": 1800.0,
    "sampling": 7200.0,
    "finished": 120.0,
}
HANG = 60.0  # seconds without a new step, and at least
MEDIANS = 20  # times the median step
PAUSES = ("checkpoint", "sampling")  # in which all others wait for the one


@dataclass(frozen=True, kw_only=True)
class Beat:
    """A rank's heartbeat."""

    rank: int
    pid: int
    host: str
    phase: Phase
    step: int
    time: float
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class End:
    """A rank's last word."""

    code: int
    error: str | None
    time: float


def read(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`; None if there is none, or not a whole one."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def read_beat(folder: Path, rank: int) -> Beat | None:
    found = read(folder / f"rank_{rank}.json")
    names = Beat.__dataclass_fields__
    try:
        return (
            Beat(**{name: value for name, value in found.items() if name in names})
            if found
            else None
        )
    except TypeError:  # a field is missing: not ours
        return None


def read_end(folder: Path, rank: int) -> End | None:
    found = read(folder / f"rank_{rank}.end.json")
    return End(code=found["code"], error=found.get("error"), time=found["time"]) if found else None


@dataclass(kw_only=True)
class Pulse:
    """How long a rank has been saying the same, by the reader's clock: those of the nodes may
    differ.
    """

    since: float  # when what it says last changed
    beat: Beat | None = None
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=99))  # of its last steps
    stepped: float | None = None  # when its step last changed
    trained: bool = False  # whether it has begun a step

    def feel(self, beat: Beat | None, now: float) -> None:
        """Takes what was read at `now`."""
        if beat is None or (
            self.beat and (beat.phase, beat.step) == (self.beat.phase, self.beat.step)
        ):
            return
        if self.beat and beat.step > self.beat.step:
            if self.stepped is not None and self.beat.phase == beat.phase == "training":
                self.seconds.append((now - self.stepped) / (beat.step - self.beat.step))
            self.stepped = now
        elif self.beat and beat.phase != self.beat.phase:
            self.stepped = now  # a checkpoint's time is not the next step's
        self.beat, self.since = beat, now
        self.trained = self.trained or beat.phase in ("training", "checkpoint", "sampling")

    @property
    def phase(self) -> Phase:
        return self.beat.phase if self.beat else "starting"

    def pausing(self, now: float) -> bool:
        """Whether it saves or samples, as long as that may take: the others wait for it in their
        next step.
        """
        return self.phase in PAUSES and now - self.since < self.limit()

    @property
    def pace(self) -> float:
        """Its median step, in seconds; 0 as long as there is none."""
        return statistics.median(self.seconds) if self.seconds else 0.0

    def limit(self, patience: Mapping[str, float] = PATIENCE, hang: float = HANG) -> float:
        """Seconds for which it may say the same."""
        if self.phase == "training":
            return max(hang, MEDIANS * self.pace)
        return patience.get(self.phase, hang)
