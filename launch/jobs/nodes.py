"""What the supervisors of a job's nodes exchange, through the run folder that they share.

    logs/attempt-K/node_N.json   {"beat": counts up while node N lives,
                                  "done": the exit code once all its ranks are done, else null,
                                  "outcome": null or {"code", "message"},
                                  "over": whether no attempt follows,
                                  "port": of node 0, for the rendezvous of all ranks}

Node 0 opens an attempt and the others join it. They wait for a beat that changes while they look:
the folder of a job that was killed has one that does not, and clocks differ. The first node that
fails publishes its outcome and the others end their ranks. Whether a job is over is node 0's
decision; its beat changes until the nodes that it has started have ended, so that a node that
starts only then learns it too.
"""

import contextlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.jobs.heartbeats import read_json
from launch.jobs.plan import LaunchConfig
from pipeline.files import write_atomically

STOPPED = 75  # exit code EX_TEMPFAIL of sysexits.h: the same command resumes
POLL = 0.2  # seconds between two looks at files and processes
PUBLISH_EVERY = 1.0  # seconds between two beats of a node


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an attempt ended on a node."""

    code: int  # exit code
    message: str = ""  # for the user, a few lines


def attempts(run_dir: Path) -> dict[int, Path]:
    """The folders of the attempts by number, ascending."""
    folders = {
        int(path.name.removeprefix("attempt-")): path
        for path in (run_dir / "logs").glob("attempt-*")
        if re.fullmatch(r"attempt-\d+", path.name)
    }
    return dict(sorted(folders.items()))


def open_attempt(
    config: LaunchConfig,
    run_dir: Path,
    *,
    previous: int | None,
    timeout: float,
    stopping: Callable[[], bool],
) -> int | Outcome:
    """The number of the attempt that follows `previous`, or an outcome if there is none.

    Node 0 creates its folder; the other nodes wait for it, `timeout` seconds at most.
    """
    if config.node_rank == 0:
        # Always a new folder: in an old one, old notes and heartbeats would be read as new.
        number = max(attempts(run_dir), default=-1) + 1
        (run_dir / "logs" / f"attempt-{number}").mkdir(parents=True)
        return number

    deadline = time.monotonic() + timeout
    first_beats: dict[int, Any] = {}
    while time.monotonic() < deadline and not stopping():
        number, folder = max(attempts(run_dir).items(), default=(-1, run_dir))

        note = read_json(folder / "node_0.json") or {}
        # The beat of a job that was killed stays as it was when it was first read.
        alive = "beat" in note and first_beats.setdefault(number, note["beat"]) != note["beat"]

        # An earlier job has left such a note too: it counts only if the beat changes, or if this
        # node has run the attempt.
        if note.get("over") and (alive or number == previous):
            return Outcome(**note["outcome"])
        # One that has failed already is not joined: another may follow it.
        if number != previous and alive and not note["outcome"]:
            return number
        time.sleep(POLL)

    if stopping():
        message = f"{run_dir}: stopped while waiting for node 0; the same command resumes"
        return Outcome(code=STOPPED, message=message)
    return Outcome(
        code=1,
        message=f"{run_dir}: node 0 of {config.nodes} has not started here within {timeout:g} s; "
        "start the same command there with launch.node_rank=0, and let `run` be a folder that all "
        "nodes share",
    )


class Peers:
    """The other nodes of an attempt. In a job of one node there are none and nothing is written.

    A node that publishes no new beat for `silence` seconds is taken for dead.
    """

    def __init__(self, config: LaunchConfig, folder: Path, silence: float) -> None:
        self.config = config
        self.folder = folder
        self.silence = silence
        self.others = [node for node in range(config.nodes) if node != config.node_rank]

        # Of the other nodes: their last note, and the monotonic time when its beat changed.
        self.notes: dict[int, dict[str, Any]] = {}
        self.changed: dict[int, float] = {}

        # Of this node.
        self.beat = 0
        self.published = 0.0  # monotonic time of the last note
        self.port = 0
        self.done: int | None = None  # exit code, once all ranks here are done

    def publish(self, outcome: Outcome | None = None, over: bool = False) -> None:
        """Writes this node's note: an outcome at once, else once per second."""
        due = outcome or time.monotonic() - self.published >= PUBLISH_EVERY
        if not (self.others and due):
            return

        self.beat += 1
        self.published = time.monotonic()
        note = {
            "beat": self.beat,
            "done": self.done,
            "outcome": vars(outcome) if outcome else None,
            "over": over,
            "port": self.port,
        }
        path = self.folder / f"node_{self.config.node_rank}.json"
        with contextlib.suppress(OSError):  # a full disk: the others will miss the beats
            write_atomically(path, json.dumps(note).encode())

    def read(self) -> None:
        """Reads the notes of the other nodes."""
        for node in self.others:
            note = read_json(self.folder / f"node_{node}.json")
            # By this node's clock: the clocks of nodes may differ.
            if note and note.get("beat") != self.notes.get(node, {}).get("beat"):
                self.notes[node] = note
                self.changed[node] = time.monotonic()

    def missing(self) -> list[int]:
        """The nodes that have not published anything yet."""
        return [node for node in self.others if node not in self.notes]

    def any_running(self) -> bool:
        """Whether ranks of another node still work."""
        return any(note["done"] is None and not note["outcome"] for note in self.notes.values())

    def any_stopped(self) -> bool:
        """Whether another node was stopped by a signal, which then stops all."""
        return any(
            STOPPED in (note["done"], (note["outcome"] or {}).get("code"))
            for note in self.notes.values()
        )

    def failure(self) -> Outcome | None:
        """What ends this node's ranks too: another node has failed, or publishes nothing more."""
        for node, note in self.notes.items():
            outcome = note["outcome"]
            if outcome and outcome["code"] not in (0, STOPPED):
                # The user's mistake is the same line on every node.
                prefix = "" if outcome["code"] == 2 else f"node {node}: "
                return Outcome(code=outcome["code"], message=prefix + outcome["message"])

            # A node with an outcome may have ended, and then its beat stands still.
            if not outcome and time.monotonic() - self.changed[node] > self.silence:
                return Outcome(
                    code=1,
                    message=f"node {node} of {self.config.nodes} has sent nothing for "
                    f"{self.silence:g} s: its machine or its access to {self.folder} is lost",
                )
        return None
