"""All samples of a run's data sets, numbered consecutively and read by their number.

Only counts are held for each shard; its index is opened when a sample of it is read, and the most
recent ones stay open. So ten thousand shards cost little to open, and a step, whose samples come
from a few shards that are shuffled together, finds theirs open.
"""

import hashlib
import json
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import numpy as np

from pipeline.data.config import DataConfig
from pipeline.data.filters import select
from pipeline.data.index import THREADS, Index, build_indexes, index_path, read_index
from pipeline.data.source import REPEATED, Sources, check_unique, expand
from pipeline.data.tar import Fault
from pipeline.errors import UserError
from pipeline.text.captions import captions

MAX_OPEN = 64  # tables in memory, each of some hundred kilobytes

Part = Literal["training", "validation"]
# Why a sample that passes the filters is not of a part.
OTHER_PART = {"training": "held out for validation", "validation": "trained on"}


class DamagedSample(ValueError):
    """A sample cannot be used; the message is the reason."""


class SampleTable(NamedTuple):
    """The part of a shard's index that reading an image needs; a row for each sample."""

    rows: np.ndarray  # in the index
    offset: np.ndarray  # of the image in the tar, bytes
    size: np.ndarray  # bytes
    crc32: np.ndarray


class Shards:
    """The usable samples of the data sets, numbered from 0 by set, shard and position in the shard.

    Args:
        sets: the indexes of each data set's shards.
        part: those that are trained on, or those that are held out for validation.
        held_out_bits: which rows of each shard are held out, as far as that is known already.

    Attributes:
        indexes: of all shards.
        sizes: for each data set the number of samples of each of its shards.
        weights: of each data set.
        removed: the number of samples that each filter removes.
    """

    def __init__(
        self,
        config: DataConfig,
        sources: Sources,
        sets: list[list[Index]],
        part: Part = "training",
        held_out_bits: dict[str, np.ndarray] | None = None,
    ) -> None:
        self.config = config
        self.sources = sources
        self.sets = sets
        self.part = part
        # A bit per sample stays in memory, as finding it out reads and hashes all keys.
        self.held_out_bits = {} if held_out_bits is None else held_out_bits
        self.indexes = [index for indexes in sets for index in indexes]

        # Only counts are kept: the rows of a shard are selected again when it is opened.
        def count(index: Index) -> tuple[int, Counter[str]]:
            passing, removed = select(index, config.filter, config.captions)
            rows = self.of_part(index, passing)
            if len(rows) < len(passing):
                removed[OTHER_PART[part]] = len(passing) - len(rows)
            return len(rows), removed

        with ThreadPoolExecutor(THREADS) as threads:
            selected = list(threads.map(count, self.indexes))

        # The counts are in the order of all shards: regroup them by data set.
        counts = iter([num_samples for num_samples, _ in selected])
        self.sizes = [[next(counts) for _ in indexes] for indexes in sets]
        self.weights = list(config.sets.values())
        self.removed: Counter[str] = sum((removed for _, removed in selected), Counter())

        # The first sample of each shard, and the total.
        self._starts = [0, *accumulate(size for sizes in self.sizes for size in sizes)]
        self._table = lru_cache(MAX_OPEN)(self.table)

    @classmethod
    def open(cls, config: DataConfig, progress: bool = True) -> "Shards":
        """The samples of `config.shards` to train on; missing indexes are written first.

        UserError for shards that do not exist, an index that does not fit its shard, a data set
        without usable samples, and more damaged samples than `config.max_damage` allows.
        """
        sources = config.sources()
        shards = cls(config, sources, open_indexes(config, sources, progress=progress))

        # A set without samples has a weight that nothing could fill.
        for patterns, sizes in zip(config.sets, shards.sizes, strict=True):
            if not sum(sizes):
                raise UserError(
                    f"data.shards: {', '.join(patterns)}: no sample passes; "
                    f"{shards.exclusion_summary()}"
                )
        if shards.damaged_fraction > config.max_damage:
            raise UserError(
                f"data.max_damage: {shards.damaged_fraction:.1%} of the samples are damaged, more "
                f"than {config.max_damage:.1%}; {shards.exclusion_summary()}; repair the shards or "
                "raise it"
            )
        return shards

    def open_validation(self) -> "Shards | None":
        """The samples of `config.validation`, given those that are trained on; None if there is
        none.

        Raises:
            UserError: no sample is held out; or what `open` raises; or a shard is also trained on.
        """
        config = self.config
        if config.held_out:
            held_out = Shards(
                config, self.sources, self.sets, "validation", held_out_bits=self.held_out_bits
            )
            if not len(held_out):
                raise UserError(
                    f"data.validation: {config.validation} of the keys of data.shards holds out "
                    f"none of {len(self):,} samples; raise it, or give tars of their own"
                )
            return held_out

        if not isinstance(config.validation, str):
            return None
        try:
            own = Shards.open(replace(config, shards=config.validation, validation=None))
        except UserError as error:
            # There they are the shards of a data set.
            raise UserError(
                f"data.validation: {str(error).removeprefix('data.shards: ')}"
            ) from None

        locations = [index.location for index in (*self.indexes, *own.indexes)]
        check_unique(
            locations, "in data.validation too, which is not to be trained on; take it out of one"
        )
        return own

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def faults(self) -> Iterator[tuple[str, Fault]]:
        """All faults, each with the location of its shard."""
        return ((index.location, fault) for index in self.indexes for fault in index.faults)

    @property
    def damaged_fraction(self) -> float:
        """The fraction of samples that are damaged. A damaged range of a tar counts as the number
        of samples of average size that it would hold.
        """
        num_readable = sum(index.num_samples for index in self.indexes)
        total_bytes = sum(index.stat.size for index in self.indexes)
        damaged_bytes = sum(fault.size for _, fault in self.faults)
        readable_bytes = max(total_bytes - damaged_bytes, 1)

        # A fault of a single sample has size 0 and counts as one.
        num_lost = sum(
            max(1.0, fault.size * num_readable / readable_bytes) for _, fault in self.faults
        )
        return num_lost / max(num_readable + num_lost, 1)

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of everything that the numbering of the samples and their
        content depend on: texts and checksums of all shards, counts, weights.
        """
        facts = [
            [(index.digest, index.content) for index in self.indexes],
            self.sizes,
            self.weights,
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def exclusion_summary(self) -> str:
        """One line of text: how many samples were left out, by reason."""
        parts = [f"{count:,} {reason}" for reason, count in self.removed.most_common()]
        faults = list(self.faults)

        # One example suffices: `quarantine.jsonl` lists them all.
        if faults:
            location, fault = faults[0]
            parts.append(
                f"{len(faults):,} damaged (the first: {location}:{fault.key}, {fault.reason})"
            )
        return "left out: " + (", ".join(parts) or "nothing")

    def location(self, i: int) -> tuple[int, int]:
        """(shard, row in its index) of sample `i`. Raises IndexError."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")

        # Shards without samples have equal starts: the last of them is the one with sample `i`.
        shard = bisect_right(self._starts, i) - 1
        return shard, int(self._table(shard).rows[i - self._starts[shard]])

    def table(self, shard: int) -> SampleTable:
        """Read from the index of `shard`."""
        rows = self.rows(shard)
        index = self.indexes[shard]
        return SampleTable(
            rows,
            offset=index.column("offset")[rows, 0],
            size=index.column("size")[rows, 0],
            crc32=index.column("crc32")[rows, 0],
        )

    def rows(self, shard: int) -> np.ndarray:
        """The rows of a shard's index that pass the filters and belong to this part."""
        return self.of_part(self.indexes[shard], self.passing_rows(shard))

    def passing_rows(self, shard: int) -> np.ndarray:
        """The rows of a shard's index that pass the filters, of both parts."""
        return select(self.indexes[shard], self.config.filter, self.config.captions)[0]

    def of_part(self, index: Index, rows: np.ndarray) -> np.ndarray:
        """Those of `rows` that belong to this part."""
        if not self.config.held_out:
            return rows

        if index.location not in self.held_out_bits:
            keys = index.keys(np.arange(index.num_samples))
            held_out = [is_held_out(key, self.config.held_out) for key in keys]
            self.held_out_bits[index.location] = np.packbits(held_out)

        bits = self.held_out_bits[index.location]
        is_validation = np.unpackbits(bits, count=index.num_samples).astype(bool)
        return rows[is_validation[rows] == (self.part == "validation")]

    def name(self, i: int) -> tuple[str, str]:
        """Shard and key of sample `i`."""
        shard, row = self.location(i)
        return self.indexes[shard].location, self._texts(shard, row)["key"]

    def image(self, i: int) -> bytes:
        """The image file of sample `i`. Raises DamagedSample if it is not the indexed one."""
        shard, _ = self.location(i)
        table = self._table(shard)
        row = i - self._starts[shard]
        data = self.sources.read(
            self.indexes[shard].location, int(table.offset[row]), int(table.size[row])
        )

        # The shard may have been written to, or the disk may be failing.
        if zlib.crc32(data) != table.crc32[row]:
            raise DamagedSample("has changed since it was indexed")
        return data

    def meta(self, i: int) -> dict[str, Any]:
        """The fields of sample `i`: those of KEY.json, and the number in KEY.cls as `cls`."""
        shard, row = self.location(i)
        return dict(json.loads(self._texts(shard, row)["json"] or "{}"))

    def captions(self, shard: int, rows: np.ndarray) -> Iterator[Mapping[str, list[str]]]:
        """The captions of some rows of a shard's index, by caption field."""
        for text in self.indexes[shard].texts(rows):
            meta = json.loads(text["json"] or "{}")
            yield {name: captions(text["txt"], meta, name) for name in self.config.captions}

    def _texts(self, shard: int, row: int) -> dict[str, str]:
        return next(self.indexes[shard].texts(np.array([row])))


def is_held_out(key: bytes, fraction: float) -> bool:
    """Whether a sample is held out for validation: by its key alone, so that it stays where it is
    when shards are added, and a larger fraction holds out what a smaller one does.
    """
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return int.from_bytes(digest) < fraction * 2**64


def open_indexes(
    config: DataConfig, sources: Sources, rebuild_outdated: bool = False, progress: bool = True
) -> list[list[Index]]:
    """The indexes of each data set's shards. Missing ones are written first and, with
    `rebuild_outdated`, those that do not fit their shards; otherwise these are a UserError.
    """
    cache = config.cache_folder
    sets = [expand(patterns) for patterns in config.sets]
    locations = [location for members in sets for location in members]
    check_unique(locations, f"in two data sets, {REPEATED}")

    def read(location: str) -> Index:
        # Another process may have replaced the shard since `build_indexes`.
        index = read_index(index_path(location, cache), location)
        reason = index.fault(sources) if index else "has no index"
        if not index or reason:
            raise UserError(f"{location}: {reason}; run `cascade index '{location}'`")
        return index

    build_indexes(
        locations,
        sources,
        cache,
        config.workers,
        rebuild_outdated=rebuild_outdated,
        progress=progress,
    )
    with ThreadPoolExecutor(THREADS) as threads:
        return [list(threads.map(read, members)) for members in sets]
