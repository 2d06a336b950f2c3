"""Which sample goes where: a pure function of the seed and the place in the run.

The run sees an endless row of epochs, each a permutation of all samples:

    place:   0 1 2 ... N-1 | N ... 2N-1 | ...        step s of batch B takes places [s B, (s + 1) B)
    sample:  permutation 0 | permutation 1 | ...

There is no state, so there is none to save: a restarted run, or one on another number of workers, asks for the same
step and gets the same samples. Changing the global batch changes where the row is cut, not the row.
"""

from functools import lru_cache

import numpy as np

from pipeline.rng import generator


@lru_cache(maxsize=2)  # a batch lies in one epoch or across two
def permutation(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """The samples of an epoch in their order, int64 (num_samples,), read-only because it is shared."""
    order = generator(seed, "order", epoch).permutation(num_samples)
    order.setflags(write=False)
    return order


def sample_ids(seed: int, step: int, global_batch: int, num_samples: int) -> np.ndarray:
    """The samples of `step` (from 0), int64 (global_batch,), each in [0, num_samples)."""
    place = step * global_batch + np.arange(global_batch, dtype=np.int64)
    epoch, row = np.divmod(place, num_samples)
    ids = np.empty_like(place)
    for number in range(int(epoch[0]), int(epoch[-1]) + 1):
        ids[epoch == number] = permutation(seed, number, num_samples)[row[epoch == number]]
    return ids


def replacement(seed: int, step: int, position: int, attempt: int, num_samples: int) -> int:
    """The sample to try instead of one that cannot be decoded, at `position` of the global batch of `step`.

    Drawn for that place alone, so that one bad sample moves no other; `attempt` counts up if the stand-in is bad too.
    """
    return int(generator(seed, "replace", step, position, attempt).integers(num_samples))
