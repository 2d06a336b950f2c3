"""Buckets: the parameters of a network, joined into a few long vectors.

A bucket is the unit of gradient reduction and of the optimizer's update. One all-reduce of a long
vector costs a fraction of hundreds of short ones, and so does one AdamW kernel, as most of the time
of a short kernel is its launch. There are several buckets, not one, because the temporaries of the
update are as long as the bucket it works on. A bucket is also what ranks divide evenly among
themselves when the optimizer is sharded, regardless of where parameters begin.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from mindspore import Parameter

NUM_BUCKETS = 32  # of a large network, approximately
MIN_CAPACITY = 2**20  # elements that a bucket may hold in any network: 4 MiB of float32


class Bucket:
    """Parameters laid out one after another in a vector of `size` elements, of which the last
    `padding` are zero.

    Args:
        parameters: float32, in the order of the vector.
        num_shards: how many equal shards the vector can be divided into.
    """

    def __init__(self, parameters: Sequence[Parameter], num_shards: int) -> None:
        self.parameters = list(parameters)
        ends = np.cumsum([0, *(parameter.size for parameter in parameters)]).tolist()

        # (start, stop) of each parameter in the vector
        self.spans = list(pairwise(ends))

        # The fewest zeros that make the shards equally long, as an all-gather requires.
        self.padding = -ends[-1] % num_shards
        self.size = ends[-1] + self.padding

    def views(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """Parameter name -> its part of `vector`, in the parameter's shape, without a copy."""
        return {
            parameter.name: vector[start:stop].reshape(parameter.shape)
            for parameter, (start, stop) in zip(self.parameters, self.spans, strict=True)
        }

    def join(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """The inverse of `views`; float32 (size,)."""
        vector = np.zeros(self.size, np.float32)
        for name, view in self.views(vector).items():
            view[...] = arrays[name]

        return vector

    def read(self) -> np.ndarray:
        """The current values of the parameters, joined; float32 (size,)."""
        return self.join({parameter.name: parameter.asnumpy() for parameter in self.parameters})

    def write(self, vector: np.ndarray) -> None:
        """Copies `vector` into the parameters. CPU only: there `asnumpy` is a view of a parameter's
        memory.
        """
        for parameter, view in zip(self.parameters, self.views(vector).values(), strict=True):
            parameter.asnumpy()[...] = view


def make_buckets(
    parameters: Sequence[Parameter], num_shards: int, min_capacity: int = MIN_CAPACITY
) -> list[Bucket]:
    """Groups neighbouring parameters into buckets.

    A bucket holds up to `min_capacity` elements, or 1 / `NUM_BUCKETS` of the network if that is
    more. A parameter larger than this has a bucket of its own.
    """
    num_elements = sum(parameter.size for parameter in parameters)
    capacity = max(min_capacity, num_elements // NUM_BUCKETS)

    # Greedy and in order, so that the gradients of a bucket are consecutive.
    groups: list[list[Parameter]] = [[]]
    filled = 0
    for parameter in parameters:
        if groups[-1] and filled + parameter.size > capacity:
            groups.append([])
            filled = 0
        groups[-1].append(parameter)
        filled += parameter.size

    return [Bucket(group, num_shards) for group in groups]
