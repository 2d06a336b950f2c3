"""The order of samples: a pure function of the seed and the position in the run.

A run consumes an endless sequence of positions; step s of global batch B takes the positions
[s B, (s + 1) B). A data set fills the positions that it is assigned with epochs, each a permutation
of its samples:

    epoch    its shards in random order, cut into groups of `shuffle_shards` shards
    group    all samples of these shards in random order

so that a step reads from a few shards, which fit into memory or are read sequentially from a slow
disk, and not from ten thousand. Several data sets share the sequence by weight: each block of
`BLOCK` positions contains exactly the quota of every set, in random order.

There is no state to save: a restarted run, or one on another number of ranks, asks for the same
step and gets the same samples. The global batch changes where the sequence is cut, not the
sequence.

All draws are Philox draws keyed by (seed, purpose, ...), see `pipeline.rng`.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from pipeline.rng import generator

BLOCK = 10_000  # positions; shares are exact to 1 / BLOCK

# Groups in memory: a batch lies in one, or in a few if shards are small or data sets many.
CACHED_GROUPS = 16


class Mixture(NamedTuple):
    """A block of positions that the data sets share."""

    sets: np.ndarray  # the data set of each position
    turns: np.ndarray  # the number of earlier positions of this set in the block


class Epoch(NamedTuple):
    """An epoch of one data set."""

    shards: np.ndarray  # in the order of the epoch
    group_ends: np.ndarray  # samples up to the end of each group


class Order:
    """The sequence of samples.

    Args:
        seed: of the run.
        sizes: for each data set the number of samples of each of its shards; samples are numbered
            consecutively, set by set.
        shares: of each data set; they need not sum to 1.
        shuffle_shards: number of shards whose samples are shuffled together.

    Raises ValueError for a set without samples or with a share that rounds to no position of a
    block.
    """

    def __init__(
        self,
        seed: int,
        sizes: Sequence[Sequence[int]],
        shares: Sequence[float],
        shuffle_shards: int,
    ) -> None:
        self.seed = seed
        self.shuffle_shards = shuffle_shards
        self.sizes = [np.asarray(shards, np.int64) for shards in sizes]
        self.totals = [int(shards.sum()) for shards in self.sizes]
        self.num_samples = sum(self.totals)

        # The first sample of each shard.
        set_starts = accumulate(self.totals, initial=0)
        self.shard_starts = [
            start + np.cumsum(shards) - shards
            for start, shards in zip(set_starts, self.sizes, strict=False)
        ]

        self.quotas = quotas(shares)
        for index, (total, quota) in enumerate(zip(self.totals, self.quotas, strict=True)):
            if not total or not quota:
                raise ValueError(
                    f"data set {index} has {total} samples and {quota} of {BLOCK} positions"
                )

        self._mixture = lru_cache(2)(self.mixture)
        self._epoch = lru_cache(2 * len(sizes))(self.epoch)
        self._group = lru_cache(CACHED_GROUPS)(self.group)

    def ids(self, step: int, global_batch: int) -> np.ndarray:
        """The samples of `step` (from 0), int64 (global_batch,), each in [0, num_samples)."""
        positions = step * global_batch + np.arange(global_batch, dtype=np.int64)

        # A single data set has all positions: its turns are the positions.
        if len(self.sizes) == 1:
            return self.set_ids(0, positions)

        # A batch may reach over the end of a block.
        blocks, slots = np.divmod(positions, BLOCK)
        ids = np.empty_like(positions)
        for block in np.unique(blocks).tolist():
            inside = blocks == block
            ids[inside] = self._block_ids(block, slots[inside])
        return ids

    def _block_ids(self, block: int, slots: np.ndarray) -> np.ndarray:
        """The samples at some positions of a block."""
        mixture = self._mixture(block)
        sets = mixture.sets[slots]
        turns = mixture.turns[slots]

        # Earlier blocks had `quota` turns of the data set each.
        ids = np.empty_like(turns)
        for dataset, quota in enumerate(self.quotas):
            mine = sets == dataset
            ids[mine] = self.set_ids(dataset, block * quota + turns[mine])
        return ids

    def set_ids(self, dataset: int, turns: np.ndarray) -> np.ndarray:
        """The samples of data set `dataset` at its turns 0, 1, 2, ..., epoch after epoch."""
        epochs, rows = np.divmod(turns, self.totals[dataset])
        ids = np.empty_like(turns)

        # Usually one epoch and one group; more where the batch crosses a boundary.
        for epoch in np.unique(epochs).tolist():
            ends = self._epoch(dataset, epoch).group_ends
            starts = np.concatenate([[0], ends[:-1]])

            in_epoch = epochs == epoch
            groups = np.searchsorted(ends, rows, side="right")
            for group in np.unique(groups[in_epoch]).tolist():
                inside = in_epoch & (groups == group)
                ids[inside] = self._group(dataset, epoch, group)[rows[inside] - starts[group]]
        return ids

    def mixture(self, block: int) -> Mixture:
        """The data sets of a block's positions."""
        sets = generator(self.seed, "mix", block).permutation(
            np.repeat(np.arange(len(self.quotas)), self.quotas)
        )

        # Each set counts its own positions: its epochs are those that it would have alone.
        turns = np.empty(BLOCK, np.int64)
        for dataset, quota in enumerate(self.quotas):
            turns[sets == dataset] = np.arange(quota)
        return Mixture(sets, turns)

    def epoch(self, dataset: int, epoch: int) -> Epoch:
        """The order of a data set's shards in an epoch, and its groups."""
        sizes = self.sizes[dataset]
        shards = generator(self.seed, "shards", dataset, epoch).permutation(len(sizes))
        ends = np.cumsum(sizes[shards])

        # The last group may have fewer shards.
        size = self.shuffle_shards
        return Epoch(shards, np.append(ends[size - 1 : -1 : size], ends[-1]))

    def group(self, dataset: int, epoch: int, group: int) -> np.ndarray:
        """All samples of a group of shards, in their order."""
        start = group * self.shuffle_shards
        shards = self._epoch(dataset, epoch).shards[start : start + self.shuffle_shards]

        first_ids = self.shard_starts[dataset][shards].tolist()
        sizes = self.sizes[dataset][shards].tolist()
        ids = np.concatenate(
            [np.arange(first, first + n) for first, n in zip(first_ids, sizes, strict=True)]
        )
        return generator(self.seed, "order", dataset, epoch, group).permutation(ids)

    def replacement(self, step: int, position: int, attempt: int) -> int:
        """The sample that replaces an unusable one at `position` of the global batch of `step`.

        Drawn for this position alone, so one bad sample moves no other; `attempt` counts up while
        the replacement is unusable too.
        """
        return int(
            generator(self.seed, "replace", step, position, attempt).integers(self.num_samples)
        )


def quotas(shares: Sequence[float]) -> list[int]:
    """The number of positions of a block for each share: integers of sum BLOCK, by the method of
    largest remainders.
    """
    exact = np.asarray(shares, float) / sum(shares) * BLOCK
    rounded = np.floor(exact).astype(int)

    # Stable: of equal remainders the first ones are rounded up, on every machine.
    num_missing = BLOCK - int(rounded.sum())
    rounded[np.argsort(rounded - exact, kind="stable")[:num_missing]] += 1
    return [int(quota) for quota in rounded]
