"""What the ranks report about themselves, and how long they may report the same.

An attempt's folder holds for each rank R, on whatever node,

    rank_R.json      its heartbeat, replaced at every change of phase and at most once per second:
                     {"rank", "pid", "host", "phase", "step", "time": Unix seconds,
                     "error": its last error or null}
    rank_R.end.json  {"code", "error": one line and then the traceback, or null, "time"}: its exit
                     report, written by `launch.jobs.worker`, as msrun and mpirun pass no exit
                     codes on
    rank_R.log       what it printed

A rank that is killed leaves no exit report: its end is seen at its process (`launch.jobs.ranks`). A
rank that hangs is recognized by a heartbeat that does not change for longer than its phase may
take; in training, for 20 of its own median steps.
"""

import json
import statistics
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.train.heartbeat import Phase

# Seconds within which a phase has to end: more than any healthy run takes.
PHASE_TIMEOUTS = {
    "starting": 1800.0,
    "compiling": 7200.0,
    "checkpoint": 1800.0,
    "sampling": 7200.0,
    "validation": 7200.0,
    "finished": 120.0,
}
HANG = 60.0  # seconds without a new step after which a rank hangs, at least
HANG_STEPS = 20  # and number of its median steps, at least
# Phases of one rank in which all others wait for it.
PAUSES = ("checkpoint", "sampling", "validation")


@dataclass(frozen=True, kw_only=True)
class HeartbeatRecord:
    """A rank's heartbeat."""

    rank: int
    pid: int
    host: str
    phase: Phase
    step: int
    time: float  # Unix seconds
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class ExitReport:
    """A rank's exit report."""

    code: int
    error: str | None
    time: float  # Unix seconds


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`; None if there is no file or no whole object in it."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def read_heartbeat(folder: Path, rank: int) -> HeartbeatRecord | None:
    content = read_json(folder / f"rank_{rank}.json")
    if content is None:
        return None

    names = HeartbeatRecord.__dataclass_fields__
    try:
        return HeartbeatRecord(**{name: value for name, value in content.items() if name in names})
    except TypeError:  # a field is missing, so that it is not a heartbeat
        return None


def read_exit_report(folder: Path, rank: int) -> ExitReport | None:
    content = read_json(folder / f"rank_{rank}.end.json")
    if not content:
        return None
    return ExitReport(code=content["code"], error=content.get("error"), time=content["time"])


@dataclass(kw_only=True)
class RankProgress:
    """How long a rank's heartbeat has not changed.

    All times are of this process's monotonic clock: the clocks of the nodes may differ.
    """

    since: float  # when phase or step last changed
    beat: HeartbeatRecord | None = None
    step_changed: float | None = None  # when the step last changed
    # Seconds of each of the last steps.
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=99))
    trained: bool = False  # whether it has begun a step

    def update(self, beat: HeartbeatRecord | None, now: float) -> None:
        """Takes the heartbeat that was read at `now`."""
        if beat is None:
            return

        previous = self.beat
        if previous is not None:
            # Not by the time in the heartbeat, which is of the rank's own clock.
            if (beat.phase, beat.step) == (previous.phase, previous.step):
                return

            if beat.step > previous.step:
                both_training = previous.phase == beat.phase == "training"
                if self.step_changed is not None and both_training:
                    # A mean: heartbeats come once per second at most, in which many steps may be
                    # made.
                    seconds = (now - self.step_changed) / (beat.step - previous.step)
                    self.step_seconds.append(seconds)
                self.step_changed = now
            elif beat.phase != previous.phase:
                self.step_changed = now  # the time of a checkpoint is not part of the next step

        self.beat = beat
        self.since = now
        # The first heartbeat in training may be replaced before it is read.
        self.trained = self.trained or beat.phase in ("training", *PAUSES)

    @property
    def phase(self) -> Phase:
        return self.beat.phase if self.beat else "starting"

    @property
    def median_step(self) -> float:
        """Seconds of its median step; 0 before the first is known."""
        return statistics.median(self.step_seconds) if self.step_seconds else 0.0

    def pausing(self, now: float) -> bool:
        """Whether it saves or samples, within the time for that: the others wait in their step."""
        return self.phase in PAUSES and now - self.since < self.limit()

    def limit(self, hang: float = HANG) -> float:
        """Seconds for which the heartbeat may stay the same."""
        if self.phase == "training":
            # In units of the rank's own steps, as a step takes milliseconds or minutes.
            return max(hang, HANG_STEPS * self.median_step)
        return PHASE_TIMEOUTS.get(self.phase, hang)
