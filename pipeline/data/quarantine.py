"""`quarantine.jsonl`: what was left out and why, one line a sample, once over all runs in the
folder and all processes of a job; and the limit beyond which a run does not go on.
"""

import json
import logging
import threading
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import write_atomically

log = logging.getLogger("cascade")
ENOUGH = 1000  # samples looked at before the share of damaged ones means something


class Quarantine:
    """The file, and this process's count of what it looked at.

    Args:
        path: of the file.
        num_samples: of the data set.
        max_damage: share of the samples looked at that may be unusable.
    """

    def __init__(self, path: Path, num_samples: int, max_damage: float) -> None:
        self.path, self.num_samples, self.max_damage = path, num_samples, max_damage
        self.lock = threading.Lock()
        self.drawn, self.bad = 0, set[tuple[str, str]]()
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a full disk cut the last line short
            write_atomically(path, whole.encode())
        self.known = self.read()

    def read(self) -> set[tuple[str, str]]:
        """Shard and key of what the file lists."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return {(entry["shard"], entry["key"]) for entry in map(json.loads, lines)}

    def look(self, number: int) -> None:
        """`number` more samples were looked at."""
        with self.lock:
            self.drawn += number

    def add(self, shard: str, key: str, reason: str) -> None:
        """A sample that training came upon. UserError if they are too many."""
        self.write(shard, key, reason)
        with self.lock:
            self.bad.add((shard, key))
            bad, seen = (
                len(self.bad),
                max(min(self.drawn, self.num_samples), min(self.num_samples, ENOUGH)),
            )
        if bad <= self.max_damage * seen:
            return
        raise UserError(
            f"data.max_damage: {bad} of about {seen} samples looked at cannot be used, more than "
            f"{self.max_damage:.1%}, the last of them {shard}:{key}, which {reason}; the others are in {self.path}; "
            "repair or remove the shards, or raise it"
        )

    def write(self, shard: str, key: str, reason: str) -> None:
        """Writes a line unless there is one."""
        with self.lock:
            if (shard, key) not in self.known:
                self.known |= self.read()  # the job's other processes write it too
            if (shard, key) in self.known:
                return
            self.known.add((shard, key))
            with self.path.open("a") as file:
                file.write(json.dumps({"shard": shard, "key": key, "reason": reason}) + "\n")
        log.warning("%s:%s is left out: %s", shard, key, reason)
