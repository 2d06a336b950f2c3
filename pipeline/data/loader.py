"""Batches by step: sample numbers, bytes, pictures, embeddings and, from the stage, the arrays that its network takes.

`batch(step)` is a pure function of the configuration and the step, so looking ahead is a matter of asking for the next
steps in threads; decoding releases Python's lock. A picture that cannot be decoded is written down in
`quarantine.jsonl` and another one takes its place, the same one in every run.
"""

import json
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from pipeline.config import ConfigError
from pipeline.data.image import BadImage, crop_resize, decode
from pipeline.data.order import replacement, sample_ids
from pipeline.data.shards import Rejected, Shards
from pipeline.data.text_store import TextStore, build
from pipeline.errors import UserError
from pipeline.files import write_atomically
from pipeline.rng import generator

if TYPE_CHECKING:
    from pipeline.nn.text_encoder import TextConfig

log = logging.getLogger("cascade")
ATTEMPTS = 16  # stand-ins tried for one place before the data set is called broken

Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where samples come from and how many make a step."""

    shards: str | tuple[str, ...]  # WebDataset tars; braces and * are expanded
    global_batch: int = 2048  # samples a step over all ranks
    crop: Literal["center", "random"] = "center"  # where the square is cut out of a picture that is none
    workers: int = 2  # threads that prepare batches

    def __post_init__(self) -> None:
        for name in ("global_batch", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is not positive; give 1 or more")

    @property
    def patterns(self) -> tuple[str, ...]:
        return (self.shards,) if isinstance(self.shards, str) else self.shards


def open_text(config: "TextConfig", shards: Shards) -> TextStore:
    """The embeddings of the shards' captions; encoded now where they are not yet beside the shards."""
    from pipeline.nn.text_encoder import TextEncoder  # late: MindSpore, which nothing else here needs

    encoder = TextEncoder.load(config.encoder, config.encoder, config.length)
    if encoder.width != config.width:
        raise UserError(
            f"text.width: {config.width}, but the encoder in {config.encoder} has {encoder.width}; set that"
        )
    captions = shards.captions()
    build(captions, encoder)
    return TextStore.open(captions, encoder.fingerprint, config.length)


class Quarantine:
    """`quarantine.jsonl`: what was left out and why, each sample once over all runs in the folder."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, threading.Lock()
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a full disk cut the last line short
            write_atomically(path, whole.encode())
        self.known = self.read()

    def read(self) -> set[tuple[str, str]]:
        """Shard and key of what the file lists."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return {(entry["shard"], entry["key"]) for entry in map(json.loads, lines)}

    def add(self, rejected: Rejected) -> None:
        with self.lock:
            if (rejected.shard, rejected.key) not in self.known:
                self.known = self.read()  # the job's other processes write it too
            if (rejected.shard, rejected.key) in self.known:
                return
            self.known.add((rejected.shard, rejected.key))
            with self.path.open("a") as file:
                file.write(json.dumps(rejected._asdict()) + "\n")
        log.warning("%s:%s is left out: %s", rejected.shard, rejected.key, rejected.reason)


class Loader:
    """The batches of a stage's run.

    Args:
        config, seed: of the run.
        shards, text: the samples and their embeddings.
        size: side of the pictures that `arrange` wants, in pixels.
        arrange: (step, positions in the global batch, uint8 (B, size, size, 3), text (B, L, D), mask (B, L)) -> the
            arrays of one training step.
        quarantine: the file for what cannot be used.
        share: which slice of the global batch this process makes.
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        shards: Shards,
        text: TextStore,
        size: int,
        arrange: Callable[[int, range, np.ndarray, np.ndarray, np.ndarray], Arrays],
        quarantine: Path,
        share: range,
    ) -> None:
        self.config, self.seed, self.shards, self.text = config, seed, shards, text
        self.size, self.arrange, self.share = size, arrange, share
        self.quarantine = Quarantine(quarantine)
        for rejected in shards.skipped:
            self.quarantine.add(rejected)

    def picture(self, number: int, step: int, position: int) -> np.ndarray:
        """Sample `number` as uint8 (size, size, 3), cut as `position` of `step` has it. Raises BadImage."""
        u = v = 0.5
        if self.config.crop == "random":
            u, v = generator(self.seed, "crop", step, position).random(2)
        return crop_resize(decode(self.shards.read(number).image, self.size), self.size, u, v)

    def usable(self, number: int, step: int, position: int) -> tuple[int, np.ndarray]:
        """Sample `number`, or the first stand-in that can be decoded, and its picture."""
        first = number
        for attempt in range(ATTEMPTS):
            try:
                return number, self.picture(number, step, position)
            except BadImage as error:
                shard, _ = self.shards.location(number)
                key = self.shards.key(number).partition(":")[2]
                self.quarantine.add(Rejected(str(self.shards.shards[shard].path), key, str(error)))
                number = replacement(self.seed, step, position, attempt, len(self.shards))
        raise UserError(
            f"data.shards: {self.shards.key(first)} and {ATTEMPTS} stand-ins cannot be decoded; the reasons are in "
            f"{self.quarantine.path}; repair or remove those shards"
        )

    def batch(self, step: int) -> Arrays:
        """The arrays of `step` (from 0) for this process's share."""
        ids = sample_ids(self.seed, step, self.config.global_batch, len(self.shards))
        chosen = [self.usable(int(ids[position]), step, position) for position in self.share]
        text, mask = zip(*(self.text[self.shards.location(number)] for number, _ in chosen), strict=True)
        return self.arrange(step, self.share, np.stack([p for _, p in chosen]), np.stack(text), np.stack(mask))

    def first(self, num: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pictures, text and mask of samples 0 to `num` - 1 (again from 0 if there are fewer), to be looked at."""
        chosen = [self.usable(i % len(self.shards), 0, i) for i in range(num)]
        text, mask = zip(*(self.text[self.shards.location(number)] for number, _ in chosen), strict=True)
        return np.stack([p for _, p in chosen]), np.stack(text), np.stack(mask)

    def batches(self, start: int, stop: int) -> Iterator[Arrays]:
        """The batches of steps `start` to `stop` - 1, prepared ahead in threads."""
        with ThreadPoolExecutor(self.config.workers, "loader") as threads:
            ahead = deque(threads.submit(self.batch, s) for s in range(start, min(stop, start + self.ahead)))
            try:
                for step in range(start, stop):
                    arrays = ahead.popleft().result()
                    if step + self.ahead < stop:
                        ahead.append(threads.submit(self.batch, step + self.ahead))
                    yield arrays
            finally:
                for future in ahead:
                    future.cancel()

    @property
    def ahead(self) -> int:
        return self.config.workers + 1
