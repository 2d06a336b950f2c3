"""What the supervisors of a job's nodes tell one another, through the run folder that they share.

    logs/attempt-K/node_N.json   {"beat": counts while node N lives, "done": the exit code once its ranks are, else
                                 null, "outcome": null or {"code", "what"}, "over",
                                 "port": of node 0, where all ranks meet}

Node 0 opens an attempt and the others join it: they wait for a beat that changes under their eyes,
as a folder left by a killed job has one that stands still, and clocks differ. The first node that
fails says so here and the others end their ranks. `over` says that no attempt follows; the decision
is node 0's, whose beat changes until the nodes that it has started are gone, so that one that comes
only then does not wait for it.
"""

import contextlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.jobs.heartbeats import read
from launch.jobs.plan import LaunchConfig
from pipeline.files import write_atomically

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on
POLL = 0.2  # seconds between looks


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an attempt ended on a node: the exit code, and what there is to say, in a few lines."""

    code: int
    what: str = ""


def attempts(run: Path) -> dict[int, Path]:
    """The attempts' folders by number, ascending."""
    folders = [
        path for path in (run / "logs").glob("attempt-*") if re.fullmatch(r"attempt-\d+", path.name)
    ]
    return dict(sorted((int(path.name.removeprefix("attempt-")), path) for path in folders))


def open_attempt(
    config: LaunchConfig, run: Path, last: int | None, meet: float, stopping: Callable[[], bool]
) -> int | Outcome:
    """The number of the attempt after `last`, made by node 0 and found by the others; or why there
    is none.
    """
    if config.node_rank == 0:
        number = max(attempts(run), default=-1) + 1
        (run / "logs" / f"attempt-{number}").mkdir(parents=True)
        return number
    until, seen = time.monotonic() + meet, dict[int, Any]()
    while time.monotonic() < until and not stopping():
        number, folder = max(attempts(run).items(), default=(-1, run))
        note = read(folder / "node_0.json") or {}
        lives = "beat" in note and seen.setdefault(number, note["beat"]) != note["beat"]
        if note.get("over") and (lives or number == last):
            return Outcome(**note["outcome"])
        if number != last and lives and not note["outcome"]:
            return number
        time.sleep(POLL)
    if stopping():
        return Outcome(
            code=STOPPED, what=f"{run}: stopped while waiting for node 0; the same command goes on"
        )
    return Outcome(
        code=1,
        what=f"{run}: node 0 of {config.nodes} has not started here within {meet:g} s; start the same command there "
        "with launch.node_rank=0, and let `run` be a folder that all nodes share",
    )


class Peers:
    """The other nodes of an attempt; none if there is one node only, and then nothing is written."""

    def __init__(self, config: LaunchConfig, folder: Path, silence: float) -> None:
        self.config, self.folder, self.silence = config, folder, silence
        self.others = [node for node in range(config.nodes) if node != config.node_rank]
        self.notes: dict[int, dict[str, Any]] = {}
        self.changed: dict[int, float] = {}  # when a node's beat last did, by our clock
        self.count, self.told = 0, 0.0
        self.port = 0
        self.done: int | None = None  # what the exit code will be, now that all ranks here are done

    def tell(self, outcome: Outcome | None = None, over: bool = False) -> None:
        """This node's note: once a second while there is no outcome."""
        if self.others and (outcome or time.monotonic() - self.told >= 1):
            self.count, self.told = self.count + 1, time.monotonic()
            note = {"beat": self.count, "done": self.done, "outcome": vars(outcome) if outcome else None,
                    "over": over, "port": self.port}  # fmt: skip
            with contextlib.suppress(OSError):  # a full disk: the others will miss the beats
                write_atomically(
                    self.folder / f"node_{self.config.node_rank}.json", json.dumps(note).encode()
                )

    def look(self) -> None:
        for node in self.others:
            note = read(self.folder / f"node_{node}.json")
            if note and note.get("beat") != self.notes.get(node, {}).get("beat"):
                self.notes[node], self.changed[node] = note, time.monotonic()

    def missing(self) -> list[int]:
        """Those that have not come yet."""
        return [node for node in self.others if node not in self.notes]

    def busy(self) -> bool:
        """Whether the ranks of one of them are still at work."""
        return any(note["done"] is None and not note["outcome"] for note in self.notes.values())

    def stopped(self) -> bool:
        """Whether one of them has been stopped by a signal: then all are."""
        return any(
            STOPPED in (note["done"], (note["outcome"] or {}).get("code"))
            for note in self.notes.values()
        )

    def verdict(self) -> Outcome | None:
        """What ends this node's ranks too: another node has failed, or says nothing any more."""
        for node in self.notes:
            outcome = self.notes[node]["outcome"]
            if outcome and outcome["code"] not in (0, STOPPED):
                text = (
                    outcome["what"] if outcome["code"] == 2 else f"node {node}: {outcome['what']}"
                )
                return Outcome(code=outcome["code"], what=text)
            if not outcome and time.monotonic() - self.changed[node] > self.silence:
                return Outcome(
                    code=1,
                    what=f"node {node} of {self.config.nodes} has said nothing for {self.silence:g} s: its machine or "
                    f"its way to {self.folder} is gone",
                )
        return None
