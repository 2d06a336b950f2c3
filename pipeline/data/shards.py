"""All samples of a run's data sets, numbered through and read by number.

Only counts are held of each shard; its index is opened when a sample of it is wanted, and the last
few stay. So ten thousand shards cost little to open, and a step, whose samples come from a window
of shards, finds theirs open.
"""

import hashlib
import json
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from pipeline.config import ConfigError
from pipeline.data.filters import FilterConfig, select
from pipeline.data.index import THREADS, Index, build, index_path, read_index
from pipeline.data.order import BLOCK, quotas
from pipeline.data.source import Sources, distinct, expand
from pipeline.data.tar import Fault
from pipeline.errors import UserError
from pipeline.text.captions import captions

OPEN = 64  # tables of shards in memory, each some hundred kilobytes
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where samples come from, which are taken, in what order, and how many make a step."""

    # Tars, with braces and *; or several data sets and their weights. (MindSpore hashes
    # configurations it compiles in.)
    shards: str | tuple[str, ...] | dict[str, float] = field(hash=False)
    global_batch: int = 2048  # samples a step over all ranks
    shuffle_shards: int = 8  # shards whose samples are shuffled together
    crop: Literal["center", "random"] = (
        "center"  # where the square is cut out of a picture that is none
    )
    captions: dict[str, float] = field(
        default_factory=lambda: {"txt": 1.0}, hash=False
    )  # txt, fields of KEY.json; {}: none
    filter: FilterConfig = FilterConfig()
    max_damage: float = 0.1  # share of samples that may be unusable before the run stops
    workers: int = 2  # threads that prepare batches
    cache: str | None = (
        None  # folder for indexes and embeddings (default: beside the shards) and what http(s) gave
    )
    cache_gib: float = 64  # of what http(s) gave

    def __post_init__(self) -> None:
        for name in ("global_batch", "shuffle_shards", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is not positive; give 1 or more")
        if not 0 <= self.max_damage <= 1:
            raise ConfigError(f"max_damage: {self.max_damage} is not a share in [0, 1]")
        for name in ("shards", "captions"):
            weights = getattr(self, name)
            if isinstance(weights, dict) and (
                (name == "shards" and not weights) or min(weights.values(), default=1) <= 0
            ):
                raise ConfigError(
                    f"{name}: {weights}; give each entry a weight above 0, or leave it out"
                )
        if 0 in quotas(list(self.sets.values())):
            raise ConfigError(
                f"shards: {self.shards}; a weight is so small that {BLOCK:,} samples have none of it"
            )

    @property
    def sets(self) -> dict[tuple[str, ...], float]:
        """The patterns of each data set and its weight."""
        if isinstance(self.shards, dict):
            return {(pattern,): weight for pattern, weight in self.shards.items()}
        return {(self.shards,) if isinstance(self.shards, str) else self.shards: 1.0}

    def sources(self) -> Sources:
        """What reads the shards, with connections and what is known of servers of its own."""
        return Sources(
            Path(self.cache) / "ranges" if self.cache else None, int(self.cache_gib * GIB)
        )

    @property
    def cache_folder(self) -> Path | None:
        return Path(self.cache) if self.cache else None


class Damaged(ValueError):
    """A sample cannot be used; says why."""


class Table(NamedTuple):
    """What of a shard's index is needed to read its samples, one row each."""

    rows: np.ndarray  # in the index
    offset: np.ndarray  # of the picture in the tar
    size: np.ndarray
    crc32: np.ndarray


class Shards:
    """The usable samples of some data sets, numbered from 0 by set, shard and place in the shard.

    Attributes:
        indexes: of all shards.
        sizes, weights: of each data set the samples in each of its shards, and its weight.
        removed: how many samples each filter removed.
    """

    def __init__(self, config: DataConfig, sources: Sources, sets: list[list[Index]]) -> None:
        self.config, self.sources = config, sources
        self.indexes = [index for indexes in sets for index in indexes]
        with ThreadPoolExecutor(THREADS) as threads:
            selected = list(threads.map(lambda index: _count(index, config), self.indexes))
        counts = iter([count for count, _ in selected])
        self.sizes = [[next(counts) for _ in indexes] for indexes in sets]
        self.weights = list(config.sets.values())
        self.removed: Counter[str] = sum((removed for _, removed in selected), Counter())
        self._starts = [0, *accumulate(size for sizes in self.sizes for size in sizes)]
        self._table = lru_cache(OPEN)(self.table)

    @classmethod
    def open(cls, config: DataConfig, progress: bool = True) -> "Shards":
        """The samples of `config.shards`, indexed now where they are not yet.

        Raises UserError for shards that cannot be, for an index that no longer fits its shard, for
        a data set of which no sample is left, and if more is damaged than `config.max_damage`.
        """
        sources = config.sources()
        shards = cls(config, sources, indexed(config, sources, progress=progress))
        for patterns, sizes in zip(config.sets, shards.sizes, strict=True):
            if not sum(sizes):
                raise UserError(
                    f"data.shards: {', '.join(patterns)}: no sample is left; {shards.account()}"
                )
        if shards.damage > config.max_damage:
            raise UserError(
                f"data.max_damage: {shards.damage:.1%} of the samples are damaged, more than {config.max_damage:.1%}; "
                f"{shards.account()}; repair the shards or raise it"
            )
        return shards

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def faults(self) -> Iterator[tuple[str, Fault]]:
        """All that is wrong with the shards, each with its shard."""
        return ((index.location, fault) for index in self.indexes for fault in index.faults)

    @property
    def damage(self) -> float:
        """The share of samples that are damaged; a stretch of a tar counts as the samples it would
        hold.
        """
        found = sum(index.num_samples for index in self.indexes)
        size = sum(index.stat.size for index in self.indexes) - sum(
            fault.size for _, fault in self.faults
        )
        lost = sum(max(1.0, fault.size * found / max(size, 1)) for _, fault in self.faults)
        return lost / max(found + lost, 1)

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of what decides which sample is which: texts and checksums of
        all shards, counts.
        """
        facts = [
            [(index.digest, index.content) for index in self.indexes],
            self.sizes,
            self.weights,
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def account(self) -> str:
        """In words, what was left out and why."""
        faults = list(self.faults)
        parts = [f"{number:,} {reason}" for reason, number in self.removed.most_common()]
        if faults:
            location, fault = faults[0]
            parts.append(
                f"{len(faults):,} damaged (the first, {location}:{fault.key}, {fault.reason})"
            )
        return "left out: " + (", ".join(parts) or "nothing")

    def location(self, i: int) -> tuple[int, int]:
        """(shard, row in its index) of sample `i`."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        shard = bisect_right(self._starts, i) - 1
        return shard, int(self._table(shard).rows[i - self._starts[shard]])

    def table(self, shard: int) -> Table:
        rows = self.rows(shard)
        return Table(
            rows,
            *(self.indexes[shard].column(name)[rows, 0] for name in ("offset", "size", "crc32")),
        )

    def rows(self, shard: int) -> np.ndarray:
        """The rows of a shard's index that are samples here."""
        return select(self.indexes[shard], self.config.filter, self.config.captions)[0]

    def name(self, i: int) -> tuple[str, str]:
        """Shard and key of sample `i`."""
        shard, row = self.location(i)
        return self.indexes[shard].location, next(self.indexes[shard].texts(np.array([row])))["key"]

    def image(self, i: int) -> bytes:
        """The picture's file, as it lies in the shard. Raises Damaged if it is not what was
        indexed.
        """
        shard, _ = self.location(i)
        table, row = self._table(shard), i - self._starts[shard]
        data = self.sources.read(
            self.indexes[shard].location, int(table.offset[row]), int(table.size[row])
        )
        if zlib.crc32(data) != table.crc32[row]:
            raise Damaged("its bytes are no longer those that were indexed")
        return data

    def meta(self, i: int) -> dict[str, Any]:
        """The fields of sample `i`: KEY.json's, and the number in KEY.cls as `cls`."""
        shard, row = self.location(i)
        return dict(json.loads(next(self.indexes[shard].texts(np.array([row])))["json"] or "{}"))

    def captions(self, shard: int, rows: np.ndarray) -> Iterator[Mapping[str, list[str]]]:
        """The captions of some rows of a shard's index, by field."""
        for text in self.indexes[shard].texts(rows):
            meta = json.loads(text["json"] or "{}")
            yield {name: captions(text["txt"], meta, name) for name in self.config.captions}


def indexed(
    config: DataConfig, sources: Sources, outdated: bool = False, progress: bool = True
) -> list[list[Index]]:
    """The indexes of each data set's shards, made now where they are missing, and if `outdated`
    where they no longer fit. UserError otherwise.
    """
    cache = config.cache_folder
    sets = [expand(patterns) for patterns in config.sets]
    every = [location for locations in sets for location in locations]
    distinct(every, "in two data sets")

    def fitting(location: str) -> Index:
        index = read_index(index_path(location, cache), location)
        reason = index.fault(sources) if index else "has no index"
        if not index or reason:
            raise UserError(f"{location}: {reason}; run `cascade index '{location}'`")
        return index

    build(every, sources, cache, config.workers, outdated, progress)
    with ThreadPoolExecutor(THREADS) as threads:
        return [list(threads.map(fitting, locations)) for locations in sets]


def _count(index: Index, config: DataConfig) -> tuple[int, Counter[str]]:
    """How many samples pass, and what removed the others; not which: that is looked up when a shard
    is opened.
    """
    rows, removed = select(index, config.filter, config.captions)
    return len(rows), removed
