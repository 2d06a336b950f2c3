"""Which sample goes where: a pure function of the seed and the place in the run.

The run sees an endless row of places; step s of global batch B takes places [s B, (s + 1) B). A
data set fills the places that it is given with epochs, each a permutation of its samples:

    epoch    its shards in an order of its own, cut into windows of `window` shards
    window   all samples of those shards, shuffled together

so that a step reads from a few shards, which lie in the memory of a machine or come one after the
other from a slow disk, and not from ten thousand. Several data sets share the row by weight: each
block of `BLOCK` places holds exactly its share of every set, in an order of its own.

There is no state, so there is none to save: a restarted run, or one on another number of workers,
asks for the same step and gets the same samples. Changing the global batch changes where the row is
cut, not the row.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np

from pipeline.rng import generator

BLOCK = 10_000  # places: a share is kept to 1 / BLOCK
CACHED = (
    16  # windows in memory: a batch lies in one, or in a few where shards are small or sets many
)


class Order:
    """The row of samples.

    Args:
        seed: of the run.
        sizes: for each data set the samples of each of its shards; samples are numbered through,
            set by set.
        shares: of each data set; they need not sum to 1.
        window: shards whose samples are shuffled together.

    Raises ValueError if a set has no sample, or a share so small that a block has no place for it.
    """

    def __init__(
        self, seed: int, sizes: Sequence[Sequence[int]], shares: Sequence[float], window: int
    ) -> None:
        self.seed, self.window = seed, window
        self.sizes = [np.asarray(shards, np.int64) for shards in sizes]
        self.totals = [int(shards.sum()) for shards in self.sizes]
        self.num_samples = sum(self.totals)
        self.firsts = [  # number of each shard's first sample
            start + np.cumsum(shards) - shards
            for start, shards in zip(accumulate(self.totals, initial=0), self.sizes, strict=False)
        ]
        self.quotas = quotas(shares)
        for number, (total, quota) in enumerate(zip(self.totals, self.quotas, strict=True)):
            if not total or not quota:
                raise ValueError(
                    f"data set {number} has {total} samples and {quota} of {BLOCK} places"
                )
        self._block = lru_cache(2)(self.block)
        self._epoch = lru_cache(2 * len(sizes))(self.epoch)
        self._samples = lru_cache(CACHED)(self.samples)

    def ids(self, step: int, global_batch: int) -> np.ndarray:
        """The samples of `step` (from 0), int64 (global_batch,), each in [0, num_samples)."""
        places = step * global_batch + np.arange(global_batch, dtype=np.int64)
        if len(self.sizes) == 1:
            return self.of_set(0, places)
        block, slot = np.divmod(places, BLOCK)
        ids = np.empty_like(places)
        for number in np.unique(block).tolist():
            inside = block == number
            sets, turns = (part[slot[inside]] for part in self._block(number))
            found = np.empty_like(turns)
            for which, quota in enumerate(self.quotas):
                found[sets == which] = self.of_set(which, number * quota + turns[sets == which])
            ids[inside] = found
        return ids

    def of_set(self, which: int, turns: np.ndarray) -> np.ndarray:
        """The samples that data set `which` gives at its turns 0, 1, 2, ...: epoch after epoch."""
        epoch, row = np.divmod(turns, self.totals[which])
        ids = np.empty_like(turns)
        for number in np.unique(epoch).tolist():
            _, ends = self._epoch(which, number)
            now = epoch == number
            window = np.searchsorted(ends, row, side="right")
            for part in np.unique(window[now]).tolist():
                here = now & (window == part)
                ids[here] = self._samples(which, number, part)[
                    row[here] - (ends[part - 1] if part else 0)
                ]
        return ids

    def block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """For each place of a block of the mixture its data set, and how many turns of that set
        come before it.
        """
        sets = generator(self.seed, "mix", number).permutation(
            np.repeat(np.arange(len(self.quotas)), self.quotas)
        )
        turns = np.empty(BLOCK, np.int64)
        for which, quota in enumerate(self.quotas):
            turns[sets == which] = np.arange(quota)
        return sets, turns

    def epoch(self, which: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of a data set in the order of an epoch, and where each window of them ends in
        it.
        """
        shards = generator(self.seed, "shards", which, number).permutation(len(self.sizes[which]))
        ends = np.cumsum(self.sizes[which][shards])
        return shards, np.append(ends[self.window - 1 : -1 : self.window], ends[-1])

    def samples(self, which: int, epoch: int, window: int) -> np.ndarray:
        """All samples of a window in their order."""
        shards = self._epoch(which, epoch)[0][window * self.window : (window + 1) * self.window]
        firsts, sizes = self.firsts[which][shards], self.sizes[which][shards]
        ids = np.concatenate(
            [np.arange(f, f + n) for f, n in zip(firsts.tolist(), sizes.tolist(), strict=True)]
        )
        return generator(self.seed, "order", which, epoch, window).permutation(ids)

    def replacement(self, step: int, position: int, attempt: int) -> int:
        """The sample to try instead of one that cannot be used, at `position` of the global batch
        of `step`.

        Drawn for that place alone, so that one bad sample moves no other; `attempt` counts up if
        the stand-in is bad too.
        """
        return int(
            generator(self.seed, "replace", step, position, attempt).integers(self.num_samples)
        )


def quotas(shares: Sequence[float]) -> list[int]:
    """How many places of a block each share gets: whole numbers of sum BLOCK, the largest
    remainders rounded up.
    """
    exact = np.asarray(shares, float) / sum(shares) * BLOCK
    whole = np.floor(exact).astype(int)
    short = BLOCK - int(whole.sum())
    whole[np.argsort(whole - exact, kind="stable")[:short]] += 1
    return [int(number) for number in whole]
