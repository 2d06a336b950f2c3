"""`quarantine.jsonl`: the samples that were left out, and the limit beyond which a run stops.

One line for each sample, over all runs in the folder and all processes of a job.
"""

import json
import logging
import threading
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import write_atomically

log = logging.getLogger("cascade")

MIN_DRAWN = 1000  # samples: the fraction of damaged ones is of at least as many


class Quarantine:
    """The file, and this process's counts of drawn and of unusable samples.

    Args:
        path: of the file.
        num_samples: of the data set.
        max_damage: fraction of the drawn samples that may be unusable.
    """

    def __init__(self, path: Path, num_samples: int, max_damage: float) -> None:
        self.path = path
        self.num_samples = num_samples
        self.max_damage = max_damage
        self.num_drawn = 0
        self.unusable = set[tuple[str, str]]()  # (shard, key), of this process
        self._lock = threading.Lock()

        # A full disk may have cut the last line short.
        text = path.read_text() if path.exists() else ""
        complete_lines = text[: text.rfind("\n") + 1]
        if complete_lines != text:
            write_atomically(path, complete_lines.encode())
        self.listed = self.read()

    def read(self) -> set[tuple[str, str]]:
        """(shard, key) of all lines of the file."""
        # Absent until the first sample is left out.
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return {(entry["shard"], entry["key"]) for entry in map(json.loads, lines)}

    def count_drawn(self, num_samples: int) -> None:
        """Counts samples that were drawn, usable or not."""
        with self._lock:
            self.num_drawn += num_samples

    def add(self, shard: str, key: str, reason: str) -> None:
        """Records a sample that proved unusable in training. UserError if there are too many."""
        self.write((shard, key, reason))
        with self._lock:
            self.unusable.add((shard, key))
            num_unusable = len(self.unusable)
            # A small data set is drawn many times, and early in a run a fraction means little.
            num_drawn = min(self.num_samples, max(self.num_drawn, MIN_DRAWN))

        if num_unusable > self.max_damage * num_drawn:
            raise UserError(
                f"data.max_damage: {num_unusable} of about {num_drawn} drawn samples are unusable, "
                f"more than {self.max_damage:.1%}; the last: {shard}:{key}, {reason}; the others "
                f"are listed in {self.path}; repair or remove the shards, or raise it"
            )

    def write(self, *samples: tuple[str, str, str]) -> None:
        """Writes a line for each (shard, key, reason) whose sample has none."""
        with self._lock:
            # The job's other processes write to the file too. Read once, however many samples.
            if any((shard, key) not in self.listed for shard, key, _ in samples):
                self.listed |= self.read()

            lines = []
            for shard, key, reason in samples:
                if (shard, key) in self.listed:
                    continue
                self.listed.add((shard, key))
                lines.append(json.dumps({"shard": shard, "key": key, "reason": reason}) + "\n")
                log.warning("%s:%s is left out: %s", shard, key, reason)

            # Not even created where nothing is left out.
            if lines:
                with self.path.open("a") as file:
                    file.writelines(lines)
